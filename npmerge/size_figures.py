"""The tables and the figure of the chapter on the size of the optimisation data."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from npmerge.figures import (
    COLORS,
    NOTHING,
    at,
    family,
    legend_below,
    mean_std,
    summary,
    summary_of_paper,
)
from npmerge.paper import PLACE, label, place_label, scores, signed

TRAINING_IMAGES = {"digits": 130, "cifar10": 5000, "cifar100": 500}
"""Training images a class, rounded."""
_ALIGNED = ("permute", "weight_matching")
_SIZE_METHODS = {
    "Merged only": "",
    "NP": "np_",
    "Finetune": "finetune_",
    "Finetune, tuned (ours)": "finetune_tuned_",
}


def largest_first(contents: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Record files in the order of their optimisation images a class, from all of them downwards.

    Args:
        contents: of ``data_size``, from :meth:`npmerge.results.Results.read`.
    """
    return sorted(contents, key=lambda c: _images(c["config"]["examples_per_class"]), reverse=True)


def data_size_table(contents: Sequence[dict[str, Any]], table: pd.DataFrame) -> pd.DataFrame:
    """Our numbers on optimisation data of several sizes beside the paper's.

    Args:
        contents: of ``data_size``, from :meth:`npmerge.results.Results.read`; their configuration names the paper's
            column.
        table: their records.

    Returns:
        A row for each alignment and number of images a class, ours or the paper's; for each setting the methods' mean ±
        std in ours and in the paper, as text.
    """
    ours, paper = summary(table), summary_of_paper()
    paper = paper[paper["table"] == "IV"]
    beside = {tuple(c["records"][0][key] for key in PLACE[:3]): _beside(c) for c in contents}
    sizes = sorted({*ours["examples_per_class"], *paper["examples_per_class"]}, key=_images)[::-1]
    cells: dict[tuple[str, str], list[str]] = {}
    for (dataset, model, setting), (their_data, their_model) in beside.items():
        there = place_label(their_data, their_model, setting)
        for title, source, where in (
            (f"{place_label(dataset, model, setting)} (ours)", ours, (dataset, model, setting)),
            (f"{there} (paper)", paper, (their_data, their_model, setting)),
        ):
            found = {size: at(source, (*where, size)) for size in sizes}
            for name, prefix in _SIZE_METHODS.items():
                cells[title, name] = [
                    mean_std(found[s], prefix + m) for m in _ALIGNED for s in sizes
                ]
    rows = [(label(method), _size_label(size)) for method in _ALIGNED for size in sizes]
    index = pd.MultiIndex.from_tuples(rows, names=["alignment", "images"])
    result = pd.DataFrame(cells, index=index)
    return result.loc[:, (result != NOTHING).any()]


def data_size_winners(table: pd.DataFrame) -> pd.DataFrame:
    """Which method is best at each number of optimisation images a class, and how far ahead of another family it is.

    Merging only, NP Merge and fine-tuning, at either learning rate, are the families.

    Args:
        table: records of ``data_size``, as :func:`npmerge.results.table` gives them.

    Returns:
        A row for each setting and number of images, a column an alignment: the method with the highest mean, its lead
        over the best method of another family in percentage points, and the number of seeds in which it is ahead.
    """
    rows: dict[tuple[str, str], dict[str, str]] = {}
    for place, here in scores(table).groupby(level=PLACE, sort=False):
        *setting, size = map(str, place)
        for method in _ALIGNED:
            found = here[[prefix + method for prefix in _SIZE_METHODS.values()]]
            means = found.mean()
            first = str(means.idxmax())
            others = [m for m in map(str, found) if family(m) != family(first)]
            rival = str(means[others].idxmax())
            lead = found[first] - found[rival]
            key = (place_label(*setting), _size_label(size))
            rows.setdefault(key, {})[f"after {label(method)}"] = (
                f"{label(first)}, {signed(lead.mean())} to {label(rival)} "
                f"({(lead > 0).sum()} of {len(lead)} seeds)"
            )
    index = pd.MultiIndex.from_tuples(rows, names=["setting", "images"])
    return pd.DataFrame(list(rows.values()), index=index)


