"""Tables and plots: records in, the right numbers out, drawn without a fault."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from matplotlib.patches import Rectangle

from npmerge import figures, size_figures, split_figures
from npmerge.data import load
from npmerge.paper import METHODS
from npmerge.results import table

SPLITS = {"80-20": "split_80_20", "dirichlet": "dirichlet"}
ALIGNED = ("permute", "weight_matching")
LEARNED = ("", "np_", "finetune_", "finetune_tuned_")


@pytest.fixture(autouse=True)
def _no_window() -> Iterator[None]:
    mpl.use("agg")
    yield
    plt.close("all")


def content(
    values: dict[str, float],
    seed: int = 0,
    *,
    split: str = "dirichlet",
    dataset: str = "digits",
    model: str = "resnet20x0.5",
    examples: int | str | None = None,
) -> dict[str, Any]:
    """A record file of one unit, as far as tables and plots read it."""
    place = {
        "table": "II" if examples is None else "IV",
        "dataset": dataset,
        "model": model,
        "setting": SPLITS[split],
        "examples_per_class": examples,
    }
    return {
        "unit": {"profile": "tiny", "experiment": "", "setting": split, "seed": seed},
        "config": {
            "setting": {"beside": ["cifar100", "resnet20x8"]},
            "examples_per_class": examples,
        },
        "records": [
            place | {"method": method, "metric": "top1", "value": value}
            for method, value in values.items()
        ],
        "details": {},
    }


def split_content(seed: int = 0, classes: int = 4, **where: Any) -> dict[str, Any]:
    """A record file of the disjoint splits: each model knows what it saw."""
    draw = np.random.default_rng(seed)
    first = draw.integers(0, 101, classes)
    seen = np.stack([first, 100 - first])
    found = content(dict.fromkeys(["base_avg", "base_avg_no_reset", *METHODS], 50.0), seed, **where)
    merged = ("ensemble", "permute", "np_permute", "finetune_permute")
    accuracy = {"A": seen[0], "B": seen[1]} | {m: draw.uniform(0, 100, classes) for m in merged}
    found["details"]["classes"] = {
        "seen": seen.tolist(),
        "accuracy": {name: list(map(float, values)) for name, values in accuracy.items()},
    }
    return found


def size_contents(
    scores: dict[str, float],
    sizes: tuple[int | str, ...] = (1, 10, "all"),
    seeds: tuple[int, ...] = (0, 1),
    **where: Any,
) -> list[dict[str, Any]]:
    """Record files of the data size: the same method scores one point more with the next size and the next seed."""
    return [
        content(
            {"base_avg": 40.0} | {m: v + place + seed for m, v in scores.items()},
            seed,
            examples=examples,
            **where,
        )
        for place, examples in enumerate(sizes)
        for seed in seeds
    ]


SCORES = {
    f"{prefix}{method}": 10.0 * place + shift
    for place, prefix in enumerate(LEARNED, 1)
    for method, shift in zip(ALIGNED, (0, 1), strict=True)
}


def axes(figure: plt.Figure) -> list[plt.Axes]:
    figure.canvas.draw()
    return figure.axes


def test_the_gain_of_the_batch_norm_reset_is_that_of_each_seed() -> None:
    both = [
        content({"base_avg_no_reset": 60.0, "base_avg": 58.0}),
        content({"base_avg_no_reset": 50.0, "base_avg": 54.0}, 1),
    ]
    (row,) = split_figures.base_models_table(table(both)).to_dict("records")
    assert row["as trained"] == "55.00 ± 7.07"
    assert row["gain"] == "+1.0 (\N{MINUS SIGN}2.0 to +4.0)"
    (alone,) = split_figures.base_models_table(table(both[:1])).to_dict("records")
    assert alone["gain"] == "\N{MINUS SIGN}2.0"


def test_few_classes_are_bars_as_long_as_their_images() -> None:
    seen = {"one": torch.tensor([[3, 0, 5], [1, 4, 5]]), "two": np.ones((2, 3))}
    first, _ = axes(split_figures.plot_split(seen))
    bars = [patch for patch in first.patches if isinstance(patch, Rectangle)]
    assert len(bars) == len(first.patches)
    widths = [bar.get_width() for bar in bars]
    assert widths == [3, 0, 5, 1, 4, 5]
    starts = [bar.get_x() for bar in bars]
    assert starts == [0, 0, 0, 3, 0, 5]


def test_many_classes_are_an_area_in_the_order_of_the_first_model_s_share() -> None:
    draw = np.random.default_rng(0).integers(0, 500, 100)
    (axis,) = axes(split_figures.plot_split({"many": [draw, 500 - draw]}))
    assert list(axis.patches) == []
    heights = axis.collections[0].get_paths()[0].vertices
    line = np.asarray(heights)[:, 1]
    assert line.max() == pytest.approx(draw.max() / 5)
    assert axis.get_xlim() == (0, 100)


def test_the_class_table_has_every_class_of_every_model() -> None:
    rows = split_figures.class_table([split_content(seed) for seed in (0, 1)])
    assert len(rows) == 2 * 4 * 6
    a = rows[rows["model"] == "A"]
    assert a["accuracy"].to_list() == pytest.approx(a["share"].to_list())  # it knows what it saw


def test_the_model_that_saw_more_of_a_class_is_told_from_the_other() -> None:
    contents = [split_content(seed, split=split) for seed in (0, 1) for split in SPLITS]
    found = split_figures.class_summary(contents)
    assert set(found.columns.get_level_values(0)) == {
        "resnet20x0.5, digits, 80-20",
        "resnet20x0.5, digits, Dirichlet",
    }
    mean, worst = found["resnet20x0.5, digits, 80-20"].to_numpy().T
    assert list(found.index[:2]) == ["base model that saw more", "base model that saw less"]
    assert mean[0] + mean[1] == pytest.approx(100, abs=0.11)
    assert mean[0] > 50 > mean[1]
    assert (worst <= mean).all()
    assert {"Ensemble", "Permute", "NP-P", "Finetune-P"} < set(found.index)


@pytest.mark.parametrize("classes", [4, 100])
def test_the_plot_of_the_classes_has_a_panel_a_setting(classes: int) -> None:
    contents = [split_content(seed, classes, split=s) for seed in (0, 1, 2) for s in SPLITS]
    panels = axes(split_figures.plot_classes(contents))
    assert [panel.get_title() for panel in panels] == [
        "resnet20x0.5, digits, 80-20",
        "resnet20x0.5, digits, Dirichlet",
    ]
    assert all(len(panel.lines) == 5 for panel in panels)


def test_sizes_are_ordered_by_number_and_not_by_name() -> None:
    contents = size_contents(SCORES, (1, 10, 100, 5, "all"), seeds=(0,))
    ordered = [c["config"]["examples_per_class"] for c in size_figures.largest_first(contents)]
    assert ordered == ["all", 100, 10, 5, 1]


def test_the_data_size_table_has_our_rows_and_the_paper_s() -> None:
    contents = size_contents(SCORES, (1, 50, "all"))
    found = size_figures.data_size_table(contents, table(contents))
    ours, paper = (
        "resnet20x0.5, digits, Dirichlet (ours)",
        "resnet20x8, cifar100, Dirichlet (paper)",
    )
    names = ["all", "100 a class", "50 a class", "10 a class", "5 a class", "1 a class"]
    assert list(found.index) == [(m, n) for m in ("Permute", "Weight Matching") for n in names]
    assert found.loc[("Weight Matching", "all"), (paper, "NP")] == "73.45 ± 0.18"
    assert found.loc[("Permute", "1 a class"), (paper, "Finetune")] == "56.97 ± 0.31"
    assert found.loc[("Permute", "1 a class"), (ours, "Merged only")] == "10.50 ± 0.71"
    assert found.loc[("Permute", "50 a class"), (ours, "NP")] == "21.50 ± 0.71"
    assert found.loc[("Permute", "50 a class"), (paper, "NP")] == figures.NOTHING
    assert (ours, "Finetune, tuned (ours)") in found.columns
    assert (paper, "Finetune, tuned (ours)") not in found.columns


def test_the_winner_is_named_with_its_lead_and_its_seeds() -> None:
    contents = size_contents(SCORES, (5,))
    contents[0]["records"][1 + 2]["value"] = 99.0  # NP after Permute, first seed
    found = size_figures.data_size_winners(table(contents))
    assert list(found.index) == [("resnet20x0.5, digits, Dirichlet", "5 a class")]
    (row,) = found.to_dict("records")
    assert row["after Permute"] == "NP-P, +19.5 to Finetune-P, tuned (ours) (1 of 2 seeds)"
    assert row["after Weight Matching"] == (
        "Finetune-WM, tuned (ours), +20.0 to NP-WM (2 of 2 seeds)"
    )


def test_all_images_stand_at_their_number_on_a_log_axis() -> None:
    contents = size_contents(SCORES)
    panels = axes(size_figures.plot_data_size(contents, table(contents)))
    assert len(panels) == 2
    for panel in panels:
        assert panel.get_xscale() == "log"
        assert np.asarray(panel.lines[0].get_xdata()).tolist() == [1, 10, 130]
        assert len(panel.lines) == 5  # four methods and the base models
    assert panels[0].lines[0].get_ydata() == pytest.approx([10.5, 11.5, 12.5])


def test_the_paper_s_lines_are_drawn_only_in_its_own_setting() -> None:
    own = size_contents(SCORES, (1, 100, "all"), dataset="cifar100", model="resnet20x8")
    _, panel = axes(size_figures.plot_data_size(own, table(own)))
    assert len(panel.lines) == 5 + 3  # merged only, NP, fine-tuning
    assert np.asarray(panel.lines[1].get_xdata()).tolist() == [1, 5, 10, 100, 500]


def test_one_seed_is_drawn_without_a_band_and_two_settings_are_refused() -> None:
    contents = size_contents(SCORES, seeds=(0,))
    axes(size_figures.plot_data_size(contents, table(contents)))
    contents += size_contents(SCORES, split="80-20")
    with pytest.raises(ValueError, match="give the records of one"):
        size_figures.plot_data_size(contents, table(contents))


def test_the_images_a_class_are_those_of_the_data() -> None:
    data = load("digits", image_size=8)
    assert size_figures.TRAINING_IMAGES["digits"] == round(len(data.train.labels) / data.classes)
