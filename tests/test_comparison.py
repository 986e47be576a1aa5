"""NP Merge against fine-tuning: what the grid gives to both, and what is made of its numbers."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
from reports import ORIGIN, record
from scipy.stats import t as student

from npmerge.catalogue import profile_names
from npmerge.data import load
from npmerge.experiments import cells
from npmerge.methods import Combination
from npmerge.report import comparison
from npmerge.report.numbers import paper_numbers
from npmerge.store.files import config_hash
from npmerge.store.records import Cell, Record

SEEDS = [0, 1, 2]
LEARNERS = ("finetune", "np_merge")
WITH_GRID = [name for name in profile_names() if cells("comparison", name, [0])]


def learned(profile: str) -> list[Cell]:
    """The cells in which something is learned."""
    found = cells("comparison", profile, SEEDS)
    return [cell for cell in found if cell.config["aggregate"]["method"] in LEARNERS]


def given(cell: Cell) -> str:
    """All that a cell's aggregation is given, without its name."""
    config = cell.config | {"aggregate": cell.config["aggregate"]["options"]}
    return json.dumps([cell.setting, config], sort_keys=True)


def made_up(value: Callable[[Cell], float], profile: str = "grid") -> list[Record]:
    """A record of each cell in which something is learned."""
    return [of(cell, value(cell)) for cell in learned(profile)]


def of(cell: Cell, value: float, details: Mapping[str, Any] | None = None) -> Record:
    config, setting = cell.config, cell.config["setting"]
    options = config["aggregate"]["options"]
    method = Combination(
        config["aggregate"]["method"], config["align"]["method"],
        tuned=isinstance(options["lr"], dict),
    )  # fmt: skip
    about = record(
        method, value, cell.seed, profile=cell.profile, experiment="comparison", split=None,
        dataset=setting["dataset"], model=setting["model"], width=setting["width"],
        examples=config["data"]["examples_per_class"], details=details, origin=ORIGIN,
    )  # fmt: skip
    where = about.cell.model_copy(update={"setting": cell.setting, "name": cell.name})
    return about.model_copy(
        update={"cell": where, "config": config, "config_hash": config_hash(config)}
    )


def lead(points: float) -> Callable[[Cell], float]:
    """NP Merge so many points ahead of fine-tuning; 1 more in seed 1, 1 less in seed 2."""

    def value(cell: Cell) -> float:
        first: bool = cell.config["aggregate"]["method"] == "np_merge"
        return 50.0 + 10 * cell.seed + first * (points + (0, 1, -1)[cell.seed])

    return value


@pytest.mark.parametrize("profile", WITH_GRID)
def test_both_are_given_the_same_data_steps_and_tuning(profile: str) -> None:
    sides = {
        name: [given(c) for c in learned(profile) if c.config["aggregate"]["method"] == name]
        for name in LEARNERS
    }
    assert sides["np_merge"]
    assert sorted(sides["np_merge"]) == sorted(sides["finetune"])
    assert len(set(sides["np_merge"])) == len(sides["np_merge"])  # no point is there twice


