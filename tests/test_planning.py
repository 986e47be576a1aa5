"""Plans on paper: the schedule's own order on a virtual clock, and seconds that follow from the work."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import PROFILE, tiny_profile

from npmerge.cli import main
from npmerge.experiments import EXPERIMENTS
from npmerge.report.planning import plan_table, prediction_table, show_plan
from npmerge.run.amounts import KINDS, Network, Part, parts, trained_images
from npmerge.run.planning import Plan, makespan, plan_cells, plan_experiments
from npmerge.run.rates import Rates, Timed, read_timed, time_cells, times_of, write_timed
from npmerge.run.schedule import Durations, Schedule, Task, Training
from npmerge.run.work import base_models
from npmerge.store.origins import provenance
from npmerge.store.records import Cell, Outcome, Record, Records
from npmerge.store.zoo import BaseModel

DEVICE = "GPU (abacus)"


def listed(*names: str, seeds: tuple[int, ...] = (0,)) -> list[Cell]:
    return [cell for name in names for cell in EXPERIMENTS[name].list(PROFILE, seeds)]


def one(name: str, experiment: str = "same_data") -> Cell:
    return next(cell for cell in listed(experiment) if cell.name == name)


def timed(cell: Cell, kind: Any, seconds: float, network: Network | None = None) -> Timed:
    """A unit of work, an image's or a matching, that took so long."""
    network = network or Network.of(cell.config["setting"])
    return Timed(network.name, kind, network.work(kind), seconds, DEVICE, 1, "float32", "2")


def rates(*cells: Cell, **seconds: float) -> Rates:
    """Seconds of an image by kind, 1 by default, with each of the cells' networks."""
    return Rates(
        timed(cell, kind, seconds.get(kind, 1.0))
        for cell in {cell.setting: cell for cell in cells}.values()
        for kind in KINDS
        if Network.of(cell.config["setting"]).work(kind)
    )


def schedule(todo: list[Cell], bases: dict[str, list[BaseModel]], *alone: str) -> Schedule:
    return Schedule(
        todo,
        bases=lambda cell: bases.get(cell.label, []),
        there=lambda _: False,
        durations=Durations((), DEVICE),
        alone=lambda cell: cell.name in alone,
    )  # fmt: skip


def by_hand(cells: dict[str, float], base: float = 0.0) -> Any:
    """Seconds of tasks: of cells by their names, and of every base model."""

    def seconds(task: Task) -> float:
        return base if isinstance(task, Training) else cells[task.name]

    return seconds


@pytest.mark.parametrize(("workers", "expected"), [(1, 10.0), (2, 6.0), (3, 5.0), (9, 5.0)])
def test_cells_begin_in_order_as_soon_as_a_worker_is_free(workers: int, expected: float) -> None:
    took = {"ensemble": 4.0, "base_models": 1.0, "identity-mean": 5.0}
    todo = [one(name) for name in took]
    assert makespan(schedule(todo, {}), workers, by_hand(took)) == expected


@pytest.mark.parametrize(("workers", "expected"), [(1, 13.0), (2, 7.0), (3, 7.0)])
def test_a_base_model_is_trained_once_before_the_cells_that_share_it(
    workers: int, expected: float
) -> None:
    took = {"ensemble": 2.0, "base_models": 1.0}
    todo = [one(name) for name in took]
    shared = {cell.label: base_models(cell) for cell in todo}  # two
    assert makespan(schedule(todo, shared), workers, by_hand(took, base=5.0)) == expected


@pytest.mark.parametrize(("workers", "expected"), [(1, 9.0), (2, 7.0), (8, 7.0)])
def test_beside_a_cell_that_measures_time_nothing_runs(workers: int, expected: float) -> None:
    took = {"ensemble": 2.0, "base_models": 3.0, "identity-mean": 4.0}
    todo = [one(name) for name in took]
    found = makespan(schedule(todo, {}, "identity-mean"), workers, by_hand(took))
    assert found == expected


def test_more_workers_are_never_slower_and_the_bounds_hold() -> None:
    todo = listed("same_data", "many_models", "cost")
    workers = (1, 2, 5, 8, 64, 1000)
    plan = plan_cells(todo, workers, rates(*todo))
    walls = [plan.wall[n] for n in workers]
    assert walls == sorted(walls, reverse=True)
    assert walls[0] == pytest.approx(plan.work)
    for n, wall in plan.wall.items():
        assert wall >= max(plan.work / n, plan.least) * (1 - 1e-9)
    assert plan.base_models == len({base for cell in todo for base in base_models(cell)})


def test_many_workers_need_as_long_as_the_longest_way_through() -> None:
    todo = listed("same_data")
    plan = plan_cells(todo, (1000,), rates(*todo))
    assert plan.wall[1000] == pytest.approx(plan.least)


