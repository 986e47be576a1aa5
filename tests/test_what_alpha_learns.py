"""The tables and figures of what alpha learns: from records of known accuracy."""

from __future__ import annotations

from typing import Any

import pytest
from reports import record

from npmerge.experiments import cells
from npmerge.report import coefficients
from npmerge.report.numbers import combination
from npmerge.store.records import Cell, Record

ACCURACY = {
    "ensemble": 80.0, "base_models": 70.0, "permute-mean": 40.0, "permute-fisher": 45.0,
    "permute-finetune": 72.0, "permute-np_merge": 75.0, "model-permute-learned_soup": 68.0,
    "layer-permute-learned_soup": 69.0, "tensor-permute-learned_soup": 71.0,
    "channel-permute-learned_soup": 73.0, "unbounded-permute-learned_soup": 76.5,
    "fisher-permute-learned_soup": 74.0, "base_models-as-trained": 70.5,
}  # fmt: skip
COUNTS = {"model": 1, "layer": 20, "tensor": 60, "channel": 500, "unbounded": 9000, "fisher": 9000}


def of(cell: Cell) -> Record:
    config = cell.config
    method = combination(
        {
            "aggregate": config["aggregate"]["method"],
            "align": config["align"] and config["align"]["method"],
            "correct": config["correct"],
            "many": None,
            "tuned": False,
        }
    )
    details: dict[str, Any] = {}
    first = cell.name.split("-")[0]
    if first in COUNTS:
        details["coefficients"] = COUNTS[first]
        counts = [0] * 20
        counts[19 - cell.seed] = 7
        details["alpha"] = {"weight": counts}
    if cell.name == "permute-np_merge":
        values = {"mean": 0.5, "spread": 0.1}
        details["explained"] = {
            "conv": values | {"fisher": 0.3, "distance": -0.1, "size": 0.0, "numbers": 500},
            "norm": values | {"fisher": 0.9, "numbers": 8},
        }
        if config["setting"].get("split"):
            details["alpha_of_class"] = [0.6, 0.58, 0.42, 0.4]
            details["seen"] = [[80, 80, 20, 20], [20, 20, 80, 80]]
    setting = config["setting"]
    made = record(
        method, ACCURACY[cell.name] + cell.seed, cell.seed, profile="grid", experiment="coefficients",
        width=0.5, split=setting.get("split"), examples="all", details=details,
    )  # fmt: skip
    return made.model_copy(update={"config": config})


@pytest.fixture
def records() -> list[Record]:
    return [of(cell) for cell in cells("coefficients", "grid", [0, 1, 2])]


def test_the_table_has_a_row_a_variant_from_few_numbers_to_many(records: list[Record]) -> None:
    table = coefficients.coefficients_table(records)
    assert table.loc["one for the model", "numbers learned"] == "1"
    assert table.loc["NP Merge", "numbers learned"] == "9,000"
    assert table.loc["NP Merge", "accuracy"] == "76.00 ± 1.00"
    assert table.loc["one for each channel", "minus NP Merge"] == "\N{MINUS SIGN}2.0 ± 0.0"
    assert table.loc["without the sigmoid", "minus NP Merge"] == "+1.5 ± 0.0"
    counts = [int(text.replace(",", "")) for text in table["numbers learned"]]
    assert counts == sorted(counts)


def test_the_picture_says_what_one_number_brings_and_what_one_for_each_parameter(
    records: list[Record],
) -> None:
    label = str(coefficients.plot_coefficients(records).get_label())
    assert "One learned number for the whole model brings +28.0 points over the average" in label
    assert "one for each parameter +35.0" in label
    assert "one for each tensor: 72.0 %" in label


def test_correlations_are_of_large_tensors_and_the_largest_is_named(records: list[Record]) -> None:
    figure = coefficients.plot_explained(records)
    assert figure is not None
    assert "rank correlations within ±0.30" in str(figure.get_label())
    few = [one for one in records if "explained" not in one.details]
    assert coefficients.plot_explained(few) is None


def test_alpha_leans_to_the_model_that_saw_the_class(records: list[Record]) -> None:
    figure = coefficients.plot_class_shares(records)
    assert figure is not None
    assert "toward the model that saw the class, by 0.180 on average" in str(figure.get_label())
    assert coefficients.plot_class_shares([one for one in records if not one.details]) is None


def test_the_findings_are_computed(records: list[Record]) -> None:
    text = coefficients.findings(records)
    assert (
        "With 1 learned number (one for the model): +28.0 ± 0.0 points against the average" in text
    )
    assert "between 0.95 and 1.00, between 0.90 and 0.95 or between 0.85 and 0.90" in text
    assert "NP Merge gains +1.5 ± 0.0 points" in text
    assert "+0.30 (alpha with A's share of the Fisher information)" in text
    assert (
        "alpha is 0.590 on average for classes that A saw most of, and 0.410 for the others" in text
    )
