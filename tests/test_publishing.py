"""Published base models: small, whole, still asked for, taken before anything is trained, and never overwritten."""

from __future__ import annotations

import inspect
import shutil
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from tiny import tiny_profile

from npmerge.catalogue import profile_names
from npmerge.cli import main
from npmerge.data import DataError
from npmerge.experiments import cells
from npmerge.parameters import from_notebook
from npmerge.report.repeat import MERGES, repeat_merge
from npmerge.run import engine, publishing
from npmerge.run.engine import run_experiments, status_of
from npmerge.run.publishing import (
    LARGEST,
    ROOM,
    PublishingError,
    bases_of,
    check_room,
    copies_of,
    publish,
)
from npmerge.store import zoo as zoo_module
from npmerge.store.checkpoints import load_into
from npmerge.store.records import Cell, Outcome, Records
from npmerge.store.zoo import BaseModel, Zoo

ROOT = Path(__file__).parent.parent
MODELS = ROOT / "models"
SEEDS = (0, 1, 2)


@dataclass(frozen=True)
class Folders:
    """Where a run finds things and leaves them."""

    results: Path
    zoo: Path
    models: Path

    @classmethod
    def below(cls, folder: Path) -> Folders:
        return cls(folder / "results", folder / "zoo", folder / "models")

    @property
    def options(self) -> dict[str, Any]:
        where = {"results": self.results, "zoo": self.zoo, "models": self.models}
        return where | {"profile": "tiny", "device": "cpu"}

    def words(self) -> list[str]:
        return ["--profile", "tiny", "--zoo", str(self.zoo), "--models", str(self.models)]

    def trained(self) -> list[Path]:
        return sorted(self.zoo.glob("*.safetensors"))

    def published(self) -> list[Path]:
        return sorted(path for path in self.models.glob("*") if path.is_file())


def pair() -> list[BaseModel]:
    """The base models of the first experiment, seed 0."""
    return bases_of(cells("same_data", "tiny", [0]))


def faults(folder: Path, bases: Iterable[BaseModel]) -> list[str]:
    """What is wrong with a folder of published models."""
    files = [path for path in sorted(folder.iterdir()) if path.name != "README.md"]
    whole = copies_of(bases, folder)
    found = [
        f"{path.name} is no whole model that is asked for" for path in files if path not in whole
    ]
    try:
        check_room(files)
    except PublishingError as error:
        found.append(str(error))
    return found


@pytest.fixture(autouse=True)
def _tiny_profile(monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_profile(monkeypatch)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    """Two merges and their base models, trained; for reading only."""
    folders = Folders.below(tmp_path_factory.mktemp("made"))
    with pytest.MonkeyPatch.context() as patch:
        tiny_profile(patch)
        for name in MERGES:
            run_experiments("same_data", seeds=[0], pattern=f"*/{name}", **folders.options)
    return folders


@pytest.fixture
def trained(made: Folders, tmp_path: Path) -> Folders:
    """The same base models, nothing else."""
    folders = Folders.below(tmp_path)
    folders.zoo.mkdir()
    for path in made.trained():
        shutil.copy(path, folders.zoo)
    return folders


@pytest.fixture
def published(trained: Folders, monkeypatch: pytest.MonkeyPatch) -> Folders:
    """The base models are published, the zoo is gone, and nothing may be trained."""
    publish(pair(), trained.zoo, trained.models)
    shutil.rmtree(trained.zoo)
    monkeypatch.setattr(zoo_module, "fit", lambda *_, **__: pytest.fail("trained"))
    return trained


def damage(path: Path) -> None:
    """Change one bit of the last tensor."""
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))


