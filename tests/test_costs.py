"""What the chapter on cost makes of its records."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import matplotlib as mpl
import matplotlib.pyplot as plt
import pytest
from reports import record

from npmerge import experiments
from npmerge.report import costs, plots
from npmerge.report.claims import FINETUNE, NP_P, PERMUTE
from npmerge.store.records import Record

FINETUNE_P = FINETUNE[0]


@pytest.fixture(autouse=True)
def _no_window() -> Iterator[None]:
    mpl.use("agg")
    yield
    plt.close("all")


def invented(width: float, *, seconds: float, counts: tuple[int, ...] = ()) -> list[Record]:
    """NP Merge: 1.1 to 1.3 times fine-tuning's time; a first epoch that says nothing; 30 points over the average."""
    where = {"experiment": "cost", "dataset": "digits", "width": width, "split": None}
    epochs = {
        "finetune": [seconds] * 4,
        "np_merge": [9 * seconds] + [seconds * k for k in (1.1, 1.2, 1.3)],
    }
    ends = {PERMUTE: 50.0, FINETUNE_P: 70.0, NP_P: 80.0}
    held = {PERMUTE: 1.0, FINETUNE_P: 4.0, NP_P: 7.0}
    curves = {
        m.aggregate: [
            {"epoch": k, "seconds": seconds * (1 + k), "top1": 50 + (ends[m] - 50) * min(k, 2) / 2}
            for k in range(5)
        ]
        for m in (FINETUNE_P, NP_P)
    }
    parts = []
    for m, end in ends.items():
        values = {"top1": end, "loss": 1.0, "parameters": 1e4}
        values |= {"held_mib": held[m] * width, "peak_mib": (held[m] + 10) * width}
        values["seconds"] = seconds * (1 if m == PERMUTE else 5)
        if m != PERMUTE:
            values["seconds_per_epoch"] = seconds
        parts.append(record(m, values, **where))
    rows = [row for part in parts for row in part.rows]
    details = {"epochs": epochs, "curves": curves}
    pair = parts[0].model_copy(update={"rows": rows, "details": details})
    return [pair] + [
        record(
            replace(NP_P, many="tournament"),
            {"merges": count - 1, "seconds": 2.0 * (count - 1), "peak_mib": 5.0},
            models=count,
            **where,
        )
        for count in counts
    ]


def test_tables_have_a_row_for_each_network_and_method_from_narrow_to_wide() -> None:
    kept = invented(0.25, seconds=2) + invented(0.125, seconds=1, counts=(2, 3))
    found = costs.cost_table(kept)
    networks = ["resnet20x0.125", "resnet20x0.25"]
    assert list(found.index.get_level_values("network")) == [n for n in networks for _ in range(3)]
    labels = [m.label for m in sorted((PERMUTE, FINETUNE_P, NP_P), key=lambda m: m.place)]
    assert list(found.index.get_level_values("method"))[:3] == labels
    assert found.iloc[0]["s an epoch"] == ""
    assert found.loc[("resnet20x0.25", "NP-P")].to_dict() == {
        "parameters optimised": "10,000",
        "held, MiB": "1.75",
        "peak, MiB": "4.2",
        "s an epoch": "2.00",
        "s in all": "10.0",
        "top-1, %": "80.0",
    }
    assert list(costs.ratio_table(kept).index) == [(n, "NP-P") for n in networks]
    bought = costs.bought_table(kept)
    assert list(bought.index) == [(n, label) for n in networks for label in labels[1:]]
    assert list(costs.tournament_table(kept).index) == [2, 3]


def test_the_ratio_of_times_is_that_of_epochs_side_by_side_without_the_first() -> None:
    found = costs.ratios(invented(2, seconds=4) + invented(1, seconds=1))
    assert list(found.index) == [("resnet20x1", "np_merge"), ("resnet20x2", "np_merge")]
    for _, row in found.iterrows():
        assert [row["time"], row["low"], row["high"]] == pytest.approx([1.2, 1.1, 1.3])
        assert [row["held"], row["peak"]] == pytest.approx([7 / 4, 17 / 14])


