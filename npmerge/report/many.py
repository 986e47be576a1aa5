"""The figure and the tables of the chapter on many models."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from npmerge.methods import METHODS, Combination
from npmerge.report.captions import captioned, whose
from npmerge.report.claims import FINETUNE, NP_P, PERMUTE
from npmerge.report.numbers import in_order, is_merged, summary
from npmerge.report.plots import describe, label_ends, looks, panels
from npmerge.report.words import NOTHING, plus_minus
from npmerge.store.records import Record, table

TOURNAMENT = "tournament"
"""The paper's way to make one of many."""


def many_scores(records: Sequence[Record]) -> pd.DataFrame:
    """Top-1 accuracy against the number of models, over seeds.

    Args:
        records: of ``many_models`` at one profile.

    Returns:
        ``mean`` and ``std`` in percent for each ``split``, ``method`` and number of ``models``.
    """
    rows = [
        {
            "split": place.split or "balanced",
            "models": place.models,
            "method": method,
            "mean": mean,
            "std": std,
        }
        for place, here in summary(table(records)).items()
        for method, (mean, std) in here.items()
    ]
    return pd.DataFrame(rows)


def many_table(records: Sequence[Record]) -> pd.DataFrame:
    """A row a method, a column for each split and number of models: mean ± standard deviation, as text.

    Args:
        records: of ``many_models`` at one profile.
    """
    rows = many_scores(records)
    cells: dict[str, dict[Combination, str]] = {}
    for row in rows.to_dict("records"):
        column = cells.setdefault(f"{row['split']}, {row['models']} models", {})
        column[row["method"]] = plus_minus(row["mean"], row["std"])
    methods = in_order(rows["method"])
    return captioned(
        pd.DataFrame(
            {title: [found.get(m, NOTHING) for m in methods] for title, found in cells.items()},
            index=[method.label for method in methods],
        ),
        "Every number: top-1 accuracy on the full test set in percent, mean ± standard deviation over the seeds "
        f"({whose(records)}).",
        folded=True,
    )


def plot_many(records: Sequence[Record]) -> Figure:
    """Accuracy of the merged model against how many models went into it, in two panels a split.

    What is merged in a tournament is in the first panel, what is made one in other ways in the second, and what both
    are held against in either. Colours are families and lines alignments.

    Args:
        records: of ``many_models`` at one profile.
    """
    rows = many_scores(records)
    splits, counts = list(dict.fromkeys(rows["split"])), sorted(set(rows["models"]))
    merged = rows["method"].map(is_merged)
    ways = list(dict.fromkeys(method.many for method in rows["method"][merged]))
    groups = [
        group
        for group in ([TOURNAMENT], [way for way in ways if way != TOURNAMENT])
        if set(group) & set(ways)
    ]
    figure, axes = panels([2.6] * len(splits) * len(groups), sharex=True)
    for axis, (split, group) in zip(axes, product(splits, groups), strict=True):
        mine = ~merged | rows["method"].map(lambda method, group=group: method.many in group)
        for method, here in rows[mine & (rows["split"] == split)].groupby("method", sort=False):
            _draw(axis, method, here, main=group[0])
        names = " or ".join(METHODS[way].label for way in group)
        axis.set_title(f"{split}, {names}: test accuracy (%)")
        axis.set_xscale("log", base=2)
        axis.set_xticks(counts, [str(count) for count in counts])
        axis.minorticks_off()
    axes[-1].set_xlabel("models merged into one")
    label_ends(axes)
    last = rows[merged & (rows["models"] == counts[-1])]
    best = last.loc[last.groupby("split", sort=False)["mean"].idxmax()]
    told = [
        f"{row['method'].label} with {row['mean']:.1f} % ({row['split']})"
        for row in best.to_dict("records")
    ]
    title = f"Best of {counts[-1]} models: {', '.join(told)}"
    alt = f"Test accuracy against the number of models, {counts[0]} to {counts[-1]}"
    return describe(figure, f"{alt}, for {rows['method'].nunique()} methods", title)


def _draw(axis: Axes, method: Any, rows: pd.DataFrame, *, main: str) -> None:
    """A method's line; its name leaves out the main way of the panel, which the title says."""
    if not is_merged(method):
        line, marker, name = ":", "", method.label
    elif method.many == main:
        line, marker, _ = looks([method.align])[method.align]
        name = replace(method, many=None).label
    else:
        line, marker, name = "-.", "D", method.label
    x, mean, std = rows["models"], rows["mean"], rows["std"].fillna(0)
    axis.plot(x, mean, ls=line, marker=marker, ms=5, color=method.color, label=name)
    axis.vlines(x, mean - std, mean + std, color=method.color, lw=1)


def parts_table(records: Sequence[Record]) -> pd.DataFrame:
    """What each part adds after Permute, in percentage points, a row a split and number of models.

    Args:
        records: of ``many_models`` at one profile.
    """
    mean = _means(records)
    learned, averaged, tuned = (
        mean[replace(method, many="tournament").label] for method in (NP_P, PERMUTE, FINETUNE[0])
    )
    parts = {
        "by learning alpha": learned - averaged,
        "by the tournament": averaged - mean[replace(PERMUTE, many="all_to_one").label],
        "NP over fine-tuning": learned - tuned,
    }
    return captioned(
        pd.DataFrame(parts).round(1),
        "What each part adds, in percentage points of accuracy, with Permute as the alignment: learning alpha over "
        "plain averaging in the same tournament, that averaging tournament over all to one, and NP Merge over "
        "fine-tuning.",
    )


def trend_table(records: Sequence[Record]) -> pd.DataFrame:
    """The change from the fewest to the most models, in percentage points, a row a method, a column a split.

    Args:
        records: of ``many_models`` at one profile.
    """
    splits = _means(records).groupby(level="split")
    return captioned(
        (splits.last() - splits.first()).T.round(1),
        "The change in accuracy from the fewest models to the most, in percentage points.",
    )


def _means(records: Sequence[Record]) -> pd.DataFrame:
    """A row a split and number of models, a column a method's label."""
    rows = many_scores(records)
    labels = [method.label for method in in_order(rows["method"])]
    rows = rows.assign(method=[method.label for method in rows["method"]])
    return rows.pivot(index=["split", "models"], columns="method", values="mean")[labels]
