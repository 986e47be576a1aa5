"""The engine: cells are functions of their configuration, whatever kills, doubles, damages or fails a run."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import reports
import tiny
import torch
from processes import alive, children, needs_proc, until
from safetensors.torch import load, load_file
from tiny import PROFILE, assert_same_state, tiny_profile

from npmerge.data import DataError
from npmerge.device import threads
from npmerge.experiments import EXPERIMENTS, cells
from npmerge.methods import Combination
from npmerge.run import engine
from npmerge.run.engine import CellsFailedError, run_experiments, status_of
from npmerge.run.work import Bench, base_models, load_images
from npmerge.run.workers import Here
from npmerge.store.files import canonical, config_hash, sha256
from npmerge.store.records import Cell, Outcome, Records
from npmerge.store.zoo import Zoo

FEW = "*/permute-*"
"""Four cells: a mean, NP Merge, fine-tuning and fine-tuning with a choice."""
RUN = """
import json, logging, sys
sys.path.insert(0, sys.argv[1])
import pytest
from tiny import tiny_profile
from npmerge.run.engine import run_experiments
from npmerge.store.records import Records

def told(self, cell, *rest, write=Records.write):
    print("writing", cell.label, flush=True)
    return write(self, cell, *rest)

logging.basicConfig(level=logging.INFO, format="%(message)s")
Records.write = told
tiny_profile(pytest.MonkeyPatch())
run_experiments("same_data", profile="tiny", seeds=[0], device="cpu", **json.loads(sys.argv[2]))
"""


@dataclass(frozen=True)
class Folders:
    """Records and base models of a run."""

    results: Path
    zoo: Path

    @classmethod
    def below(cls, folder: Path) -> Folders:
        return cls(folder / "results", folder / "zoo")

    @property
    def records(self) -> Records:
        return Records(self.results)

    def files(self) -> list[Path]:
        """All but the hidden folders of locks."""
        found = [p for top in (self.results, self.zoo) for p in top.rglob("*") if p.is_file()]
        return sorted(path for path in found if path.parent.name != ".locks")

    def models(self) -> list[Path]:
        return sorted(self.zoo.glob("*.safetensors"))

    def run(self, experiment: str = "same_data", **options: Any) -> list[Path]:
        where: dict[str, Any] = {"results": self.results, "zoo": self.zoo, "device": "cpu"}
        where |= {"profile": "tiny", "seeds": [0], "workers": 1}
        return run_experiments(experiment, **(where | options))

    def start(self, **options: Any) -> subprocess.Popen[str]:
        """Run some cells in another process; it tells when a record is about to be written."""
        where = {"results": str(self.results), "zoo": str(self.zoo), "workers": 1, "pattern": FEW}
        here = str(Path(__file__).parent)
        return subprocess.Popen(
            [sys.executable, "-c", RUN, here, json.dumps(where | options)],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip

    def states(self, experiment: str = "same_data") -> dict[str, str]:
        return {cell.name: self.records.state(cell) for cell in cells(experiment, "tiny", [0])}

    def path(self, name: str) -> Path:
        return self.records.path(cell_of(name))

    def content(self, name: str) -> dict[str, Any]:
        """A record but for what may differ between runs: seconds and where it comes from."""
        content: dict[str, Any] = json.loads(self.path(name).read_text())
        for key in ("provenance", "digest", "seconds"):
            del content[key]
        return content

    def origin(self, name: str) -> dict[str, Any]:
        origin: dict[str, Any] = json.loads(self.path(name).read_text())["provenance"]
        return origin


def cell_of(name: str) -> Cell:
    """A cell of the first experiment, by its own name."""
    (found,) = (cell for cell in cells("same_data", "tiny", [0]) if cell.name == name)
    return found


def few() -> list[str]:
    return [cell.name for cell in cells("same_data", "tiny", [0]) if "permute-" in cell.name]


@pytest.fixture(autouse=True)
def _tiny_profile(monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_profile(monkeypatch)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    """All cells of an experiment run once, one by one, without interruption; for reading only."""
    folders = Folders.below(tmp_path_factory.mktemp("undisturbed"))
    with pytest.MonkeyPatch.context() as patch:
        tiny_profile(patch)
        assert len(folders.run()) == 13
    return folders


@pytest.fixture
def copied(undisturbed: Folders, tmp_path: Path) -> Folders:
    """What was run, to damage."""
    folders = Folders.below(tmp_path)
    shutil.copytree(undisturbed.results, folders.results)
    shutil.copytree(undisturbed.zoo, folders.zoo)
    return folders


@pytest.fixture
def trained(undisturbed: Folders, tmp_path: Path) -> Folders:
    """Base models without records."""
    folders = Folders.below(tmp_path)
    shutil.copytree(undisturbed.zoo, folders.zoo)
    return folders


@pytest.fixture
def instant(monkeypatch: pytest.MonkeyPatch) -> list[Cell]:
    """Cells and base models take no time and give one number; the list is of the cells that ran."""
    ran: list[Cell] = []
    row = reports.record(Combination("ensemble"), {"top1": 50.0}).rows[0]

    def do(cell: Cell, _: Bench) -> Outcome:
        ran.append(cell)
        return Outcome([row], {}, {})

    monkeypatch.setattr(engine, "do_cell", do)
    for name, experiment in EXPERIMENTS.items():
        monkeypatch.setitem(EXPERIMENTS, name, replace(experiment, work=None))
    monkeypatch.setattr(Zoo, "ensure", lambda *_, **__: None)
    monkeypatch.setattr(Zoo, "provenance", lambda *_, **__: {})
    return ran


def with_section(
    patch: pytest.MonkeyPatch, *, settings: Any = None, **options: dict[str, Any]
) -> None:
    """Give the first experiment other options of methods, or other settings, from now on."""
    section = json.loads(json.dumps(PROFILE.sections["same_data"]))
    section["settings"] = settings or section["settings"]
    for method, values in options.items():
        section["optimisation"]["options"][method] |= values
    profile = PROFILE.model_copy(update={"sections": PROFILE.sections | {"same_data": section}})
    patch.setattr(tiny, "PROFILE", profile)


def no_cell(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "do_cell", lambda *_: pytest.fail("ran again"))


# What a run leaves


def test_a_run_leaves_a_record_a_cell_its_base_models_and_what_cells_share_and_nothing_else(
    undisturbed: Folders,
) -> None:
    todo = cells("same_data", "tiny", [0])
    records = {undisturbed.records.path(cell) for cell in todo}
    shared = set((undisturbed.zoo / "artifacts").glob("*.safetensors"))
    assert len(undisturbed.models()) == 2
    assert shared
    assert set(undisturbed.files()) == {*records, *undisturbed.models(), *shared}
    found = undisturbed.records.read("tiny", "same_data", todo)
    assert [record.config_hash for record in found] == [cell.config_hash for cell in todo]


def test_every_record_has_accuracy_and_loss_and_what_figures_need(undisturbed: Folders) -> None:
    for name in undisturbed.states():
        values = {row["metric"]: row["value"] for row in undisturbed.content(name)["rows"]}
        assert values.keys() - {"top5", "barrier"} == {"top1", "loss"}
        assert 0 <= values["top1"] <= 100
    details = {name: undisturbed.content(name)["details"] for name in undisturbed.states()}
    assert len(details["permute-np_merge"]["history"]) == 1
    assert details["cca-mean"]["chosen"]["ridge"]["chosen"] == 0.1
    assert details["permute-finetune-tuned"]["chosen"]["lr"]["chosen"] == 1e-3
    histograms = details["permute-np_merge"]["alpha"]
    sizes = {name: tensor.numel() for name, tensor in load_file(undisturbed.models()[0]).items()}
    assert {name: sum(counts) for name, counts in histograms.items()} == {
        name: sizes[name] for name in histograms
    }


def test_the_ends_of_every_path_are_the_base_models(undisturbed: Folders) -> None:
    """An alignment keeps the function, so each path starts and ends at the base models' loss."""
    rows = undisturbed.content("base_models")["rows"]
    (base,) = (row["value"] for row in rows if row["metric"] == "loss")
    for align in ("identity", "permute", "weight_matching"):
        points = undisturbed.content(f"{align}-mean")["details"]["path"]
        assert [point["alpha"] for point in points] == [0, 1]
        assert (points[0]["loss"] + points[-1]["loss"]) / 2 == pytest.approx(base, rel=1e-4)