def test_fewer_images_are_seen_in_as_many_steps() -> None:
    steps: dict[int | str, int] = {}
    for cell in learned("grid"):
        data, options = cell.config["data"], cell.config["aggregate"]["options"]
        if cell.name.startswith("images") or cell.name == "permute-np_merge":
            each = data["examples_per_class"]
            images = 50_000 if each == "all" else 100 * each
            steps[each] = options["epochs"] * (images // data["batch_size"])
    assert len(steps) == 3
    assert set(steps.values()) == {1000}


def test_one_factor_is_varied_at_a_time() -> None:
    reference = next(cell for cell in learned("grid") if cell.name == "permute-np_merge")
    for cell in learned("grid"):
        if cell.config["aggregate"]["method"] != "np_merge" or cell.seed != reference.seed:
            continue
        theirs, own = cell.config, reference.config
        different = {key for key in own if key != "aggregate" and own[key] != theirs[key]}
        options = (own["aggregate"]["options"], theirs["aggregate"]["options"])
        different |= {name for name in options[0] if options[0][name] != options[1][name]}
        assert different in (set(), {"setting"}, {"data", "epochs"}, {"epochs"}, {"lr"}), cell.label


def test_every_setting_has_its_references_and_where_it_starts_from() -> None:
    for cell in learned("grid"):
        names = {
            one.name for one in cells("comparison", "grid", [cell.seed])
            if one.setting == cell.setting
        }  # fmt: skip
        assert {"base_models", "ensemble", "permute-mean"} <= names


def test_a_margin_is_paired_by_seed_with_student_s_interval() -> None:
    points = comparison.grid_points(made_up(lead(2.0)))
    for one in points:
        assert one.singles == pytest.approx((2.0, 3.0, 1.0))
        assert one.margin.mean == pytest.approx(2.0)
        assert one.margin.half == pytest.approx(student.ppf(0.975, 2) / 3**0.5)
        assert not one.ahead  # 2.0 points, give or take 2.5
    assert {one.ahead for one in comparison.grid_points(made_up(lead(2.6)))} == {"NP Merge"}
    assert {one.ahead for one in comparison.grid_points(made_up(lead(-2.6)))} == {"Fine-tuning"}


def test_two_seeds_have_an_interval_and_no_winner_and_one_has_neither() -> None:
    every = made_up(lambda cell: 50.0 + 20 * (cell.config["aggregate"]["method"] == "np_merge"))
    two = comparison.grid_points([one for one in every if one.cell.seed < 2])
    assert {(one.margin.half, one.ahead) for one in two} == {(0.0, "")}
    one_seed = comparison.grid_points([one for one in every if one.cell.seed == 1])
    assert all(one.margin.half != one.margin.half and not one.ahead for one in one_seed)


def test_seeds_without_both_methods_do_not_count() -> None:
    every = made_up(lead(2.0))
    lacking = [
        r for r in every if (r.cell.seed, r.config["aggregate"]["method"]) != (1, "finetune")
    ]
    assert {one.singles for one in comparison.grid_points(lacking)} == {(2.0, 1.0)}


def test_rows_are_grouped_by_factor_in_order_each_with_the_reference() -> None:
    by_name = sorted(made_up(lead(2.0)), key=lambda one: (one.cell.setting, one.cell.name))
    points = comparison.grid_points(by_name)  # the reference is not the first
    groups: dict[str, list[str]] = {}
    for one in points:
        groups.setdefault(one.group, []).append(one.row)
    assert list(groups.values()) == [
        ["0.25", "0.5 (reference)", "1"],
        ["10 a class", "100 a class", "all (reference)"],
        ["1", "2 (reference)", "4"],
        ["not tuned (reference)", "each tuned"],
        ["0.001", "0.01 (reference)", "0.1"],
    ]


def test_records_given_different_things_are_no_pair() -> None:
    pair = [cell for cell in learned("grid") if cell.seed == 0 and cell.name.startswith("permute-")]
    first = next(c for c in pair if c.name == "permute-np_merge")
    other = next(c for c in pair if c.name == "permute-finetune-tuned")
    assert comparison.grid_points([of(first, 60.0), of(other, 50.0)]) == []


def test_the_paper_s_margins_are_those_of_its_tables() -> None:
    points = comparison.paper_points()
    rows = paper_numbers()
    rows = rows[
        (rows["metric"] == "top1")
        & ~((rows["table"] == "IV") & (rows["examples_per_class"] == "all"))
    ]
    counted = (
        rows["aggregate"].eq("np_merge").sum()
    )  # Table IV repeats Table II in its rows for all images
    assert len(points) == counted == 18
    assert all(not one.singles for one in points)
    (first,) = (m for m in points if m.row.startswith("resnet20x1,") and m.align == "permute")
    assert first.margin.mean == pytest.approx(62.88 - 39.37)


def test_the_picture_has_a_zero_line_and_every_row_and_names_its_sources() -> None:
    points = [*comparison.grid_points(made_up(lead(2.0))), *comparison.paper_points()]
    figure = comparison.plot_comparison(points)
    named = [" ".join(text.get_text() for text in axis.get_yticklabels()) for axis in figure.axes]
    assert [one.row for one in points if not any(one.row in names for names in named)] == []
    assert str(figure.get_label()).startswith("NP Merge is ahead of fine-tuning in 0 of ")
    assert "in 14 of 18 in the paper" in str(figure.get_label())
    for axis in figure.axes:
        assert any(np.array_equal(line.get_xdata(), [0, 0]) for line in axis.lines)
    titles = [axis.get_title().replace("\n", " ") for axis in figure.axes]
    assert titles[0] == "width of the network (profile grid, 3 seeds)"
    assert titles[-1] == "the paper (means)"


def test_the_table_says_what_the_picture_shows_and_how_far_learning_went() -> None:
    details = {"history": [3.0, 2.5], "spread": [[0.0, 0.2, 0.4, 0.5, 0.6, 0.7, 1.0]] * 2}
    records = [of(cell, lead(2.0)(cell), details) for cell in learned("grid")]
    points = comparison.grid_points(records)
    table = comparison.comparison_table(points)
    assert len(table) == len(points)
    assert set(table["loss at the end"]) == {"2.50 / 2.50"}
    assert set(table["alpha"]) == {"0.20 to 0.70"}
    assert set(table["NP \N{MINUS SIGN} fine-tuning"]) == {"+2.0 ± 2.5 (3 seeds)"}


def test_the_answer_says_what_favours_whom_and_who_is_ahead_where() -> None:
    def value(cell: Cell) -> float:
        width: float = cell.config["setting"]["width"]
        return lead(20 * width - 10)(cell)

    first, _, *lines = comparison.answer(comparison.grid_points(made_up(value))).splitlines()
    assert (
        first == "NP Merge gains on fine-tuning with more of each of these: width of the network."
    )
    assert lines[0] == (
        "- **width of the network**: \N{MINUS SIGN}5.0 at 0.25, +0.0 at 0.5 (reference), +10.0 at 1; "
        "Fine-tuning is ahead at 0.25; NP Merge is ahead at 1."
    )
    assert lines[1].endswith("nobody is ahead by more than the seeds' spread.")
    one_seed = [one for one in made_up(value) if one.cell.seed == 0]
    first, _, *lines = comparison.answer(comparison.grid_points(one_seed)).splitlines()
    assert first == ""
    assert all(line.endswith("1 seed: not judged.") for line in lines)


def test_the_demonstration_is_small() -> None:
    found = cells("comparison", "digits", SEEDS)
    assert {cell.seed for cell in found} == {0}
    assert len([cell for cell in found if cell.config["aggregate"]["method"] in LEARNERS]) <= 4
    (setting,) = {cell.setting for cell in found}
    trained = next(c for c in cells("same_data", "digits", [0]) if c.setting == setting)
    assert trained.config["setting"] == found[0].config["setting"]  # trains nothing of its own
    assert load("digits", image_size=8).classes == 10