def test_the_work_of_a_cell_is_read_off_its_configuration() -> None:
    found = {(part.stage, part.kind): part.times for part in parts(one("permute-np_merge")) or ()}
    images, test = 1297, 500  # digits
    assert found == {
        ("bases", "reset"): images, ("alignment", "alignment"): images,
        ("learning", "learning"): images, ("reset", "reset"): images, ("scoring", "scoring"): test,
    }  # fmt: skip
    assert all(trained_images(base) == images for base in base_models(one("ensemble")))


def test_shares_of_the_data_are_together_all_of_it() -> None:
    for split in ("80-20", "dirichlet"):
        cell = next(c for c in listed("disjoint_splits") if split in c.setting)
        assert sum(map(trained_images, base_models(cell))) == 1297


def test_a_choice_costs_a_trial_for_each_value() -> None:
    plain, tuned = (
        {(p.stage, p.kind): p.times for p in parts(one(f"permute-finetune{end}")) or ()
         if p.stage == "learning"}
        for end in ("", "-tuned")
    )  # fmt: skip
    assert plain == {("learning", "learning"): 1297}
    every = [p for p in parts(one("permute-finetune-tuned")) or () if p.stage == "learning"]
    assert sum(p.times for p in every if p.kind == "learning") == pytest.approx(1.9 * 1297)
    assert tuned["learning", "scoring"] == pytest.approx(0.1 * 1297)


def test_without_batch_norm_nothing_is_reset() -> None:
    plain, normed = (
        Network("digits", model, 0.25, 8).work("reset") for model in ("vgg11", "resnet20")
    )
    assert plain == 0 < normed


def test_what_cells_share_is_counted_once() -> None:
    todo = [one("permute-mean"), one("permute-np_merge")]
    free: dict[str, float] = dict.fromkeys(KINDS, 1e-12)
    together = plan_cells(todo, (1,), rates(*todo, **free | {"alignment": 1.0})).work
    apart = [
        plan_cells([cell], (1,), rates(cell, **free | {"alignment": 1.0})).work for cell in todo
    ]
    assert together == pytest.approx(1297, rel=1e-3)
    assert sum(apart) == pytest.approx(2 * 1297, rel=1e-3)


def test_a_device_that_is_faster_gains_in_all_but_matching() -> None:
    cell = one("weight_matching-mean")
    matching = rates(cell, **dict.fromkeys(KINDS, 1e-9) | {"matching": 7.0})
    assert plan_cells([cell], (1,), matching, speed=100).work == pytest.approx(7, rel=1e-2)
    passes = rates(cell, matching=1e-12)
    slow, fast = (plan_cells([cell], (1,), passes, speed=speed).work for speed in (1, 100))
    assert slow == pytest.approx(100 * fast)


def recorded(folder: Path, cell: Cell, seconds: float) -> Record:
    """The record of a cell whose every pass over an image took so long."""
    took: dict[str, float] = {}
    for part in (one for one in parts(cell) or () if one.kind != "reset"):
        took[part.stage] = took.get(part.stage, 0) + part.times * seconds
    took.pop("bases", None)
    bases = {
        base.name: {"file": base.name, "device": DEVICE, "seconds": trained_images(base) * seconds}
        for base in base_models(cell)
    }
    origin = provenance(
        torch.device("cpu"), seconds=sum(took.values()), source="v", base_models=bases
    )
    row = {
        "dataset": "digits", "image_size": 4, "model": "vgg11", "width": 0.0625, "split": None,
        "models": 2, "many": None, "align": None, "aggregate": "ensemble", "tuned": False,
        "correct": None, "examples_per_class": None, "metric": "loss", "value": 1.0,
    }  # fmt: skip
    records = Records(folder)
    records.write(cell, Outcome([row], {}, took), origin | {"device": DEVICE})
    return records.read(cell.profile, cell.experiment)[0]


def test_rates_read_off_records_predict_these_records(tmp_path: Path) -> None:
    cell = one("permute-np_merge")
    known = list(times_of([recorded(tmp_path, cell, 0.01)]))
    assert {t.kind for t in known} == {"training", "alignment", "learning", "scoring"}
    table = prediction_table(known, known)
    assert all(table.loc[:, kind].str.startswith("1.00").all() for kind in {t.kind for t in known})
    found = plan_cells([cell], (1,), Rates(known)).work  # nothing is reset: it has no batch norm
    assert found == pytest.approx(
        0.01 * (sum(p.times for p in parts(cell) or () if p.kind != "reset") + 2 * 1297), rel=0.01
    )


def test_a_record_of_a_cell_goes_before_the_rates(tmp_path: Path) -> None:
    cell = one("ensemble")
    record = recorded(tmp_path, cell, 0.01)
    plan = plan_cells([cell], (1,), Rates(()), records=[record])
    bases = 2 * trained_images(base_models(cell)[0]) * 0.01
    assert plan.work == pytest.approx(record.provenance.seconds + bases)