def test_a_base_model_has_the_same_bits_from_a_notebook_on_all_threads_as_from_a_run(
    undisturbed: Folders, tmp_path: Path
) -> None:
    cell, before = cell_of("base_models"), torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        for base in base_models(cell):
            zoo = Zoo(tmp_path)
            model = zoo.load(base, load_images(cell.config["setting"]))
            assert_same_state(model.state_dict(), load_file(undisturbed.zoo / zoo.path(base).name))
        assert torch.get_num_threads() == 4
    finally:
        torch.set_num_threads(before)


# Once, and the same again


def test_finished_cells_are_not_run_again_unless_asked_for(
    copied: Folders, undisturbed: Folders, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        no_cell(patch)
        assert len(copied.run()) == 13
    before = copied.path("permute-mean").read_bytes()
    models = {path: path.read_bytes() for path in copied.models()}
    copied.run(recompute=True, pattern=FEW)
    assert copied.path("permute-mean").read_bytes() != before  # it says when it was made
    assert {path: path.read_bytes() for path in copied.models()} == models
    for name in few():
        assert copied.content(name) == undisturbed.content(name)


def test_recompute_from_nothing_gives_the_same_numbers_and_a_deterministic_run_says_so(
    tmp_path: Path, undisturbed: Folders
) -> None:
    strict = Folders.below(tmp_path)
    strict.run(deterministic=True, pattern="*/permute-np_merge")
    assert strict.content("permute-np_merge") == undisturbed.content("permute-np_merge")
    said = [f.origin("permute-np_merge")["deterministic"] for f in (strict, undisturbed)]
    assert said == [True, False]


def test_cells_side_by_side_give_the_records_they_give_one_by_one(
    tmp_path: Path, undisturbed: Folders
) -> None:
    beside = Folders.below(tmp_path)
    paths = beside.run(workers=2, pattern=FEW)
    assert [path.stem for path in paths] == few()
    for name in few():
        assert beside.content(name) == undisturbed.content(name)
        assert beside.origin(name)["threads"] == undisturbed.origin(name)["threads"] == 1


def test_two_processes_on_one_folder_train_and_run_everything_once_and_corrupt_nothing(
    tmp_path: Path, undisturbed: Folders
) -> None:
    folders = Folders.below(tmp_path)
    processes = [folders.start() for _ in range(2)]
    said = [process.communicate(timeout=300)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], "\n".join(said)
    lines = [line for text in said for line in text.splitlines()]
    assert "damaged" not in "\n".join(lines)
    written = [line for line in lines if line.startswith("writing ")]
    assert sorted(written) == sorted(f"writing {cell_of(name).label}" for name in few())
    trained = [line for line in lines if line.startswith("training ")]
    assert len(trained) == len(set(trained)) == 2
    for name in few():
        assert folders.content(name) == undisturbed.content(name)
    kinds = Counter(path.suffix for path in folders.files())
    assert kinds.keys() == {".json", ".safetensors"}  # no temporary file is left


def test_base_models_are_trained_as_the_profile_says_how_many_cells_run_side_by_side(
    tmp_path: Path, instant: list[Cell], monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[int] = []

    def here(workers: int) -> Here:
        found.append(workers)
        return Here()

    monkeypatch.setattr(engine, "executor", here)
    monkeypatch.setattr("os.cpu_count", lambda: 4)
    for number, options in enumerate(({}, {"workers": 3}, {"pattern": "*/ensemble"})):
        Folders.below(tmp_path / str(number)).run(**{"workers": None, **options})
    assert found == [4, 3, 1]  # the profile has one thread; never more than there are cells


# What kills a run


def test_a_killed_run_resumed_gives_the_records_it_would_have_given(
    tmp_path: Path, undisturbed: Folders
) -> None:
    folders = Folders.below(tmp_path)
    with folders.start() as process:
        assert process.stdout is not None
        begun = (line for line in process.stdout if line.startswith("writing "))
        next(begun)
        next(begun)  # the first one is whole
        process.kill()
    assert process.returncode == -signal.SIGKILL
    states = [folders.states()[name] for name in few()]
    assert states.count("done") in (1, 2)
    assert set(states) == {"done", "missing"}
    models = {path: path.read_bytes() for path in folders.models()}
    folders.run(pattern=FEW)
    for name in few():
        assert folders.content(name) == undisturbed.content(name)
    assert {path: path.read_bytes() for path in folders.models()} == models


@needs_proc
def test_an_interrupt_ends_the_workers_at_once_and_no_cell_has_failed(trained: Folders) -> None:
    with trained.start(workers=2) as process:
        until(lambda: "running" in trained.states().values())
        workers = children(process.pid)
        assert len(workers) >= 2
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=20) == -signal.SIGINT
    until(lambda: not any(map(alive, workers)), seconds=10)
    assert set(trained.states().values()) <= {"missing", "done"}


def test_a_worker_that_is_killed_costs_its_cell_and_nothing_else(
    trained: Folders, undisturbed: Folders, caplog: pytest.LogCaptureFixture
) -> None:
    def kill_one() -> None:
        until(lambda: "running" in trained.states().values())
        pid = multiprocessing.active_children()[0].pid
        assert pid is not None
        os.kill(pid, signal.SIGKILL)

    killer = threading.Thread(target=kill_one)
    killer.start()
    with pytest.raises(CellsFailedError, match="1 cells failed, the others are done") as caught:
        trained.run(workers=2, pattern=FEW)
    killer.join()
    ((label, reason),) = caught.value.failed.items()
    assert reason == "its process was killed (for want of memory, or by somebody)"
    assert f"{label} failed: {reason}" in caplog.messages
    lost = label.rpartition("/")[2]
    states = trained.states()
    assert {name: states[name] for name in few()} == {
        name: "failed" if name == lost else "done" for name in few()
    }
    trained.run(pattern=FEW)
    for name in few():
        assert trained.content(name) == undisturbed.content(name)
    assert multiprocessing.active_children() == []


# What damages a run


def change_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def make_stale(path: Path) -> None:
    content = json.loads(path.read_text())
    del content["digest"]
    content["config"]["seed"] = 7
    content["config_hash"] = config_hash(content["config"])
    path.write_text(json.dumps(content | {"digest": sha256([canonical(content)])}))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:500]), "is damaged: making it again"),
        (change_byte, "is damaged: making it again"),
        (make_stale, "was made under another configuration: making it again"),
    ],
)
def test_a_truncated_changed_or_stale_record_is_named_and_made_again(
    damage: Callable[[Path], Any],
    message: str,
    copied: Folders,
    undisturbed: Folders,
    caplog: pytest.LogCaptureFixture,
) -> None:
    path = copied.path("permute-np_merge")
    damage(path)
    others = {p: p.read_bytes() for p in copied.files() if p != path}
    copied.run()
    assert f"{path} {message}" in caplog.messages
    assert copied.content("permute-np_merge") == undisturbed.content("permute-np_merge")
    assert {p: p.read_bytes() for p in copied.files() if p != path} == others


