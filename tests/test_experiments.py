"""Experiments: units are pure functions of their configuration, whatever kills, doubles or damages a run."""

from __future__ import annotations

import json
import logging
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from pydantic import ValidationError
from tiny import PROFILE

from npmerge import experiments
from npmerge.data.datasets import DataError
from npmerge.experiments import EXPERIMENTS, PROFILES, load_profile, pick_device, run, units
from npmerge.experiments.profile import Profile
from npmerge.paper import METHODS
from npmerge.results import COLUMNS, Outcome, Results, Unit
from npmerge.zoo import Zoo

SCRIPT = """
import sys
sys.path.insert(0, sys.argv[1])
from tiny import PROFILE
from npmerge import experiments
experiments.load_profile = lambda name: PROFILE
experiments.run("same_data", profile="tiny", seeds=[0], device="cpu", results=sys.argv[2], zoo=sys.argv[3])
"""


@dataclass(frozen=True)
class Folders:
    results: Path
    zoo: Path

    @classmethod
    def below(cls, folder: Path) -> Folders:
        return cls(folder / "results", folder / "zoo")

    @property
    def record(self) -> Path:
        return self.results / "tiny" / "same_data" / "digits-vgg11x0.0625-seed0.json"

    def files(self) -> list[Path]:
        return sorted(p for top in (self.results, self.zoo) for p in top.rglob("*") if p.is_file())

    def run(self, **options: Any) -> list[Path]:
        where: dict[str, Any] = {"results": self.results, "zoo": self.zoo, "device": "cpu"}
        return run("same_data", **({"profile": "tiny", "seeds": [0]} | where | options))

    def start(self) -> subprocess.Popen[str]:
        """Run the unit in another process."""
        here = str(Path(__file__).parent)
        command = [sys.executable, "-c", SCRIPT, here, str(self.results), str(self.zoo)]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def content(self) -> dict[str, Any]:
        """The record but for what may differ between runs: seconds and provenance."""
        content: dict[str, Any] = json.loads(self.record.read_text())
        del content["provenance"]
        assert content["details"].pop("seconds").keys() >= {"direct", "learning"}
        return content


