"""The figure and the tables of the chapter on many models."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure

from npmerge.methods import Combination
from npmerge.report.claims import FINETUNE, NP_P, PERMUTE
from npmerge.report.numbers import in_order, is_merged, summary
from npmerge.report.plots import REFERENCES, legend_below, looks
from npmerge.report.words import NOTHING, plus_minus
from npmerge.store.records import Record, table

MARKERS = "osDv^"
"""Of the ways to make one of many; they begin again where there are more."""


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
    return pd.DataFrame(
        {title: [found.get(m, NOTHING) for m in methods] for title, found in cells.items()},
        index=[method.label for method in methods],
    )


def plot_many(records: Sequence[Record]) -> Figure:
    """Accuracy of the merged model against how many models went into it, in one panel a split.

    Colours are families, lines alignments, and marks the way to make one of many.

    Args:
        records: of ``many_models`` at one profile.
    """
    rows = many_scores(records)
    methods, splits = in_order(rows["method"]), list(dict.fromkeys(rows["split"]))
    lines = looks(m.align for m in methods if m.align is not None)
    ways = list(dict.fromkeys(m.many for m in methods if is_merged(m)))
    references = [m for m in methods if not is_merged(m)]
    figure, axes = plt.subplots(
        len(splits), 1, figsize=(6.4, 0.9 + 3.4 * len(splits)), sharex=True, squeeze=False,
        layout="constrained",
    )  # fmt: skip
    for axis, split in zip(axes[:, 0], splits, strict=True):
        for method in methods:
            here = rows[(rows["split"] == split) & (rows["method"] == method)]
            if here.empty:
                continue
            if is_merged(method):
                line = lines[method.align][0] if method.align is not None else "-."
                marker = MARKERS[ways.index(method.many) % len(MARKERS)]
            else:
                line, marker = REFERENCES[references.index(method) % len(REFERENCES)], ""
            axis.errorbar(
                here["models"], here["mean"], here["std"].fillna(0), color=method.color, ls=line,
                marker=marker, ms=6, lw=1.6, capsize=2, label=method.label,
            )  # fmt: skip
        axis.set_title(split if split == "balanced" else f"{split} split", fontsize=11)
        axis.set_ylabel("test accuracy (%)")
        axis.set_xscale("log", base=2)
        counts = sorted(set(rows["models"]))
        axis.set_xticks(counts, [str(count) for count in counts])
        axis.minorticks_off()
    axes[-1][0].set_xlabel("models merged into one")
    legend_below(figure, ncols=2)
    return figure


def parts_table(records: Sequence[Record]) -> pd.DataFrame:
    """What each part adds after Permute, in percentage points, a row a split and number of models.

    Args:
        records: of ``many_models`` at one profile.
    """
    mean = _means(records)
    learned, averaged, tuned = (
        mean[replace(method, many="tournament").label] for method in (NP_P, PERMUTE, FINETUNE[0])
    )
    return pd.DataFrame(
        {
            "by learning alpha": learned - averaged,
            "by the tournament": averaged - mean[replace(PERMUTE, many="all_to_one").label],
            "NP over fine-tuning": learned - tuned,
        }
    ).round(1)


def trend_table(records: Sequence[Record]) -> pd.DataFrame:
    """The change from the fewest to the most models, in percentage points, a row a method, a column a split.

    Args:
        records: of ``many_models`` at one profile.
    """
    splits = _means(records).groupby(level="split")
    return (splits.last() - splits.first()).T.round(1)


def _means(records: Sequence[Record]) -> pd.DataFrame:
    """A row a split and number of models, a column a method's label."""
    rows = many_scores(records)
    labels = [method.label for method in in_order(rows["method"])]
    rows = rows.assign(method=[method.label for method in rows["method"]])
    return rows.pivot(index=["split", "models"], columns="method", values="mean")[labels]