def plot_data_size(contents: Sequence[dict[str, Any]], table: pd.DataFrame) -> Figure:
    """Accuracy against the number of optimisation images a class, in one panel an alignment, of one setting.

    Bands are standard deviations over the seeds. The base models' line is their mean with batch norm reset on all
    training images. Where the setting is the paper's own, thin dashed lines are the paper's numbers.

    Args:
        contents: of ``data_size`` in one setting, from :meth:`npmerge.results.Results.read`.
        table: their records.

    Raises:
        ValueError: there are several settings.
    """
    settings = list(dict.fromkeys(table[PLACE[:3]].itertuples(index=False, name=None)))
    if len(settings) != 1:
        raise ValueError(f"{len(settings)} settings, {settings}: give the records of one")
    ((dataset, model, setting),) = settings
    whole = TRAINING_IMAGES[dataset]
    ours, paper = summary(table), summary_of_paper()
    paper = paper[(paper["table"] == "IV") & (_beside(contents[0]) == (dataset, model))]
    figure, axes = plt.subplots(
        2, 1, figsize=(6.4, 7), sharex=True, sharey=True, layout="constrained"
    )
    looks = {
        "Merged only": (COLORS["earlier"], "o", "-"),
        "NP": (COLORS["np"], "o", "-"),
        "Finetune": (COLORS["finetune"], "s", "-"),
        "Finetune, tuned (ours)": (COLORS["finetune"], "D", ":"),
    }
    base = ours[(ours["method"] == "base_avg") & (ours["examples_per_class"] == "all")]
    for axis, aligned in zip(axes, _ALIGNED, strict=True):
        for name, (colour, marker, line) in looks.items():
            rows = _by_size(ours, _SIZE_METHODS[name] + aligned, whole)
            axis.plot(rows["k"], rows["mean"], line, marker=marker, ms=6, color=colour, label=name)
            low, high = (rows["mean"] + sign * rows["std"].fillna(0) for sign in (-1, 1))
            axis.fill_between(rows["k"], low, high, color=colour, alpha=0.15, lw=0)
            theirs = _by_size(paper, _SIZE_METHODS[name] + aligned, whole)
            if len(theirs):
                axis.plot(theirs["k"], theirs["mean"], "--", color=colour, lw=1)
        for value in base["mean"]:
            axis.axhline(
                value, color=COLORS["reference"], ls="-.", lw=1.2, label="Base models avg."
            )
        axis.set_title(f"after {label(aligned)}", fontsize=11)
        axis.set_ylabel("test accuracy (%)")
    if len(paper):
        axes[0].plot([], [], "--", color=COLORS["reference"], lw=1, label="the paper's")
    ticks = _by_size(ours, "permute", whole)
    axes[-1].set_xscale("log")
    axes[-1].set_xticks(ticks["k"], ticks["tick"])
    axes[-1].minorticks_off()
    axes[-1].set_xlabel("optimisation images a class (log scale)")
    figure.suptitle(place_label(dataset, model, setting), fontsize=12)
    legend_below(figure, axes[0], ncols=2)
    return figure


def _by_size(rows: pd.DataFrame, method: str, whole: int) -> pd.DataFrame:
    """A method's rows with ``k`` images a class and what the axis says there."""
    rows = rows[rows["method"] == method]
    sizes = rows["examples_per_class"].map(_images).clip(upper=whole)
    ticks = [f"all\n({whole})" if s == "all" else s for s in rows["examples_per_class"]]
    return rows.assign(k=sizes, tick=ticks).sort_values("k")


def _images(examples: int | str) -> float:
    return np.inf if examples == "all" else float(examples)


def _size_label(examples: str) -> str:
    return "all" if examples == "all" else f"{examples} a class"


def _beside(content: dict[str, Any]) -> tuple[str, str]:
    dataset, model = content["config"]["setting"]["beside"]
    return dataset, model
