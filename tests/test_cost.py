"""Cost: what is measured, and what the chapter makes of it."""

from __future__ import annotations

import json
import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import DIRICHLET, OPTIMISATION, PROFILE, loader, net

from npmerge import cost_figures, experiments
from npmerge.experiments import PROFILES, cost, load_profile, same_data
from npmerge.experiments.profile import Cost
from npmerge.memory import allocated
from npmerge.results import COLUMNS, Results, Unit

CPU = torch.device("cpu")
EPOCHS = 2
METHODS = (cost.AVERAGE, cost.FINETUNE, cost.NP)
SECTION = Cost.model_validate(
    {
        "settings": [DIRICHLET | {"split": None, "width": width} for width in (0.25, 0.125)],
        "optimisation": OPTIMISATION | {"epochs": EPOCHS},
        "counts": [2, 3],
    }
)
TINY = PROFILE.model_copy(update={"cost": SECTION})

Content = dict[str, Any]


@pytest.fixture(scope="module")
def contents(tmp_path_factory: pytest.TempPathFactory) -> list[Content]:
    """The records of both widths, from narrow to wide."""
    folder = tmp_path_factory.mktemp("cost")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(experiments, "load_profile", lambda _: TINY)
        patch.setitem(experiments.EXPERIMENTS, cost.NAME, cost)
        experiments.run(
            cost.NAME, profile="tiny", seeds=[0], device="cpu",
            results=folder / "results", zoo=folder / "zoo",
        )  # fmt: skip
    return Results(folder / "results").read("tiny", cost.NAME)


def values(content: Content, setting: str = "same") -> dict[tuple[str, str], float]:
    return {
        (row["method"], row["metric"]): row["value"]
        for row in content["records"]
        if row["setting"] == setting
    }


def size(width: float) -> int:
    from npmerge.models import build

    model = build("resnet20", 10, width=width, in_channels=1, image_size=4, seed=0)
    return sum(p.numel() for p in model.parameters())


def test_every_method_has_its_costs_and_its_accuracy(contents: list[Content]) -> None:
    common = {"top1", "loss", "seconds", "parameters", "held_mib", "peak_mib"}
    for content in contents:
        assert all(list(row) == COLUMNS for row in content["records"])
        found = values(content)
        wanted = {(method, metric) for method in METHODS for metric in common}
        wanted |= {(method, "seconds_per_epoch") for method in (cost.NP, cost.FINETUNE)}
        assert set(found) == wanted
        assert all(math.isfinite(value) and value >= 0 for value in found.values())


def test_np_merge_optimises_as_many_numbers_as_fine_tuning_and_averaging_none(
    contents: list[Content],
) -> None:
    for content in contents:
        count = size(content["config"]["setting"]["width"])
        found = values(content)
        assert [found[method, "parameters"] for method in METHODS] == [0, count, count]


def test_np_merge_holds_three_parameter_sized_buffers_more_than_fine_tuning(
    contents: list[Content],
) -> None:
    """Four for fine-tuning: weights, gradient, two moments. One for averaging: the model."""
    for content in contents:
        mib = 4 * size(content["config"]["setting"]["width"]) / 2**20
        found = values(content)
        held = {method: found[method, "held_mib"] for method in METHODS}
        assert held[cost.NP] - held[cost.FINETUNE] == pytest.approx(3 * mib, rel=0.02)
        assert 4 * mib < held[cost.FINETUNE] < 4.5 * mib
        assert mib < held[cost.AVERAGE] < 1.5 * mib
        assert all(found[method, "peak_mib"] > held[method] for method in METHODS)


def test_both_curves_start_at_the_average_and_end_at_the_recorded_accuracy(
    contents: list[Content],
) -> None:
    for content in contents:
        found, curves = values(content), content["details"]["curves"]
        for method in (cost.NP, cost.FINETUNE):
            points = curves[method]
            assert [point["epoch"] for point in points] == list(range(EPOCHS + 1))
            for point, source in ((points[0], cost.AVERAGE), (points[-1], method)):
                for metric in ("top1", "loss", "seconds"):
                    assert point[metric] == found[source, metric]
            spent = content["details"]["epochs"][method]
            steps = [b["seconds"] - a["seconds"] for a, b in pairwise(points)]
            assert steps == pytest.approx(spent)
            assert found[method, "seconds_per_epoch"] == spent[-1]  # the first is left out