@pytest.fixture(autouse=True)
def _tiny_profile(monkeypatch: pytest.MonkeyPatch) -> None:
    known = experiments.load_profile
    monkeypatch.setattr(
        experiments, "load_profile", lambda name: PROFILE if name == "tiny" else known(name)
    )


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    """The unit run once, without interruption; for reading only."""
    folders = Folders.below(tmp_path_factory.mktemp("undisturbed"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(experiments, "load_profile", lambda _: PROFILE)
        assert folders.run() == [folders.record]
    return folders


@pytest.fixture
def copied(undisturbed: Folders, tmp_path: Path) -> Folders:
    """The finished unit's files, to damage."""
    folders = Folders.below(tmp_path)
    for path in undisturbed.files():
        target = tmp_path / path.relative_to(undisturbed.zoo.parent)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(path.read_bytes())
    return folders


def test_a_unit_leaves_one_record_and_two_checkpoints_and_nothing_else(
    undisturbed: Folders,
) -> None:
    assert undisturbed.record in undisturbed.files()
    assert [path.suffix for path in undisturbed.files()] == [
        ".json",
        ".safetensors",
        ".safetensors",
    ]


def test_a_record_has_the_paper_s_columns_and_every_method_with_its_loss(
    undisturbed: Folders,
) -> None:
    rows = undisturbed.content()["records"]
    assert all(list(row) == COLUMNS for row in rows)
    found = [(row["method"], row["metric"]) for row in rows]
    many = {"merge_many", "tournament_permute", "tournament_weight_matching"}
    methods = {*METHODS, "base_avg_no_reset"} - many
    assert sorted(found) == sorted((m, k) for m in methods for k in ("top1", "loss"))
    assert all(0 <= row["value"] <= 100 for row in rows if row["metric"] == "top1")
    same = {"table": "I", "dataset": "digits", "model": "vgg11x0.0625", "setting": "same"}
    assert all(row.items() >= same.items() for row in rows)


def test_a_record_keeps_what_figures_need(undisturbed: Folders) -> None:
    details = undisturbed.content()["details"]
    assert set(details["paths"]) == {"direct", "permute", "weight_matching"}
    assert [point["alpha"] for point in details["paths"]["direct"]] == [0, 1]
    assert details["ridge"]["chosen"] == 0.1
    tuned = details["tuned_lr"]["finetune_tuned_permute"]
    assert tuned["chosen"] == 1e-3
    histograms = details["alpha"]["np_permute"]
    base = next(undisturbed.zoo.iterdir())
    size = {name: tensor.numel() for name, tensor in load_tensors(base).items()}
    assert {name: sum(counts) for name, counts in histograms.items()} == {
        name: size[name] for name in histograms
    }
    assert len(details["histories"]["np_permute"]) == 1


def load_tensors(path: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(path)


def test_the_ends_of_every_path_are_the_base_models(undisturbed: Folders) -> None:
    """An alignment keeps the function, so each path starts and ends at the base models' loss."""
    content = undisturbed.content()
    (base,) = [
        row["value"] for row in content["records"]
        if (row["method"], row["metric"]) == ("base_avg", "loss")
    ]  # fmt: skip
    for points in content["details"]["paths"].values():
        assert (points[0]["loss"] + points[-1]["loss"]) / 2 == pytest.approx(base, rel=1e-4)


def no_unit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "npmerge.experiments.same_data.run", lambda *_, **__: pytest.fail("ran again")
    )


def test_a_finished_unit_is_not_run_again_unless_asked_for(
    copied: Folders, undisturbed: Folders, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        no_unit(patch)
        assert copied.run() == [copied.record]
    before = copied.record.read_text()
    copied.record.write_text(before.replace('"top1"', '"edited"'))
    monkeypatch.setattr(
        "npmerge.zoo.fit_together", lambda *_, **__: pytest.fail("trained a base model")
    )
    copied.run(recompute=True)
    assert copied.content() == undisturbed.content()


def test_models_trained_at_once_give_the_record_that_models_trained_in_turn_give(
    tmp_path: Path, undisturbed: Folders
) -> None:
    together = Folders.below(tmp_path)
    together.run(at_once=4)
    assert together.content() == undisturbed.content()
    assert [p.name for p in together.files()] == [p.name for p in undisturbed.files()]


def test_a_deterministic_run_says_so_in_its_record(tmp_path: Path, undisturbed: Folders) -> None:
    strict = Folders.below(tmp_path)
    strict.run(deterministic=True)
    assert strict.content() == undisturbed.content()
    origins = [json.loads(f.record.read_text())["provenance"] for f in (strict, undisturbed)]
    assert [origin["deterministic"] for origin in origins] == [True, False]


@pytest.mark.parametrize("at_once", [None, 3])
def test_a_dry_run_goes_through_every_unit_and_keeps_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at_once: int | None
) -> None:
    seen = []
    real = experiments.same_data.run

    def spy(unit: Any, **options: Any) -> Any:
        seen.append(unit.config)
        return real(unit, **options)

    monkeypatch.setattr(experiments.same_data, "run", spy)
    folders = Folders.below(tmp_path)
    assert folders.run(dry_run=True, seeds=[0, 1], at_once=at_once) == []
    assert folders.files() == []
    assert [config["setting"]["images"] for config in seen] == [400, 400]
    assert {config["setting"]["recipe"]["epochs"] for config in seen} == {1}


@pytest.mark.cifar
def test_the_paper_scale_command_runs_with_one_epoch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its networks, images, methods and grids; batches of 20, so that a CPU is done in a minute."""
    real = experiments._shortened

    def smaller(config: dict[str, Any]) -> dict[str, Any]:
        config = json.loads(json.dumps(config))
        config["setting"]["recipe"]["batch_size"] = config["optimisation"]["batch_size"] = 20
        return real(config)

    monkeypatch.setattr(experiments, "_shortened", smaller)
    assert run("same_data", profile="paper", seeds=[0], dry_run=True, device="cpu") == []


def test_a_unit_killed_half_way_and_resumed_gives_the_record_it_would_have_given(
    tmp_path: Path, undisturbed: Folders
) -> None:
    folders = Folders.below(tmp_path)
    process = folders.start()
    while not list(folders.zoo.glob("*.safetensors")):
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.002)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert not folders.record.exists()  # it was killed half-way
    assert list(folders.zoo.glob("*.safetensors"))
    folders.run()
    assert folders.content() == undisturbed.content()


def test_two_processes_on_one_folder_corrupt_nothing(tmp_path: Path, undisturbed: Folders) -> None:
    folders = Folders.below(tmp_path)
    processes = [folders.start() for _ in range(2)]
    for process in processes:
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors
        assert "damaged" not in errors
    assert folders.content() == undisturbed.content()
    names = [path.name for path in undisturbed.files()]
    assert [path.name for path in folders.files()] == names  # no temporary file is left
    for mine, other in zip(folders.files()[1:], undisturbed.files()[1:], strict=True):
        assert mine.read_bytes() == other.read_bytes()


DAMAGE: dict[str, tuple[Callable[[str], str], str]] = {
    "truncated": (lambda text: text[: len(text) // 2], "is damaged: making it again"),
    "stale": (
        lambda text: text.replace('"config_hash": "', '"config_hash": "x'),
        "was made under another configuration: making it again",
    ),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_truncated_or_stale_record_is_named_and_made_again(
    kind: str, copied: Folders, undisturbed: Folders, caplog: pytest.LogCaptureFixture
) -> None:
    change, message = DAMAGE[kind]
    copied.record.write_text(change(copied.record.read_text()))
    with caplog.at_level(logging.WARNING, logger="npmerge"):
        copied.run()
    assert f"{copied.record} {message}" in caplog.messages
    assert copied.content() == undisturbed.content()


def test_a_damaged_checkpoint_in_a_run_is_named_and_made_again(
    copied: Folders, undisturbed: Folders, caplog: pytest.LogCaptureFixture
) -> None:
    checkpoint = next(copied.zoo.iterdir())
    whole = checkpoint.read_bytes()
    checkpoint.write_bytes(whole[:500])
    copied.record.unlink()
    with caplog.at_level(logging.WARNING, logger="npmerge"):
        copied.run()
    assert any(f"{checkpoint} is damaged" in message for message in caplog.messages)
    assert checkpoint.read_bytes() == whole
    assert copied.content() == undisturbed.content()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"profile": "huge"}, "unknown profile 'huge': choose one of digits, lite, paper"),
        ({"seeds": [0, 1, 0]}, "seed 0 is given twice: give each seed once"),
        ({"seeds": []}, r"seeds are \[\]: give at least one"),
        ({"seeds": [-1]}, r"seeds are \[-1\]: .* none below 0"),
        ({"device": "abacus"}, "device 'abacus' is not here .*: use 'auto' or 'cpu'"),
        ({"device": "cuda:99"}, "device 'cuda:99' is not here"),
    ],
)
def test_bad_input_is_one_line_and_changes_nothing_on_disk(
    options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        Folders.below(tmp_path).run(**options)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_experiment_is_named_with_those_there_are() -> None:
    with pytest.raises(ValueError, match="unknown experiment 'magic': choose one of same_data"):
        units("magic", "digits", [0])


def test_units_are_every_setting_with_every_seed_and_their_hash_follows_the_configuration() -> None:
    found = units("same_data", "paper", [0, 1])
    assert [unit.name for unit in found] == [
        "paper/same_data/cifar10-vgg11x1-seed0",
        "paper/same_data/cifar10-vgg11x1-seed1",
        "paper/same_data/cifar100-resnet20x1-seed0",
        "paper/same_data/cifar100-resnet20x1-seed1",
    ]
    assert len({unit.config_hash for unit in found}) == 4
    assert found == units("same_data", "paper", [0, 1])


def test_base_models_of_all_seeds_are_different_models() -> None:
    from npmerge.experiments.same_data import base_models

    todo = units("same_data", "tiny", range(12))
    addresses = [base.address for unit in todo for base in base_models(unit)]
    assert len(set(addresses)) == 24


@pytest.mark.parametrize("name", PROFILES)
def test_profiles_load(name: str) -> None:
    profile = load_profile(name)
    assert profile.name == name
    assert profile.same_data.settings


def test_the_paper_profile_is_the_protocol() -> None:
    vgg, resnet = load_profile("paper").same_data.settings
    assert [setting.recipe.lr for setting in (vgg, resnet)] == [0.08, 0.5]
    for setting in (vgg, resnet):
        assert (setting.image_size, setting.width) == (32, 1)
        recipe = setting.recipe
        assert (recipe.epochs, recipe.batch_size, recipe.warmup_epochs) == (200, 500, 5)
        assert (recipe.momentum, recipe.weight_decay) == (0.9, 5e-4)
    options = load_profile("paper").same_data.optimisation
    assert (options.epochs, options.lr, options.batch_size) == (10, 0.01, 500)


def test_a_profile_with_an_unknown_parameter_or_a_wrong_value_is_refused_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "profiles").mkdir()
    file = tmp_path / "profiles" / "digits.yaml"
    values = PROFILE.model_dump(mode="json", exclude={"name"})
    monkeypatch.setattr("npmerge.experiments.profile.files", lambda _: tmp_path)
    file.write_text(yaml.safe_dump(values))
    assert load_profile("digits").same_data == PROFILE.same_data
    for key, value, message in (
        ("colour", 1, r"same_data.optimisation.colour: Extra inputs are not permitted"),
        ("epochs", "many", r"same_data.optimisation.epochs: Input should be a valid integer"),
    ):
        changed = json.loads(json.dumps(values))
        changed["same_data"]["optimisation"][key] = value
        file.write_text(yaml.safe_dump(changed))
        with pytest.raises(ValueError, match=f"profile 'digits', {message}") as caught:
            load_profile("digits")
        assert "\n" not in str(caught.value)


def test_a_profile_is_not_changed() -> None:
    profile: Any = PROFILE
    with pytest.raises(ValidationError, match="frozen"):
        profile.title = "another"
    assert Profile.model_validate(PROFILE.model_dump()) == PROFILE


def test_auto_takes_a_gpu_if_there_is_one() -> None:
    assert pick_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")


def test_records_can_be_read_back_as_the_units_that_made_them(undisturbed: Folders) -> None:
    todo = units("same_data", "tiny", [0])
    (content,) = Results(undisturbed.results).read("tiny", "same_data", todo)
    assert content["config_hash"] == todo[0].config_hash
    assert Zoo(undisturbed.zoo).folder.is_dir()


def test_units_side_by_side_give_the_records_they_give_one_by_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fixed = PROFILE.model_copy(update={"threads": 1})
    monkeypatch.setattr(experiments, "load_profile", lambda name: fixed)  # noqa: ARG005
    found = []
    for cores in (1, 2):
        monkeypatch.setattr("os.cpu_count", lambda cores=cores: cores)
        paths = Folders.below(tmp_path / str(cores)).run(seeds=[0, 1])
        found.append([json.loads(path.read_text()) for path in paths])
    alone, beside = found
    trained = [content["provenance"]["base_models"]["trained"] for content in alone + beside]
    assert trained == [2, 2, 2, 2]
    assert [content["records"] for content in alone] == [content["records"] for content in beside]
    assert {content["provenance"]["threads"] for content in alone + beside} == {1}


def test_a_unit_that_fails_beside_others_is_an_error_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fixed = PROFILE.model_copy(update={"threads": 1})
    monkeypatch.setattr(experiments, "load_profile", lambda name: fixed)  # noqa: ARG005
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    folders = Folders.below(tmp_path)
    folders.zoo.write_text("not a folder")
    with pytest.raises(OSError, match="zoo"):
        folders.run(seeds=[0, 1])
    assert not folders.results.exists()


@pytest.fixture
def instant(monkeypatch: pytest.MonkeyPatch) -> list[Unit]:
    """Units and base models take no time and give no number; the list is of the units that ran."""
    ran: list[Unit] = []

    def run(unit: Unit, **_: Any) -> Outcome:
        ran.append(unit)
        return Outcome([], {})

    for module in EXPERIMENTS.values():
        monkeypatch.setattr(module, "run", run)
    monkeypatch.setattr(Zoo, "get_all", lambda *_, **__: [])
    return ran


def with_units() -> list[str]:
    """The experiments that the tiny profile has."""
    return [name for name in EXPERIMENTS if units(name, "tiny", [0])]


def everything(folders: Folders, **options: Any) -> list[Path]:
    where = {"results": folders.results, "zoo": folders.zoo, "device": "cpu"}
    return run("ALL", **({"profile": "tiny", "seeds": [0, 1]} | where | options))


def test_all_runs_every_experiment_seed_by_seed_and_leaves_nothing_but_records(
    tmp_path: Path, instant: list[Unit]
) -> None:
    folders = Folders.below(tmp_path)
    paths = everything(folders)
    assert sorted(paths) == folders.files()
    assert len(instant) == len(paths) == len(units("ALL", "tiny", [0, 1]))
    assert [unit.seed for unit in instant] == sorted(unit.seed for unit in instant)
    first = [unit.experiment for unit in instant if unit.seed == 0]
    assert list(dict.fromkeys(first)) == with_units()
    assert everything(folders) == paths
    assert len(instant) == len(paths)  # nothing ran again


def test_several_experiments_run_as_named_and_each_once(
    tmp_path: Path, instant: list[Unit]
) -> None:
    where: dict[str, Any] = {"results": tmp_path / "results", "zoo": tmp_path / "zoo"}
    where |= {"device": "cpu", "profile": "tiny", "seeds": [0]}
    names = ["data_size", "same_data", "data_size"]
    run(names, pattern="*[!5]-seed?", **where)
    found = [unit.setting for unit in instant if unit.experiment == "data_size"]
    assert [setting.rpartition("-")[2] for setting in found] == ["all", "1"]
    run(names, **where)
    assert [unit.experiment for unit in instant] == ["data_size"] * 2 + ["data_size", "same_data"]
    with pytest.raises(ValueError, match="no unit matches 'x': there are data_size/"):
        run(names, pattern="x", **where)


def test_absent_data_stop_a_run_before_its_first_unit_unless_nobody_needs_them(
    tmp_path: Path, instant: list[Unit], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NPMERGE_DATA", str(tmp_path / "none"))
    folders = Folders.below(tmp_path)
    cifar = PROFILE.data_size.settings[0].model_copy(update={"dataset": "cifar100"})
    section = PROFILE.data_size.model_copy(update={"settings": (cifar,)})
    profile = PROFILE.model_copy(update={"data_size": section})
    monkeypatch.setattr(experiments, "load_profile", lambda _: profile)
    for options in ({}, {"dry_run": True}, {"pattern": "data_size/*"}):
        with pytest.raises(DataError, match="cifar100 is not in"):
            everything(folders, **options)
    assert instant == []
    assert folders.files() == []
    everything(folders, pattern="same_data/*")
    assert len(instant) == 2
    records = Results(folders.results)
    for unit in units("data_size", "tiny", [0]):
        records.write(unit, Outcome([], {}), {})
    everything(folders, seeds=[0], pattern="data_size/*")  # shows what is there, needs no data


def test_a_time_budget_leaves_what_would_not_fit_and_the_same_command_goes_on_from_there(
    tmp_path: Path, instant: list[Unit], caplog: pytest.LogCaptureFixture
) -> None:
    folders = Folders.below(tmp_path)
    (path,) = folders.run()
    content = json.loads(path.read_text())
    content["provenance"]["seconds"] = 1000
    path.write_text(json.dumps(content))
    assert folders.run(seeds=[0, 1, 2], time_budget=60) == [path]
    assert "2 of 2 units are left: they do not fit into the time budget" in caplog.messages
    assert "the same command goes on from there" in caplog.messages
    assert len(instant) == 1
    caplog.clear()
    assert len(folders.run(seeds=[0, 1, 2], time_budget=2000)) == 3
    assert len(instant) == 3
    assert not [message for message in caplog.messages if "left" in message]


def test_nothing_begins_once_the_budget_is_over(tmp_path: Path, instant: list[Unit]) -> None:
    folders = Folders.below(tmp_path)
    assert folders.run(time_budget=1e-9) == []
    assert instant == []
    assert folders.files() == []


def test_a_unit_shows_that_it_is_running_while_it_does_and_no_longer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders, seen = Folders.below(tmp_path), []
    (unit,) = units("same_data", "tiny", [0])
    records = Results(folders.results)

    def fail(unit: Unit, **_: Any) -> Outcome:
        seen.append(records.started(unit))
        assert records.read("tiny", "same_data") == []
        (one,) = experiments.status(
            "same_data", profile="tiny", seeds=[0, 1], results=folders.results, zoo=folders.zoo
        )
        assert one.units == {"running": 1, "missing": 1}
        raise RuntimeError("broken")

    monkeypatch.setattr(Zoo, "get_all", lambda *_, **__: [])
    monkeypatch.setattr(experiments.same_data, "run", fail)
    with pytest.raises(RuntimeError, match="broken"):
        folders.run()
    assert time.time() - 60 < seen[0] <= time.time()
    assert records.started(unit) is None
    assert folders.files() == []


LOCK = """
import sys, time
sys.path.insert(0, sys.argv[1])
from tiny import PROFILE
from npmerge.experiments import EXPERIMENTS
from npmerge.results import Results
(unit,) = EXPERIMENTS["same_data"].units(PROFILE, [0])
with Results(sys.argv[2]).running(unit):
    print("begun", flush=True)
    time.sleep(600)
"""


def test_a_unit_whose_process_was_killed_is_not_running_and_the_next_run_clears_up(
    tmp_path: Path, instant: list[Unit]
) -> None:
    folders = Folders.below(tmp_path)
    (unit,) = units("same_data", "tiny", [0])
    records = Results(folders.results)
    command = [sys.executable, "-c", LOCK, str(Path(__file__).parent), str(folders.results)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "begun\n"
            assert records.started(unit) is not None
            folders.run()  # another process may do the same: the sign of the first one stays
            assert records.started(unit) is not None
        finally:
            process.kill()
    assert records.started(unit) is None
    lock, record = folders.files()
    assert (lock.suffix, record) == (".running", folders.record)
    folders.run(recompute=True)
    assert folders.files() == [folders.record]


@pytest.mark.parametrize(
    ("changes", "running"),
    [
        ({}, True),
        ({"born": "another process of the same number"}, False),
        ({"host": "another", "born": "0"}, True),
        ({"host": "another", "start": 0.0}, False),
        ({"pid": "damaged"}, False),
    ],
)
def test_a_sign_is_believed_if_its_process_lives_or_may_live(
    tmp_path: Path, changes: dict[str, Any], running: bool
) -> None:
    (unit,) = units("same_data", "tiny", [0])
    records = Results(tmp_path)
    with records.running(unit):
        (lock,) = (path for path in tmp_path.rglob("*") if path.is_file())
        content = json.loads(lock.read_text())
        assert (content["host"], content["pid"]) == (platform.node(), os.getpid())
        lock.write_text(json.dumps(content | changes))
        assert (records.started(unit) is not None) == running
        lock.write_text("{")
        assert records.started(unit) is None


def test_status_counts_units_and_says_what_the_rest_takes(
    tmp_path: Path, instant: list[Unit]
) -> None:
    folders = Folders.below(tmp_path)
    options: dict[str, Any] = {"results": folders.results, "zoo": folders.zoo, "device": "cpu"}
    options |= {"profile": "tiny", "seeds": [0, 1, 2, 3]}
    assert [one.experiment for one in experiments.status("ALL", **options)] == with_units()
    (one,) = experiments.status("same_data", **options)
    assert (one.units, one.seconds) == ({"missing": 4}, None)
    damaged, stale, done = folders.run(seeds=[0, 1, 2])
    for path in (stale, done):
        content = json.loads(path.read_text())
        content["provenance"] |= {"seconds": 50, "base_models": {"trained": 2, "seconds": 8}}
        path.write_text(json.dumps(content))
    damaged.write_text("{")
    stale.write_text(stale.read_text().replace('"config_hash": "', '"config_hash": "x'))
    (one,) = experiments.status("same_data", **options)
    assert one.units == {"done": 1, "stale": 1, "damaged": 1, "missing": 1}
    assert one.seconds == 3 * (50 + 2 * 4)
    (one,) = experiments.status("same_data", pattern="*seed2", **options)
    assert (one.units, one.seconds) == ({"done": 1}, 0)
