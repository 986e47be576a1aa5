"""Tables and plots: records in, the right numbers out, drawn without a fault."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.patches import Rectangle
from reports import (
    ALIGNED,
    AS_TRAINED,
    BASE,
    ENSEMBLE,
    MEANS,
    TABLE,
    record,
    records,
)

from npmerge import experiments
from npmerge.evaluate import PathPoint
from npmerge.methods import METHODS, Combination, method
from npmerge.report import claims, many, pages, plots, sizes, splits, tables, words
from npmerge.report.captions import captioned
from npmerge.report.claims import FINETUNE, NP_P, PERMUTE
from npmerge.report.numbers import Place, by_method
from npmerge.store.records import Cell, Record, Records, table

HERE = "resnet20x1, cifar100"
SPLITS = ("80-20", "dirichlet")
TITLES = [f"{HERE}, 80-20", f"{HERE}, Dirichlet"]
MERGED = {
    replace(way, align=align): 10.0 * number + shift
    for number, way in enumerate((PERMUTE, NP_P, FINETUNE[0], replace(FINETUNE[0], tuned=True)), 1)
    for align, shift in zip(ALIGNED, (0, 1), strict=True)
}
"""Scores that rise by ten from merging only over NP Merge to fine-tuning, and by one from Permute to the other."""


@pytest.fixture(autouse=True)
def _no_window() -> Iterator[None]:
    mpl.use("agg")
    yield
    plt.close("all")


@pytest.fixture
def toy() -> Iterator[Combination]:
    """An aggregation that somebody has registered, after Permute."""

    @method(kind="aggregate", label="Toy", row="Toy-{align}", family="toys", place=900)
    def toy(a: Any, b: Any) -> Any:
        """Take A."""
        return a

    yield Combination("toy", "permute")
    METHODS.remove("toy")


def axes(figure: plt.Figure) -> list[plt.Axes]:
    figure.canvas.draw()
    return figure.axes


def named(figure: plt.Figure) -> set[str]:
    """The names in the legend and at the ends of lines."""
    texts = [text for legend in figure.legends for text in legend.get_texts()]
    texts += [text for axis in figure.axes for text in axis.texts]
    return {text.get_text().replace("\n", " ") for text in texts}


def split_records(
    seed: int = 0, classes: int = 4, split: str = "dirichlet", shares: tuple[int, ...] = ()
) -> list[Record]:
    """The records of the disjoint splits: each model knows what it saw; A saw these shares, in turns."""
    draw = np.random.default_rng(seed)
    first = np.resize(shares, classes) if shares else draw.integers(0, 101, classes)
    seen = np.stack([first, 100 - first]).tolist()
    known = {"classes": {"accuracy": [list(map(float, each)) for each in seen], "seen": seen}}
    measured = {
        m: {"classes": {"accuracy": draw.uniform(0, 100, classes).tolist()}} for m in TABLE[1:]
    }
    details = {AS_TRAINED: known, BASE: known} | measured
    return [
        record(m, 50.0, seed, split=split, details=details.get(m)) for m in (AS_TRAINED, *TABLE)
    ]


def size_records(
    scores: dict[Combination, float] = MERGED,
    counts: tuple[int | str, ...] = (1, 10, "all"),
    seeds: tuple[int, ...] = (0, 1),
    **where: Any,
) -> list[Record]:
    """Records of the data size: the same method scores one point more with the next size and the next seed."""
    return [
        record(
            m, 40.0 if m == BASE else value + place + seed, seed,
            experiment="data_size", examples=examples, **where,
        )
        for place, examples in enumerate(counts)
        for seed in seeds
        for m, value in ({BASE: 0.0} | scores).items()
    ]  # fmt: skip


def many_records() -> list[Record]:
    """A tournament gains a point a model, all to one loses ten."""
    tournament = {NP_P: 80.0, PERMUTE: 60.0, FINETUNE[0]: 75.0}
    scores = {replace(m, many="tournament"): (v, 1) for m, v in tournament.items()}
    scores |= {replace(m, many="all_to_one"): (50.0, -10) for m in (PERMUTE, MEANS[-1])}
    scores |= {ENSEMBLE: (90.0, 0), BASE: (85.0, 0)}
    return [
        record(m, value + slope * models, experiment="many_models", split=split, models=models)
        for split in (None, "dirichlet")
        for models in (4, 2)
        for m, (value, slope) in scores.items()
    ]


def test_our_numbers_stand_beside_the_paper_s() -> None:
    both = records({key: [50.0, 51.0] for key in (AS_TRAINED, *TABLE)})
    found = tables.beside_paper(both)
    ours, paper = f"{HERE}, Dirichlet (ours)", "resnet20x8, cifar100, Dirichlet (paper)"
    assert list(found.columns) == [ours, paper]
    assert set(found.index) == {m.label for m in TABLE}
    assert found.loc["NP-P", ours] == "50.50 ± 0.71"
    assert found.loc["NP-WM", paper] == "73.45 ± 0.18"
    assert found.loc["Finetune-P, tuned (ours)", paper] == words.NOTHING
    assert tables.beside_paper(records({NP_P: [50.0]})).loc["NP-P", ours] == "50.00"


def test_a_method_that_an_experiment_adds_is_in_tables_plots_and_verdicts(toy: Combination) -> None:
    more = records({key: [50.0, 51.0] for key in (*TABLE, toy)})
    assert "Toy-P" in tables.beside_paper(more).index
    assert any("Toy-P" in v.claim.text for v in claims.verdicts(more))
    figure = plots.plot_methods(more)
    assert "Toy-P" in [tick.get_text() for tick in axes(figure)[0].get_yticklabels()]
    small = size_records(MERGED | {toy: 15.0})
    assert (f"{HERE}, Dirichlet (ours)", "Toy") in sizes.data_size_table(small).columns
    assert "Toy" in named(sizes.plot_data_size(small))
    tournament = replace(toy, many="tournament")
    several = [*many_records(), record(tournament, 70.0, experiment="many_models", split=None)]
    assert tournament.label in many.many_table(several).index
    assert "Toy-P" in named(many.plot_many(several))
    known = record(toy, 50.0, details={"classes": {"accuracy": [50.0] * 4}})
    assert "Toy-P" in splits.class_summary([*split_records(), known]).index
    assert "Toy-P" in named(splits.plot_classes([*split_records(), known]))


def test_few_settings_are_columns_of_the_verdicts_and_many_are_rows() -> None:
    few = claims.verdicts(size_records(counts=(1, "all")))
    assert tables.verdict_table(few).shape == (len(claims.CLAIMS["data_size"]), 2)
    several = tables.verdict_table(claims.verdicts(size_records(counts=(1, 5, 10, "all"))))
    assert next(iter(several.index)) == f"{HERE}, Dirichlet, all images"


def test_a_page_shows_the_claims_that_are_judged_and_counts_the_others() -> None:
    """The evidence has them all."""
    count = len(claims.CLAIMS["data_size"])
    status, sentence, evidence = pages.verdict_tables(size_records(counts=(1,), seeds=(0, 1, 2)))
    assert set(status.iloc[:, 0]) == {"reproduced", "not reproduced"}
    assert str(sentence).startswith(f"{count - len(status)} further claim is not judged")
    assert evidence.iloc[0, 0] == "NP-P \N{MINUS SIGN} Permute: +10.0 ± 0.0 (3 seeds)"
    assert (status.folded, evidence.folded) == (False, True)
    status, _, evidence = pages.verdict_tables(size_records(counts=(1,), profile="digits"))
    assert set(status.iloc[:, 0]) == {
        "demonstration: ahead by 10.0", "demonstration: behind by 10.0",
    }  # fmt: skip
    assert evidence.iloc[0, 0] == "NP-P \N{MINUS SIGN} Permute: +10.0 ± 0.0 (2 seeds)"
    sentence, evidence = pages.verdict_tables(size_records(counts=(1,)))
    assert str(sentence).startswith(f"{count} claims are not judged")
    assert len(evidence) == 2


def test_a_caption_says_what_a_table_shows_and_a_long_table_is_folded() -> None:
    table = captioned(pd.DataFrame({"a": ["1 < 2"]}), "A < B.")
    assert table._repr_html_().startswith(
        '<table border="1" class="dataframe">\n  <caption>A &lt; B.'
    )
    assert "1 &lt; 2" in table._repr_html_()
    folded = captioned(table, "A.", folded=True)._repr_html_()
    assert folded.startswith("<details><summary>A.</summary>")
    assert "caption" not in folded
    assert "caption" not in str(table[["a"]]._repr_html_())  # a part is another table


def test_beside_the_paper_s_numbers_stands_the_scale_of_both() -> None:
    own = [record(NP_P, 50.0, seed) for seed in (0, 1)]
    recipe, options = {"recipe": {"epochs": 8}}, {"method": "np_merge", "options": {"epochs": 3}}
    own = [
        one.model_copy(update={"config": {"setting": recipe, "aggregate": options}}) for one in own
    ]
    x = "\N{MULTIPLICATION SIGN}"
    ours = (
        f"profile short, seeds 0, 1, 16{x}16 pixels, 8 epochs of base training, 3 epochs of merging"
    )
    theirs = f"32{x}32 pixels, 200 epochs of base training, 10 epochs of merging"
    assert f"(ours: {ours}; the paper's: {theirs})" in tables.beside_paper(own).caption
    own = [
        record(NP_P, 50.0, experiment="transformers", profile="grid", dataset="digits", model="vit")
    ]
    assert "(profile grid, seed 0)" in tables.beside_paper(own).caption


def test_a_tuned_row_has_the_name_and_colour_of_its_method_and_stands_behind_it() -> None:
    """NP Merge's as well as fine-tuning's."""
    kept = records({m: [50.0, 51.0] for m in TABLE})
    rows = list(tables.beside_paper(kept).index)
    assert rows[-8:] == [
        f"{row}-{align}{tuned}"
        for row in ("Finetune", "NP")
        for tuned in ("", ", tuned (ours)")
        for align in ("P", "WM")
    ]
    (panel,) = axes(plots.plot_methods(kept))
    rows = [tick.get_text() for tick in panel.get_yticklabels()]
    dots = [line for line in panel.lines if line.get_marker() == "o" and len(line.get_ydata())]
    colours = {rows[int(line.get_ydata()[0])]: line.get_color() for line in dots}
    small = MERGED | {replace(m, tuned=True): v + 5 for m, v in MERGED.items() if m.family == "np"}
    sized = sizes.data_size_table(size_records(small))
    first, _ = axes(sizes.plot_data_size(size_records(small)))
    drawn = {line.get_label(): line for line in first.lines}
    for way in ("np_merge", "finetune"):
        label, plain = f"{METHODS[way].label}, tuned (ours)", METHODS[way].label
        assert colours[Combination(way, "permute", tuned=True).label] == METHODS[way].color
        assert (f"{HERE}, Dirichlet (ours)", label) in sized.columns
        assert drawn[label].get_color() == drawn[plain].get_color() == METHODS[way].color
        assert drawn[label].get_linestyle() != drawn[plain].get_linestyle()


def test_a_choice_at_an_edge_of_its_grid_is_marked() -> None:
    def chosen(m: Combination, option: str, value: Any, seed: int = 0) -> Record:
        trials = {"0.1": 1.0, "1": 2.0, "10": 3.0}
        details = {"chosen": {option: {"chosen": value, "trials": trials}}}
        return record(m, 50.0, seed, details=details)

    tuned = replace(FINETUNE[0], tuned=True)
    found = tables.choices(
        [
            record(NP_P, 50.0),
            chosen(MEANS[-1], "ridge", 1.0),
            chosen(tuned, "lr", 10.0),
            chosen(tuned, "lr", 0.1, 1),
            chosen(MEANS[-1], "ridge", "auto", 1),
        ]
    )
    assert list(found.index) == [f"cifar100-resnet20x1-dirichlet, seed {seed}" for seed in (0, 1)]
    assert list(found["CCA Merge: ridge"]) == ["1", "auto"]
    assert list(found[f"{tuned.label}: lr"]) == ["10 (highest tried)", "0.1 (lowest tried)"]


def test_sources_are_a_row_a_setting_and_seed_and_name_what_differs() -> None:
    other = {"device": "NVIDIA H200", "peak_memory_mib": 2000, "seconds": 60.0}
    kept = [record(NP_P, 50.0), record(PERMUTE, 50.0, origin=other), record(NP_P, 50.0, 1)]
    found = tables.sources(kept, stale=kept[2:])
    name = "short/disjoint_splits/cifar100-resnet20x1-dirichlet, seed"
    assert list(found.index) == [f"{name} 0", f"{name} 1 {words.STALE}"]
    assert found.iloc[0].to_dict() == {
        "numbers": "2",
        "revision": "01234567+",
        "device": "CPU (x86_64), threads: 2, NVIDIA H200, threads: 2",
        "torch": "2.15.0",
        "seconds": "660",
        "peak memory": "2000 MiB",
    }


def test_places_say_what_tells_them_apart() -> None:
    place = Place("digits", "vgg11x1", setting="one")
    assert words.place_labels([place]) == {place: "vgg11x1, digits"}
    split = replace(place, split="dirichlet", examples="all")
    assert words.place_labels([split])[split] == "vgg11x1, digits, Dirichlet, all images"
    other = replace(place, setting="two")
    assert list(words.place_labels([place, other]).values()) == [
        "vgg11x1, digits (one)",
        "vgg11x1, digits (two)",
    ]
    four = replace(place, models=4)
    assert list(words.place_labels([place, four]).values()) == [
        "vgg11x1, digits, 2 models",
        "vgg11x1, digits, 4 models",
    ]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(None, "unknown"), (99.4, "99 s"), (100, "2 min"), (5999, "100 min"), (7200, "2.0 h")],
)
def test_durations_are_in_the_unit_that_suits_them(seconds: float | None, text: str) -> None:
    assert words.duration(seconds) == text


def test_numbers_become_text() -> None:
    assert words.signed(-1.25) == "\N{MINUS SIGN}1.2"
    assert words.span([1.0, 1.04, -2.0], ".1f") == "\N{MINUS SIGN}2.0 to 1.0"
    assert words.span([1.0, 1.04], ".1f") == "1.0"
    assert words.plus_minus(1.0, float("nan")) == "1.00"


def test_the_plot_of_the_methods_has_a_panel_a_setting_a_row_a_method_and_a_finding() -> None:
    values = {key: [50.0] for key in TABLE} | {NP_P: [60.0], ENSEMBLE: [70.0]}
    both = [one for split in SPLITS for one in records(values, split=split)]
    figure = plots.plot_methods(both)
    panels = axes(figure)
    assert [panel.get_title() for panel in panels] == TITLES
    rows = [tick.get_text() for tick in panels[0].get_yticklabels()]
    assert rows == [m.label for m in sorted(TABLE, key=lambda m: m.place)]
    assert [text.get_text() for text in panels[0].texts].count("50.0") == len(TABLE) - 2
    assert f"{NP_P.label} is best with 60.0 %" in str(figure.get_label())
    assert "above the ensemble in none of 2 settings" in str(figure.get_label())
    alone = plots.plot_methods(both[: len(TABLE)])
    assert "is 10.0 points below the ensemble" in str(alone.get_label())


def test_a_long_name_has_several_lines_in_its_row() -> None:
    _, (axis,) = plots.panels([plots.rows_height(["short", "long " * 8])])
    rows = plots.name_rows(axis, ["short", "long " * 8])
    labels = [tick.get_text() for tick in axis.get_yticklabels()]
    assert labels == ["short", "long long long long long", "long long long"]
    assert rows["short"] == 0.5
    assert rows["long " * 8] == pytest.approx(np.mean(axis.get_yticks()[1:]))


def test_a_method_without_a_number_in_one_setting_is_left_out_there() -> None:
    some = records({BASE: [50.0], PERMUTE: [40.0]}, split="80-20")
    figure = plots.plot_methods(some + records({key: [50.0] for key in TABLE}))
    first, second = axes(figure)
    assert len(first.lines) < len(second.lines)


def test_paths_are_drawn_by_alignment_and_stored_ones_are_the_last_setting_s_first_seed() -> None:
    points = [{"alpha": a, "accuracy": 50.0, "loss": 1.0} for a in (0.0, 1.0)]
    kept = [
        record(
            m, 50.0, seed, split=split, details={"path": [points[0] | {"accuracy": 10.0 * seed}]}
        )
        for split in SPLITS
        for seed in (1, 2)
        for m in MEANS[:3]
    ]
    found = plots.stored_paths(kept)
    assert found == {m.align: [PathPoint(alpha=0.0, accuracy=10.0, loss=1.0)] for m in MEANS[:3]}
    figure = plots.plot_paths({"permute": [PathPoint(**p) for p in points], **found})
    assert named(figure) == {f"{m.label}: 10.0 % halfway" for m in MEANS[:3]}
    assert "on the line from B (10.0 %) to A (10.0 %)" in str(figure.get_label())


def test_alphas_and_neurons_are_drawn() -> None:
    alpha = {"a.weight": torch.rand(3, 4), "a.bias": torch.rand(3), "b.weight": torch.rand(2, 3)}
    panel, _ = axes(plots.plot_alpha(alpha))
    assert [tick.get_text() for tick in panel.get_yticklabels()] == ["a", "b"]
    matrix = torch.rand(3, 3)
    assert len(axes(plots.plot_correlations(matrix, matrix))) == 3
    maps = torch.rand(4, 5, 5)
    assert len(axes(plots.plot_neuron_pair(torch.rand(4, 3, 8, 8), maps, maps, 0.5))) == 12


def test_the_gain_of_the_batch_norm_reset_is_that_of_each_seed() -> None:
    both = records({AS_TRAINED: [60.0, 50.0], BASE: [58.0, 54.0]})
    (row,) = splits.base_models_table(both).to_dict("records")
    assert row["as trained"] == "55.00 ± 7.07"
    assert row["gain"] == "+1.0 (\N{MINUS SIGN}2.0 to +4.0)"
    (alone,) = splits.base_models_table(both[::2]).to_dict("records")
    assert alone["gain"] == "\N{MINUS SIGN}2.0"


def test_few_classes_are_bars_as_long_as_their_images() -> None:
    seen = {"one": torch.tensor([[3, 0, 5], [1, 4, 5]]), "two": np.ones((2, 3))}
    first, _ = axes(splits.plot_split(seen))
    bars = [patch for patch in first.patches if isinstance(patch, Rectangle)]
    assert len(bars) == len(first.patches)
    assert [bar.get_width() for bar in bars] == [3, 0, 5, 1, 4, 5]
    assert [bar.get_x() for bar in bars] == [0, 0, 0, 3, 0, 5]


def test_many_classes_are_an_area_in_the_order_of_the_first_model_s_share() -> None:
    draw = np.random.default_rng(0).integers(0, 500, 100)
    (axis,) = axes(splits.plot_split({"many": [draw, 500 - draw]}))
    assert list(axis.patches) == []
    heights = axis.collections[0].get_paths()[0].vertices
    line = np.asarray(heights)[:, 1]
    assert line.max() == pytest.approx(draw.max() / 5)
    assert axis.get_xlim() == (0, 100)


def test_the_class_table_has_every_class_of_every_model_once() -> None:
    rows = splits.class_table([one for seed in (0, 1) for one in split_records(seed)])
    assert len(rows) == 2 * 4 * (len(TABLE) + 1)
    a = rows[rows["model"] == "A"]
    assert a["accuracy"].to_list() == pytest.approx(a["share"].to_list())  # it knows what it saw


def test_the_model_that_saw_more_of_a_class_is_told_from_the_other() -> None:
    kept = [one for seed in (0, 1) for split in SPLITS for one in split_records(seed, split=split)]
    found = splits.class_summary(kept)
    assert set(found.columns.get_level_values(0)) == set(TITLES)
    mean, worst = found[TITLES[0]].to_numpy().T
    assert list(found.index[:2]) == ["base model that saw more", "base model that saw less"]
    assert mean[0] + mean[1] == pytest.approx(100, abs=0.11)
    assert mean[0] > 50 > mean[1]
    assert (worst <= mean).all()
    assert {"Ensemble", "Permute", "NP-P", "Finetune-P"} < set(found.index)


@pytest.mark.parametrize("classes", [4, 100])
def test_the_plot_of_the_classes_has_a_panel_a_setting(classes: int) -> None:
    kept = [one for s in SPLITS for seed in (0, 1, 2) for one in split_records(seed, classes, s)]
    figure = splits.plot_classes(kept)
    panels = axes(figure)
    assert [panel.get_title() for panel in panels] == TITLES
    assert all(len(panel.lines) == 6 for panel in panels)
    assert {"A alone", "B alone", "Ensemble"} < named(figure)


def test_classes_of_which_a_saw_one_of_two_shares_have_a_row_each() -> None:
    kept = [one for seed in (0, 1) for one in split_records(seed, 6, "80-20", shares=(80, 20))]
    (panel,) = axes(splits.plot_classes(kept))
    *models, half = panel.lines
    assert [line.get_label() for line in models][:3] == ["A alone", "B alone", "Ensemble"]
    assert all(len(line.get_ydata()) == 6 for line in models)
    assert half.get_ydata()[0] == 2.5  # three classes of each kind
    first = models[0].get_xdata()
    assert max(first[:3]) == 20
    assert min(first[3:]) == 80


def test_places_of_a_setting_go_from_few_models_to_many_and_from_many_images_to_few() -> None:
    found = by_method(table(size_records({}, (1, 10, 100, 5, "all"), seeds=(0,))))
    assert [place.examples for place in found] == ["all", 100, 10, 5, 1]
    assert [place.models for place in by_method(table(many_records()))] == [2, 4, 2, 4]


def test_the_data_size_table_has_our_rows_and_the_paper_s() -> None:
    found = sizes.data_size_table(size_records(counts=(1, 50, "all")))
    ours, paper = f"{HERE}, Dirichlet (ours)", "resnet20x8, cifar100, Dirichlet (paper)"
    names = ["all", "100 a class", "50 a class", "10 a class", "5 a class", "1 a class"]
    assert list(found.index) == [(m, n) for m in ("Permute", "Weight Matching") for n in names]
    np_merge, tuning = METHODS["np_merge"].label, METHODS["finetune"].label
    assert found.loc[("Weight Matching", "all"), (paper, np_merge)] == "73.45 ± 0.18"
    assert found.loc[("Permute", "1 a class"), (paper, tuning)] == "56.97 ± 0.31"
    assert found.loc[("Permute", "1 a class"), (ours, METHODS["mean"].label)] == "10.50 ± 0.71"
    assert found.loc[("Permute", "50 a class"), (ours, np_merge)] == "21.50 ± 0.71"
    assert found.loc[("Permute", "50 a class"), (paper, np_merge)] == words.NOTHING
    assert (ours, f"{tuning}, tuned (ours)") in found.columns
    assert (paper, f"{tuning}, tuned (ours)") not in found.columns


def test_the_winner_is_named_with_its_lead_and_its_seeds() -> None:
    first, *others = size_records({NP_P: 99.0}, (5,), seeds=(0,))[1:]
    kept = [first, *others, *(one for one in size_records(counts=(5,)) if _other(one, first))]
    found = sizes.data_size_winners(kept)
    assert list(found.index) == [(f"{HERE}, Dirichlet", "5 a class")]
    (row,) = found.to_dict("records")
    assert row["after Permute"] == "NP-P, +19.5 ± 501.9 (2 seeds) over Finetune-P, tuned (ours)"
    assert row["after Weight Matching"] == (
        "Finetune-WM, tuned (ours), +20.0 ± 0.0 (2 seeds) over NP-WM"
    )


def _other(one: Record, than: Record) -> bool:
    return (one.cell.name, one.cell.seed) != (than.cell.name, than.cell.seed)


def test_sizes_stand_in_order_one_step_apart() -> None:
    panels = axes(sizes.plot_data_size(size_records()))
    assert len(panels) == 2
    for panel in panels:
        assert np.asarray(panel.lines[0].get_xdata()).tolist() == [0, 1, 2]
        assert len(panel.lines) == 5  # four methods and the base models
    assert panels[0].lines[0].get_ydata() == pytest.approx([10.5, 11.5, 12.5])
    assert [tick.get_text() for tick in panels[1].get_xticklabels()] == ["1", "10", "all"]
    assert "with all images" in str(panels[0].figure.get_label())


def test_the_paper_s_lines_are_drawn_only_in_its_own_setting() -> None:
    own = size_records(counts=(1, 100, "all"), profile="paper", width=8.0)
    _, panel = axes(sizes.plot_data_size(own))
    assert len(panel.lines) == 5 + 3  # merged only, NP, fine-tuning
    assert np.asarray(panel.lines[1].get_xdata()).tolist() == [0, 1, 2, 3, 4]
    assert np.asarray(panel.lines[0].get_xdata()).tolist() == [0, 3, 4]


def test_one_seed_is_drawn_without_a_band_and_two_settings_are_refused() -> None:
    kept = size_records(seeds=(0,))
    axes(sizes.plot_data_size(kept))
    kept += size_records(split="80-20")
    with pytest.raises(ValueError, match="give the records of one"):
        sizes.plot_data_size(kept)


def test_many_models_are_columns_from_few_to_many() -> None:
    found = many.many_table(many_records())
    assert list(found.columns) == [
        f"{split}, {count} models" for split in ("balanced", "dirichlet") for count in (2, 4)
    ]
    assert found.loc[replace(NP_P, many="tournament").label, "balanced, 4 models"] == "84.00"


def test_the_plot_of_many_models_has_two_panels_a_split_and_names_lines_at_their_ends() -> None:
    figure = many.plot_many(many_records())
    panels = axes(figure)
    ways = [METHODS[way].label for way in ("tournament", "all_to_one")]
    assert [panel.get_title() for panel in panels] == [
        f"{split}, {way}: test accuracy (%)" for split in ("balanced", "dirichlet") for way in ways
    ]
    references = {ENSEMBLE.label, BASE.label}
    first, second = ({text.get_text() for text in panel.texts} for panel in panels[:2])
    assert first == references | {m.label for m in (NP_P, PERMUTE, FINETUNE[0])}
    assert second == references | {m.label for m in (PERMUTE, MEANS[-1])}
    label = replace(NP_P, many="tournament").label
    assert str(figure.get_label()).startswith(f"Best of 4 models: {label} with 84.0 % (balanced)")


def test_what_each_part_adds_and_the_trend_are_differences() -> None:
    added = many.parts_table(many_records()).loc[("balanced", 2)]
    assert added.to_dict() == {
        "by learning alpha": 20.0, "by the tournament": 62.0 - 30.0, "NP over fine-tuning": 5.0,
    }  # fmt: skip
    trend = many.trend_table(many_records())["dirichlet"]
    assert trend[replace(NP_P, many="tournament").label] == 2.0
    assert trend[replace(PERMUTE, many="all_to_one").label] == -20.0
    assert trend[ENSEMBLE.label] == 0.0


@pytest.mark.parametrize("old", [True, False])
def test_published_records_that_today_s_configuration_would_not_give_are_marked(
    monkeypatch: pytest.MonkeyPatch, old: bool
) -> None:
    kept = [record(NP_P, 50.0), record(PERMUTE, 40.0)]
    today = [
        Cell(**one.cell.model_dump(), config={"epochs": 1} if old and one is kept[1] else {})
        for one in kept
    ]
    said: list[Any] = []
    monkeypatch.setattr("IPython.display.display", said.append)
    monkeypatch.setattr(experiments, "cells", lambda *_: today)
    monkeypatch.setattr(Records, "read", lambda _, profile, __: kept if profile == "short" else [])
    found = pages.published("disjoint_splits", lambda _: "text", tables.beside_paper)
    assert found == {"short": kept}
    texts = [one.data for one in said if not isinstance(one, pd.DataFrame)]
    title, made, *notes, missing = texts
    assert missing == "No records are published yet for `paper`."
    assert "seed 0" in title
    assert made == "text"
    assert len(said) == 4 + old  # the demonstration's are not published
    assert (words.STALE in title) == old
    assert len(notes) == old
    if old:
        assert "1 of 2 records (cifar100-resnet20x1-dirichlet/seed0)" in notes[0]
    assert pages.stale(kept) == kept[1:] * old
    said.clear()
    monkeypatch.setattr(Records, "read", lambda *_: [])
    assert pages.published("disjoint_splits", lambda _: "text") == {}
    assert [one.data for one in said] == ["No records are published yet for `paper` and `short`."]