def test_the_average_and_np_merge_are_those_of_same_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, contents: list[Content]
) -> None:
    section = TINY.same_data.model_copy(
        update={"settings": SECTION.settings[:1], "optimisation": SECTION.optimisation}
    )
    profile = TINY.model_copy(update={"same_data": section})
    monkeypatch.setattr(experiments, "load_profile", lambda _: profile)
    (path,) = experiments.run(
        same_data.NAME, profile="tiny", seeds=[0], device="cpu", results=tmp_path, zoo=tmp_path
    )
    theirs = values(json.loads(path.read_text()))
    ours = values(contents[1])
    for method in METHODS:
        assert ours[method, "loss"] == pytest.approx(theirs[method, "loss"], rel=1e-4)


def test_tournaments_are_measured_at_the_narrowest_width_and_need_no_more_memory(
    contents: list[Content],
) -> None:
    narrow, wide = contents
    assert narrow["config"]["setting"]["width"] < wide["config"]["setting"]["width"]
    assert {row["setting"] for row in wide["records"]} == {"same"}
    found = {count: values(narrow, f"tournament_{count}") for count in (2, 3)}
    assert [found[count][cost.NP, "merges"] for count in (2, 3)] == [1, 2]
    two, three = (found[count][cost.NP, "peak_mib"] for count in (2, 3))
    assert three == pytest.approx(two, rel=0.05)


def test_units_are_every_width_with_every_seed_but_side_by_side_only_with_the_first() -> None:
    beside = TINY.model_copy(update={"threads": 1})
    assert [unit.seed for unit in cost.units(TINY, [3, 1])] == [3, 1, 3, 1]
    assert [unit.seed for unit in cost.units(beside, [3, 1])] == [3, 3]


@pytest.mark.parametrize("name", PROFILES)
def test_one_width_of_each_profile_shares_the_base_models_of_same_data(name: str) -> None:
    def addresses(todo: list[Unit], module: Any) -> set[str]:
        return {base.address for unit in todo for base in module.base_models(unit)}

    profile = load_profile(name)
    ours = addresses(cost.units(profile, [0]), cost)
    theirs = addresses(same_data.units(profile, [0]), same_data)
    assert len(ours & theirs) == 2
    widths = [setting.width for setting in profile.cost.settings]
    assert len(set(widths)) == len(widths) > 1


def test_memory_counts_what_is_held_and_what_was_there_at_one_time() -> None:
    def work() -> torch.Tensor:
        for _ in range(3):
            torch.zeros(1000, dtype=torch.uint8)  # one after the other
        first, second = (torch.zeros(2000, dtype=torch.uint8) for _ in range(2))
        return (first + second)[:1]  # a view keeps the whole

    there = torch.zeros(5000)
    used = allocated(work, CPU)
    assert used.held == 2000
    assert used.peak == 6000
    assert len(there) == 5000


def test_expenses_add_up_units_and_the_training_for_them_and_name_what_has_no_record() -> None:
    def record(trained: int, peak: int | None) -> Content:
        base = {"trained": trained, "seconds": 120.0 * trained}
        source = {"seconds": 600.0, "base_models": base, "peak_memory_mib": peak}
        origin = source | {"device": "CPU", "threads": 2}
        return {"unit": {"experiment": "same_data"}, "provenance": origin}

    table = cost_figures.expenses({"paper": [record(2, 1500), record(0, None)], "lite": []})
    units = len(experiments.units("same_data", "paper", [0]))
    assert table.loc[("paper", "same_data")].to_dict() == {
        "units a seed": str(units),
        "records": "2",
        "time a seed": f"{12 * units} min",
        "peak memory": "1,500 MiB",
        "device": "CPU, threads: 2",
    }
    assert set(table.index.get_level_values("profile")) == {"paper", "lite"}
    assert set(table.drop(("paper", "same_data"))["records"]) == {"none"}
    assert ("lite", "imagenet") not in table.index


def test_memory_of_a_model_is_that_of_its_tensors() -> None:
    model = net()
    state = model.state_dict().values()
    used = allocated(lambda: net(), CPU)
    assert used.held == sum(tensor.nbytes for tensor in state)
    batch = loader()[0][0]
    assert allocated(lambda: model(batch), CPU).peak > batch.nbytes


def test_tables_have_a_row_for_each_network_and_method_from_narrow_to_wide(
    contents: list[Content],
) -> None:
    shuffled = contents[::-1]
    found = cost_figures.cost_table(shuffled)
    networks = ["resnet20x0.125", "resnet20x0.25"]
    assert list(found.index.get_level_values("network")) == [n for n in networks for _ in range(3)]
    assert list(found.index.get_level_values("method"))[:3] == ["Permute", "Finetune-P", "NP-P"]
    assert found.iloc[0]["s an epoch"] == ""
    assert list(cost_figures.ratio_table(shuffled).index) == networks
    assert list(cost_figures.bought_table(shuffled).index.get_level_values(0)) == [
        n for n in networks for _ in range(2)
    ]
    assert list(cost_figures.tournament_table(shuffled).index) == [2, 3]