def swap(path: Path) -> None:
    other = next(file for file in path.parent.glob("*.safetensors") if file != path)
    path.write_bytes(other.read_bytes())


@pytest.mark.parametrize("where", ["*.safetensors", "artifacts/alignment-*.safetensors"])
@pytest.mark.parametrize(
    "damage", [lambda path: path.write_bytes(path.read_bytes()[:500]), change_byte, swap]
)
def test_a_truncated_changed_or_foreign_model_or_alignment_is_named_and_made_again(
    damage: Callable[[Path], Any],
    where: str,
    copied: Folders,
    undisturbed: Folders,
    caplog: pytest.LogCaptureFixture,
) -> None:
    paths = sorted(copied.zoo.glob(where))
    before = {path: load(path.read_bytes()) for path in paths}  # not mapped: the file is damaged
    for path in paths[:1] if damage is swap and where == "*.safetensors" else paths:
        damage(path)
    copied.path("permute-mean").unlink()
    copied.run()
    named = {path for path in paths if any(f"{path} is damaged" in m for m in caplog.messages)}
    assert named  # of the alignments only the one that was needed
    for path in named:
        assert_same_state(load_file(path), before[path])
    assert copied.content("permute-mean") == undisturbed.content("permute-mean")


# What fails


def test_a_cell_that_diverges_is_noted_with_its_reason_and_the_others_go_on(
    trained: Folders, undisturbed: Folders, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_section(monkeypatch, finetune={"lr": 1e30})
    label = cell_of("permute-finetune").label
    for _ in range(2):  # what failed is tried again
        with pytest.raises(CellsFailedError) as caught:
            trained.run(pattern=FEW)
        assert list(caught.value.failed) == [label]
        assert f"\n  {label}: TrainingError: the loss is nan" in str(caught.value)
    states = trained.states()
    assert {name: states[name] for name in few()} == {
        name: "failed" if name == "permute-finetune" else "done" for name in few()
    }
    (one,) = status_of(
        "same_data", profile="tiny", seeds=[0], pattern=FEW, device="cpu",
        results=trained.results, zoo=trained.zoo,
    )  # fmt: skip
    assert one.cells == {"done": 3, "failed": 1}
    assert one.failed == caught.value.failed
    monkeypatch.setattr(tiny, "PROFILE", PROFILE)  # mended
    assert trained.states()["permute-finetune"] == "missing"
    done = trained.path("permute-np_merge").read_bytes()
    trained.run(pattern=FEW)
    assert trained.content("permute-finetune") == undisturbed.content("permute-finetune")
    assert trained.path("permute-np_merge").read_bytes() == done
    assert not list(trained.results.rglob("*.failed*"))


def test_a_base_model_that_diverges_fails_only_the_cells_that_need_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders = Folders.below(tmp_path)
    wild = tiny.SETTING | {
        "width": 0.125, "recipe": {"epochs": 1, "batch_size": 200, "lr": 1e30},
    }  # fmt: skip
    with_section(monkeypatch, settings=[wild, tiny.SETTING])
    with pytest.raises(CellsFailedError) as caught:
        folders.run(pattern="*/[ip]*-mean")
    lost = [f"same_data/digits-vgg11x0.125/seed0/{align}-mean" for align in ("identity", "permute")]
    assert list(caught.value.failed) == lost
    for reason in caught.value.failed.values():
        assert reason.startswith("base model digits-vgg11x0.125-seed")
        assert "could not be trained: TrainingError" in reason
    done = [path.parts[-3] for path in folders.results.rglob("*-mean.json")]
    assert done == ["digits-vgg11x0.0625"] * 2


def test_an_interrupted_cell_has_not_failed(
    tmp_path: Path, instant: list[Cell], monkeypatch: pytest.MonkeyPatch
) -> None:
    folders = Folders.below(tmp_path)

    def interrupt(*_: Any) -> Outcome:
        raise KeyboardInterrupt

    monkeypatch.setattr(engine, "do_cell", interrupt)
    with pytest.raises(KeyboardInterrupt):
        folders.run(pattern=FEW)
    assert folders.files() == []
    assert set(folders.states().values()) == {"missing"}


def test_a_cell_is_running_while_it_runs_and_no_longer(
    tmp_path: Path, instant: list[Cell], monkeypatch: pytest.MonkeyPatch
) -> None:
    folders, seen = Folders.below(tmp_path), []

    def look(cell: Cell, _: Bench) -> Outcome:
        seen.append(folders.records.state(cell))
        raise RuntimeError("broken\nin many lines")

    monkeypatch.setattr(engine, "do_cell", look)
    with pytest.raises(CellsFailedError, match=r"RuntimeError: broken$"):
        folders.run(pattern="*/ensemble")
    assert seen == ["running"]
    assert folders.states()["ensemble"] == "failed"


def test_what_fails_in_a_later_run_does_not_undo_a_record(
    copied: Folders, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> Outcome:
        raise RuntimeError("broken")

    before = copied.path("ensemble").read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(engine, "do_cell", fail)
        with pytest.raises(CellsFailedError):
            copied.run(recompute=True, pattern="*/ensemble")
    assert copied.path("ensemble").read_bytes() == before
    (one,) = status_of(
        "same_data", profile="tiny", seeds=[0], device="cpu",
        results=copied.results, zoo=copied.zoo,
    )  # fmt: skip
    assert (one.cells, one.failed, one.seconds) == ({"done": 13}, {}, 0)


# Order, budget, rehearsal


def test_all_runs_every_experiment_seed_by_seed(tmp_path: Path, instant: list[Cell]) -> None:
    folders = Folders.below(tmp_path)
    paths = folders.run("ALL", seeds=[0, 1])
    timed = [cell for cell in instant if EXPERIMENTS[cell.experiment].alone]
    others = [cell for cell in instant if cell not in timed]
    assert instant == others + timed
    assert [cell.seed for cell in others] == sorted(cell.seed for cell in others)
    first = [cell.experiment for cell in instant if cell.seed == 0]
    assert list(dict.fromkeys(first)) == [name for name in EXPERIMENTS if name in PROFILE.sections]
    assert {folders.records.path(cell) for cell in instant} == set(paths) == set(folders.files())
    assert len(paths) == len(instant)
    assert folders.run("ALL", seeds=[0, 1]) == paths
    assert len(instant) == len(paths)  # nothing ran again


def test_a_dry_run_goes_through_every_cell_and_keeps_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[dict[str, Any]] = []
    real = engine.do_cell

    def spy(cell: Cell, bench: Bench) -> Outcome:
        seen.append(cell.config)
        return real(cell, bench)

    monkeypatch.setattr(engine, "do_cell", spy)
    with_section(monkeypatch, np_merge={"epochs": 5})
    folders = Folders.below(tmp_path)
    assert folders.run(dry_run=True, pattern=FEW) == []
    assert list(tmp_path.iterdir()) == []
    assert len(seen) == 4
    assert {config["setting"]["images"] for config in seen} == {400}
    assert {config["setting"]["recipe"]["epochs"] for config in seen} == {1}
    assert {c["aggregate"]["options"].get("epochs", 1) for c in seen} == {1}


@pytest.mark.cifar
def test_the_paper_scale_command_runs_with_one_epoch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its networks, images, methods and grids; batches of 20 and one thread, so that a CPU is done in a minute."""
    real = engine._shortened

    def smaller(config: dict[str, Any]) -> dict[str, Any]:
        config = json.loads(json.dumps(config))
        config["setting"]["recipe"]["batch_size"] = config["data"]["batch_size"] = 20
        config["threads"] = 1
        return real(config)

    monkeypatch.setattr(engine, "_shortened", smaller)
    monkeypatch.setattr(engine, "threads", lambda _wanted: threads(1))
    assert (
        run_experiments("same_data", profile="paper", seeds=[0], dry_run=True, device="cpu") == []
    )


def test_a_time_budget_leaves_what_would_not_fit_and_the_same_command_goes_on_from_there(
    tmp_path: Path, instant: list[Cell], caplog: pytest.LogCaptureFixture
) -> None:
    folders = Folders.below(tmp_path)
    options: dict[str, Any] = {"pattern": "*/ensemble"}
    (path,) = folders.run(**options)
    (record,) = folders.records.whole("tiny", "same_data")
    origin = record.provenance.model_dump() | {"seconds": 1000.0}
    folders.records.write(instant[0], Outcome(record.rows, {}, {}), origin)
    options |= {"seeds": [0, 1, 2]}
    assert folders.run(**options, time_budget=60) == [path]
    text = "2 of 2 cells are left: they do not fit into the time budget; the same command goes on from there"
    assert text in caplog.messages
    assert len(instant) == 1
    caplog.clear()
    assert len(folders.run(**options, time_budget=2000)) == 3
    assert len(instant) == 3
    assert not [message for message in caplog.messages if "left" in message]


def test_nothing_begins_once_the_budget_is_over(tmp_path: Path, instant: list[Cell]) -> None:
    folders = Folders.below(tmp_path)
    assert folders.run(time_budget=1e-9) == []
    assert instant == []
    assert folders.files() == []


def test_status_counts_cells_and_says_what_the_rest_takes(
    tmp_path: Path, instant: list[Cell], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 1)
    folders = Folders.below(tmp_path)
    options: dict[str, Any] = {"results": folders.results, "zoo": folders.zoo, "device": "cpu"}
    options |= {"profile": "tiny", "seeds": [0, 1, 2, 3], "pattern": "*ensemble"}
    assert [one.experiment for one in status_of(**options)] == [
        name for name in PROFILE.sections if name != "cost"
    ]
    (one,) = status_of("same_data", **options)
    assert (one.cells, one.seconds) == ({"missing": 4}, None)
    damaged, stale, _ = folders.run(seeds=[0, 1, 2], pattern="*/ensemble")
    record = next(iter(folders.records.whole("tiny", "same_data")))
    made = {"device": record.provenance.device, "seconds": 4.0}
    origin = record.provenance.model_dump() | {"seconds": 50.0, "base_models": {"x": made}}
    for cell in instant:
        folders.records.write(cell, Outcome(record.rows, {}, {}), origin)
    make_stale(stale)
    damaged.write_text("{")
    (one,) = status_of("same_data", **options)
    assert one.cells == {"done": 1, "stale": 1, "damaged": 1, "missing": 1}
    assert one.seconds == 3 * (50 + 2 * 4)
    (one,) = status_of("same_data", **options | {"seeds": [2]})
    assert (one.cells, one.seconds) == ({"done": 1}, 0)


# Bad input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"profile": "huge"},
            "unknown profile 'huge': choose one of paper, short, grid, digits",
        ),
        ({"experiment": "magic"}, "unknown experiment 'magic': choose one of same_data"),
        ({"seeds": [0, 1, 0]}, "seed 0 is given twice: give each seed once"),
        ({"seeds": []}, "no seeds: give at least one"),
        ({"pattern": "x"}, "no cell matches 'x': there are same_data/"),
        ({"device": "abacus"}, "device 'abacus' is not here .*: use 'auto' or 'cpu'"),
        ({"device": "cuda:99"}, "device 'cuda:99' is not here"),
        ({"workers": 0}, "workers is 0: give more than 0"),
        ({"time_budget": -1}, "time_budget is -1: give more than 0"),
    ],
)
def test_bad_input_is_one_line_and_changes_nothing_on_disk(
    options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        Folders.below(tmp_path).run(**options)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["results", "zoo"])
def test_a_place_that_cannot_be_written_is_said_before_the_first_cell(
    name: str, tmp_path: Path, instant: list[Cell]
) -> None:
    (tmp_path / name).write_text("not a folder")
    with pytest.raises(OSError, match=f"{name}.* cannot be written"):
        Folders.below(tmp_path).run()
    assert instant == []
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_absent_data_stop_a_run_before_its_first_cell_unless_nobody_needs_them(
    tmp_path: Path, instant: list[Cell], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NPMERGE_DATA", str(tmp_path / "none"))
    folders = Folders.below(tmp_path)
    cifar = tiny.SETTING | {"dataset": "cifar100", "image_size": 16}
    with_section(monkeypatch, settings=[tiny.SETTING, cifar])
    for options in ({}, {"dry_run": True}, {"pattern": "*/cifar100*"}):
        with pytest.raises(DataError, match="cifar100 is not in"):
            folders.run(**options)
    assert instant == []
    assert folders.files() == []
    assert len(folders.run(pattern="*/digits*")) == len(instant) == 13
    record = next(iter(folders.records.whole("tiny", "same_data")))
    for cell in cells("same_data", "tiny", [0]):
        folders.records.write(cell, Outcome(record.rows, {}, {}), record.provenance.model_dump())
    assert len(folders.run()) == 26  # shows what is there, needs no data