def test_what_a_second_bought_is_counted_from_the_average() -> None:
    found = costs.bought_table(invented(1, seconds=2))
    assert found.loc[("resnet20x1", "NP-P")].to_dict() == {
        "average, %": "50.0",
        "points after 1 epoch": "+15.0",
        "points/s after 1 epoch": "+7.5",
        "points after 4 epochs": "+30.0",
        "points/s after 4 epochs": "+3.8",
    }


def test_the_verdict_says_what_the_records_say() -> None:
    told = costs.verdict(invented(1, seconds=1, counts=(2, 8)) + invented(2, seconds=4))
    averaging, finetuning, models = told.splitlines()
    assert "took 5.0 times as long" in averaging
    assert "+30.0 percentage points" in averaging
    assert "an epoch took 1.20 times as long" in finetuning
    assert "held 1.75 times the memory" in finetuning
    assert "+10.0 percentage points" in finetuning
    assert "7 times as many merges" in models
    assert "7.0 times as long" in models
    assert "1.00 times as much" in models
    assert "models" not in costs.verdict(invented(1, seconds=1))


@pytest.mark.parametrize("widths", [(0.25, 0.5, 1), (1, 2, 4, 8)])
def test_figures_fit_a_phone(widths: tuple[float, ...]) -> None:
    some = [one for width in widths for one in invented(width, seconds=width**2)]
    for draw in (costs.plot_width, costs.plot_curves):
        figure = draw(some)
        assert figure.get_size_inches()[0] == plots.WIDTH
        figure.draw_without_rendering()
        for axis in figure.axes:
            assert {"NP Merge", "Fine-tuning"} <= {text.get_text() for text in axis.texts}


def test_an_epoch_is_held_against_an_epoch_at_the_widths_there_are() -> None:
    figure = costs.plot_width([*invented(1, seconds=1), *invented(2, seconds=4)])
    seconds, memory = figure.axes
    assert {line.get_label() for line in seconds.lines} == {"NP Merge", "Fine-tuning"}
    assert {line.get_label() for line in memory.lines} == {"NP Merge", "Fine-tuning", "Average"}
    assert [tick.get_text() for tick in memory.get_xticklabels()] == ["x1", "x2"]
    assert len(seconds.get_yticks()) > 1
    assert str(figure.get_label()).startswith(
        "An epoch of NP Merge takes 1.20 times as long as one of fine-tuning."
    )
    assert "points." in str(costs.plot_curves(invented(1, seconds=1)).get_label())


def test_expenses_add_up_numbers_and_the_training_for_them_and_name_what_has_no_record() -> None:
    def spent(seed: int, trained: int, peak: int | None) -> Record:
        base = {f"model {k} of seed {seed}": {"seconds": 120.0} for k in range(trained)}
        origin = {"base_models": base, "peak_memory_mib": peak}
        return record(NP_P, 50.0, seed, profile="paper", experiment="same_data", origin=origin)

    table = costs.expenses({"paper": [spent(0, 2, 1500), spent(1, 0, None)], "short": []})
    cells = len(experiments.cells("same_data", "paper", [0]))
    assert table.loc[("paper", "same_data")].to_dict() == {
        "numbers a seed": str(cells),
        "records": "2",
        "time a seed": "more than 12 min",
        "peak memory": "1,500 MiB",
        "device": "CPU (x86_64), threads: 2",
    }
    assert set(table.index.get_level_values("profile")) == {"paper", "short"}
    assert set(table.drop(("paper", "same_data"))["records"]) == {"none"}
    assert ("short", "imagenet") not in table.index


def test_the_time_of_a_seed_is_said_plainly_once_every_number_of_one_is_there(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(experiments, "cells", lambda name, *_: [1] * (name == "same_data"))
    kept = [record(NP_P, 50.0, seed, experiment="same_data") for seed in (0, 1)]
    assert costs.expenses({"short": kept})["time a seed"].to_list() == ["10 min"]