def test_another_network_is_predicted_by_the_work_in_it() -> None:
    cell = one("ensemble")
    small = Network.of(cell.config["setting"])
    large = Network("digits", "vgg11", 0.25, 8)
    known = Rates([timed(cell, "scoring", 2.0)])
    ratio = large.work("scoring") / small.work("scoring")
    assert ratio > 4
    assert known.seconds("scoring", large.name, large.work("scoring")) == pytest.approx(2 * ratio)
    assert known.seconds("learning", large.name, 1.0) is None


def test_leaving_a_network_out_leaves_nothing_to_predict_the_only_one_by() -> None:
    cell = one("ensemble")
    table = prediction_table([timed(cell, "scoring", 2.0)])
    assert table.to_numpy().tolist() == [["\N{EN DASH}"] * len(KINDS)]


def test_times_of_this_device_are_positive_and_come_back_from_their_file(tmp_path: Path) -> None:
    found = list(time_cells([one("ensemble", "disjoint_splits")], "cpu"))
    assert [t.kind for t in found] == list(KINDS)
    assert all(t.seconds > 0 and t.work > 0 for t in found)
    write_timed(tmp_path / "times.csv", found)
    assert read_timed(tmp_path / "times.csv") == found


@pytest.mark.parametrize("text", ["", "network,kind\nx,y\n", "\x00", "a,b\n1,2,3\n"])
def test_another_file_is_no_table_of_times(tmp_path: Path, text: str) -> None:
    path = tmp_path / "other.csv"
    path.write_text(text)
    with pytest.raises(ValueError, match="no table of times on one device: make it with"):
        read_timed(path)


def test_nothing_known_is_an_error_that_says_how_to_find_out() -> None:
    with pytest.raises(ValueError, match=r"nothing tells how long training takes .* --measure"):
        plan_cells([one("ensemble")], (1,), Rates(()))


def test_the_table_has_a_row_an_experiment_and_one_for_all(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tiny_profile(monkeypatch)
    names = ["same_data", "disjoint_splits"]
    found = plan_experiments(
        names, profile="tiny", seeds=[0], workers=(1, 8), rates=rates(*listed(*names))
    )
    table = plan_table(found)
    assert list(table.index) == [*names, "ALL"]
    assert list(table.columns) == [
        "cells", "base models", "device time", "1 device", "8 devices", "any number",
    ]  # fmt: skip
    assert found["ALL"].work == pytest.approx(sum(found[name].work for name in names))
    assert isinstance(found["ALL"], Plan)
    assert Part("", "reset", 1.0).shared is None


def test_the_book_says_what_is_assumed_and_that_no_gpu_was_timed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_profile(monkeypatch)
    shown: list[Any] = []
    monkeypatch.setattr("npmerge.report.planning.show", lambda *things: shown.extend(things))
    path = tmp_path / "times.csv"
    show_plan("tiny", path)
    assert shown == ["There is no `times.csv` yet."]
    cell = one("ensemble", "disjoint_splits")
    write_timed(path, [replace(timed(cell, kind, 1.0), device="CPU (x)") for kind in KINDS])
    show_plan("tiny", path, workers=(1, 8), speeds=(50,))
    text = " ".join(thing for thing in shown if isinstance(thing, str))
    assert "No GPU has been timed" in text
    assert "50 times as fast as CPU (x) (an assumption, not a measurement)" in text
    totals = next(thing for thing in shown if not isinstance(thing, str))
    assert list(totals.index) == ["as timed", "50, assumed"]


def test_the_command_measures_writes_and_plans(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny_profile(monkeypatch)
    path = tmp_path / "times.csv"
    words = ["plan", "same_data", "--profile", "tiny", "--quiet", "--results", str(tmp_path)]
    assert main([*words, "--seeds", "0", "--measure", str(path), "--device", "cpu"]) == 0
    assert path.is_file()
    again = [*words, "--seeds", "0", "--measured", str(path), "--speed", "100", "--workers", "4"]
    capsys.readouterr()
    assert main(again) == 0
    printed = capsys.readouterr().out
    assert "100 times as fast as" in printed
    assert "an assumption, not a measurement" in printed
    assert "4 devices" in printed


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["magic"], "unknown experiment 'magic'"),
        (["--workers", "0"], "workers is 0: give a number above 0"),
        (["--speed", "nan"], "speed is nan: give a number above 0"),
        (["--speed", "inf"], "speed is inf: give a number above 0"),
        (["--measured", "/no/such/file.csv"], "/no/such/file.csv"),
        (["--measured", "a", "--measure", "b"], "both --measure and --measured are given"),
        ([], "no records of"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(
    words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", "--results", str(tmp_path), "--device", "cpu", *words]) == 1
    error = capsys.readouterr().err
    assert message in error
    assert len(error.strip().splitlines()) == 1