def of_size(path: Path, size: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.truncate(size)
    return path


# The project's folder


def test_what_is_published_is_whole_small_and_asked_for_by_a_profile_today() -> None:
    bases = bases_of(cell for name in profile_names() for cell in every_cell(name))
    assert (MODELS / "README.md").is_file()
    assert list(MODELS.glob("*.safetensors"))
    assert faults(MODELS, bases) == []


def every_cell(profile: str) -> list[Cell]:
    return [] if profile == "tiny" else cells("ALL", profile, SEEDS)


def test_each_fault_of_a_published_file_is_found(trained: Folders) -> None:
    folder = trained.zoo
    first, second = trained.trained()
    assert faults(folder, pair()) == []
    assert faults(folder, pair()[:1]) == [f"{second.name} is no whole model that is asked for"]
    damage(first)
    (found,) = faults(folder, pair())
    assert found == f"{first.name} is no whole model that is asked for"
    first.unlink()
    of_size(folder / "x", LARGEST + 1)
    stray, large = faults(folder, pair())
    assert stray == "x is no whole model that is asked for"
    assert "x has 1.30 MB, more than the 1.30 MB of a published file" in large


def test_files_may_fill_the_room_and_no_more(tmp_path: Path) -> None:
    count = ROOM // LARGEST
    full = [of_size(tmp_path / str(k), LARGEST) for k in range(count)]
    check_room([*full, of_size(tmp_path / "rest", ROOM - count * LARGEST)])
    with pytest.raises(PublishingError, match=r"24 published files would have 30\.00 MB, more"):
        check_room([*full, of_size(tmp_path / "rest", ROOM - count * LARGEST + 1)])


def test_git_keeps_published_models_and_leaves_the_zoo_out() -> None:
    command = ["git", "check-ignore", "models/x.safetensors", "zoo/x.safetensors"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.split() == ["zoo/x.safetensors"]


# Publishing


def test_publishing_copies_what_the_cells_need_once_and_to_the_byte(trained: Folders) -> None:
    a, b = (path.name for path in trained.trained())
    shutil.copy(trained.zoo / a, trained.zoo / "digits-other-seed0-0123456789ab-cpu.safetensors")
    first = publish(pair()[:1], trained.zoo, trained.models)
    assert [path.name for path in first] == [a]
    second = publish(pair(), trained.zoo, trained.models)
    assert [path.name for path in second] == [b]
    assert publish(pair(), trained.zoo, trained.models) == []
    assert trained.published() == [*first, *second]
    for path in trained.published():
        assert path.read_bytes() == (trained.zoo / path.name).read_bytes()


def test_a_damaged_model_is_not_published(
    trained: Folders, caplog: pytest.LogCaptureFixture
) -> None:
    first, second = trained.trained()
    damage(first)
    copied = publish(pair(), trained.zoo, trained.models)
    assert [path.name for path in copied] == [second.name]
    assert f"{first} is damaged" in caplog.text


def test_another_file_in_the_place_of_one_is_not_overwritten_and_nothing_is_copied(
    trained: Folders,
) -> None:
    taken = of_size(trained.models / trained.trained()[1].name, 5)
    with pytest.raises(PublishingError, match=f"{taken} is there and is not .*delete it first"):
        publish(pair(), trained.zoo, trained.models)
    assert trained.published() == [taken]
    assert taken.read_bytes() == bytes(5)


@pytest.mark.parametrize(
    ("limit", "message"), [("LARGEST", "choose other cells"), ("ROOM", "choose fewer cells")]
)
def test_what_is_too_large_is_said_and_nothing_is_copied(
    limit: str, message: str, trained: Folders, monkeypatch: pytest.MonkeyPatch
) -> None:
    largest = max(path.stat().st_size for path in trained.trained())
    monkeypatch.setattr(publishing, limit, largest - (limit == "LARGEST"))
    with pytest.raises(PublishingError, match=message):
        publish(pair(), trained.zoo, trained.models)
    assert not trained.models.exists()


def test_room_counts_what_is_published_already(
    trained: Folders, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(pair()[:1], trained.zoo, trained.models)
    monkeypatch.setattr(publishing, "ROOM", trained.trained()[1].stat().st_size)
    with pytest.raises(PublishingError, match="2 published files would have"):
        publish(pair(), trained.zoo, trained.models)


def test_the_command_publishes_and_lists_with_size_time_and_device(
    trained: Folders, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["models", "same_data", *trained.words()]
    assert main([*words, "--seeds", "1"]) == 0
    (header,) = capsys.readouterr().out.splitlines()
    assert header.split() == ["file", "size", "trained", "for", "on"]
    assert main([*words, "--publish", "--cells", "*/seed0/*"]) == 0
    assert capsys.readouterr().out.splitlines() == [str(path) for path in trained.published()]
    assert main(words) == 0
    _, *rows = capsys.readouterr().out.splitlines()
    files = [*trained.published(), *trained.trained()]
    assert [row.split()[0] for row in rows] == [str(path) for path in files]
    for row, path in zip(rows, files, strict=True):
        assert f"{path.stat().st_size / 1e6:.2f} MB" in row
        assert row.endswith(zoo_module.device_label(torch.device("cpu")))


def test_a_published_model_is_loaded_as_the_folder_s_page_says(published: Folders) -> None:
    (code,) = (ROOT / "models" / "README.md").read_text().split("```python\n")[1:]
    code = code.partition("```")[0].replace("npm.models.resnet20(100)", "network")
    base = pair()[0]
    network = Zoo(published.zoo, [published.models]).load(base, load_digits())
    names: dict[str, Any] = {"network": network, "FILE": published.published()[0]}
    exec(code, names)  # noqa: S102
    assert names["model"] is network
    assert names["load_into"] is load_into


def load_digits() -> Any:
    return engine.load_images(tiny.SETTING)


# Who uses them


def test_a_run_takes_published_models_says_which_and_leaves_only_what_cells_share_in_the_zoo(
    published: Folders, made: Folders
) -> None:
    before = [path.read_bytes() for path in published.published()]
    (path,) = run_experiments("same_data", seeds=[0], pattern="*/permute-mean", **published.options)
    (one,) = Records(published.results).read("tiny", "same_data")
    (known,) = (r for r in Records(made.results).read("tiny", "same_data") if r.cell == one.cell)
    assert one.rows == known.rows
    files = copies_of(pair(), published.models)
    digests = [base["digest"] for base in one.provenance.base_models.values()]
    assert digests == [about["digest"] for about in files.values()]
    assert published.trained() == []
    assert list((published.zoo / "artifacts").glob("alignment-*"))
    assert [path.read_bytes() for path in published.published()] == before
    assert sorted(published.models.iterdir()) == published.published()  # no lock, no artifact
    assert path.is_file()


def test_published_models_are_taken_from_the_folder_models_by_default(
    published: Folders, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(published.models.parent)
    options = {"profile": "tiny", "seeds": [0], "pattern": "*/base_models", "device": "cpu"}
    assert run_experiments("same_data", **options)
    assert main(["run", "same_data", "--profile", "tiny", "--seeds", "0", "--cells", "*/ensemble",
                 "--device", "cpu", "--quiet"]) == 0  # fmt: skip
    assert not list(Path("zoo").glob("*.safetensors"))


def test_the_time_left_counts_no_training_of_a_published_model(
    published: Folders, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 1)
    run_experiments("same_data", seeds=[0], pattern="*/ensemble", **published.options)
    records = Records(published.results)
    (one,) = records.whole("tiny", "same_data")
    bases = {name: base | {"seconds": 1000.0} for name, base in one.provenance.base_models.items()}
    origin = one.provenance.model_dump() | {"seconds": 5.0, "base_models": bases}
    (cell,) = (c for c in cells("same_data", "tiny", [0]) if c.name == "ensemble")
    records.write(cell, Outcome(one.rows, {}, {}), origin)
    others = {"pattern": "*/seed[01]/base_models", **published.options}
    (left,) = status_of("same_data", seeds=[0], **others)
    assert left.seconds == 5
    (left,) = status_of("same_data", seeds=[1], **others)
    assert left.seconds == 5 + 2 * 1000


def test_nothing_is_missed_where_no_folder_of_models_is(made: Folders, tmp_path: Path) -> None:
    options = made.options | {"results": tmp_path / "results", "models": tmp_path / "none"}
    assert run_experiments("same_data", seeds=[0], pattern="*/ensemble", **options)
    assert main(["models", "--profile", "tiny", "--models", str(tmp_path / "none")]) == 0


# Repeating a merge


def test_a_chapter_whose_experiment_a_profile_does_not_have_runs_the_demonstration() -> None:
    assert from_notebook({"profile": "short"}, "same_data").profile == "short"
    with pytest.warns(UserWarning, match="profile 'short' has no 'cost': 'digits' is run instead"):
        found = from_notebook({"profile": "short", "seeds": (1,)}, "cost")
    assert (found.profile, found.seeds) == ("digits", (1,))


def test_a_notebook_s_parameters_name_the_published_models_and_only_a_chapter_repeats_a_merge(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("NPMERGE_MODELS", raising=False)
    assert from_notebook({"models": None}).models == "../models"
    monkeypatch.setenv("NPMERGE_MODELS", "elsewhere")
    found = from_notebook({"live": True, "models": None})
    assert (found.models, found.live) == ("elsewhere", True)
    known = inspect.signature(run_experiments).parameters
    assert found.model_dump().keys() <= known.keys()  # as chapters hand them over


def test_a_merge_is_repeated_from_published_models_beside_its_record(
    published: Folders, made: Folders
) -> None:
    options = {"profile": "tiny", "device": "cpu"}
    found = repeat_merge(published.models, results=made.results, **options)
    assert list(found.index) == ["Permute", "NP-P"]
    assert found.index.name == "digits-vgg11x0.0625, seed 0"
    assert list(found["accuracy"]) == list(found["in the record"])
    records = {
        record.cell.name: record for record in Records(made.results).read("tiny", "same_data")
    }
    top1 = [row.value for name in MERGES for row in records[name].rows if row.metric == "top1"]
    assert list(found["accuracy"]) == [f"{value:.2f}" for value in top1]
    assert not published.zoo.exists()
    assert not published.results.exists()


def test_a_record_of_other_base_models_is_not_shown_beside_a_repeated_merge(
    published: Folders, made: Folders, tmp_path: Path
) -> None:
    shutil.copytree(made.results, tmp_path / "others")
    records = Records(tmp_path / "others")
    for record in records.read("tiny", "same_data"):
        cell = next(c for c in cells("same_data", "tiny", [0]) if c.name == record.cell.name)
        origin = record.provenance.model_dump()
        for base in origin["base_models"].values():
            base["digest"] = "0" * 64
        records.write(cell, Outcome(record.rows, {}, {}), origin)
    found = repeat_merge(published.models, results=records.folder, profile="tiny", device="cpu")
    assert set(found["in the record"]) == {"\N{EN DASH}"}


def test_a_merge_is_not_repeated_without_a_published_pair_or_without_the_images(
    published: Folders, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    published.published()[0].unlink()
    with pytest.raises(
        FileNotFoundError, match=r"no pair .* `npmerge models same_data --profile tiny --publish`"
    ):
        repeat_merge(published.models, profile="tiny", device="cpu")
    monkeypatch.setattr("npmerge.report.repeat.Zoo.copies", lambda *_: {Path("x"): {}})
    monkeypatch.setenv("NPMERGE_DATA", str(tmp_path / "none"))
    with pytest.raises(DataError, match="cifar100 is not in"):
        repeat_merge(published.models, device="cpu")