def invented(width: float, *, seconds: float, counts: tuple[int, ...] = ()) -> Content:
    """NP Merge: 1.1 to 1.3 times fine-tuning's time; a first epoch that says nothing; 30 points over the average."""

    def row(method: str, metric: str, value: float, setting: str = "same") -> dict[str, Any]:
        row = {"table": "cost", "dataset": "digits", "model": f"resnet20x{width:g}"}
        row |= {"setting": setting, "method": method, "examples_per_class": None}
        return row | {"metric": metric, "value": value}

    epochs = {
        cost.FINETUNE: [seconds] * 4,
        cost.NP: [9 * seconds] + [seconds * k for k in (1.1, 1.2, 1.3)],
    }
    ends = {cost.AVERAGE: 50.0, cost.FINETUNE: 70.0, cost.NP: 80.0}
    metrics = {"parameters": 1e4, "loss": 1.0}
    held = {cost.AVERAGE: 1.0, cost.FINETUNE: 4.0, cost.NP: 7.0}
    records = [row(m, "top1", end) for m, end in ends.items()]
    records += [row(m, "held_mib", value * width) for m, value in held.items()]
    records += [row(m, "peak_mib", (value + 10) * width) for m, value in held.items()]
    records += [row(m, k, v) for m in METHODS for k, v in metrics.items()]
    records += [row(m, "seconds_per_epoch", seconds) for m in epochs]
    records += [row(m, "seconds", seconds * (1 if m == cost.AVERAGE else 5)) for m in METHODS]
    for count in counts:
        metrics = {"merges": count - 1, "seconds": 2.0 * (count - 1), "peak_mib": 5.0}
        records += [row(cost.NP, k, v, f"tournament_{count}") for k, v in metrics.items()]
    curves = {
        m: [
            {"epoch": k, "seconds": seconds * (1 + k), "top1": 50 + (ends[m] - 50) * min(k, 2) / 2}
            for k in range(5)
        ]
        for m in epochs
    }
    return {
        "unit": {"seed": 0},
        "config": {"setting": {"model": "resnet20", "width": width}},
        "records": records,
        "details": {"epochs": epochs, "curves": curves},
    }


def test_the_ratio_of_times_is_that_of_epochs_side_by_side_without_the_first() -> None:
    found = cost_figures.ratios([invented(2, seconds=4), invented(1, seconds=1)])
    assert list(found.index) == ["resnet20x1", "resnet20x2"]
    for _, row in found.iterrows():
        assert [row["time"], row["low"], row["high"]] == pytest.approx([1.2, 1.1, 1.3])
        assert [row["held"], row["peak"]] == pytest.approx([7 / 4, 17 / 14])


def test_what_a_second_bought_is_counted_from_the_average() -> None:
    found = cost_figures.bought_table([invented(1, seconds=2)])
    ours = found.loc[("resnet20x1", "NP-P")].to_dict()
    assert ours == {
        "average, %": "50.0",
        "points after 1 epoch": "+15.0",
        "points/s after 1 epoch": "+7.5",
        "points after 4 epochs": "+30.0",
        "points/s after 4 epochs": "+3.8",
    }


def test_the_verdict_says_what_the_records_say() -> None:
    told = cost_figures.verdict([invented(1, seconds=1, counts=(2, 8)), invented(2, seconds=4)])
    averaging, finetuning, models = told.splitlines()
    assert "took 5.0 times as long" in averaging
    assert "+30.0 percentage points" in averaging
    assert "an epoch took 1.20 times as long" in finetuning
    assert "held 1.75 times the memory" in finetuning
    assert "+10.0 percentage points" in finetuning
    assert "7 times as many merges" in models
    assert "7.0 times as long" in models
    assert "1.00 times as much" in models
    alone = cost_figures.verdict([invented(1, seconds=1)])
    assert "models" not in alone


@pytest.mark.parametrize("widths", [(0.25, 0.5, 1), (1, 2, 4, 8)])
def test_figures_fit_a_phone(widths: tuple[float, ...]) -> None:
    some = [invented(width, seconds=width**2) for width in widths]
    for draw in (cost_figures.plot_width, cost_figures.plot_curves):
        figure = draw(some)
        assert figure.get_size_inches()[0] == 6.4
        figure.draw_without_rendering()
