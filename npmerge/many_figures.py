"""The figure and the table of the chapter on many models."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure

from npmerge.figures import COLORS, NOTHING, plus_minus
from npmerge.paper import METHODS, label
from npmerge.results import table

LOOKS = {
    "np_permute": (COLORS["np"], "-", "o"),
    "np_weight_matching": (COLORS["np"], "--", "s"),
    "finetune_permute": (COLORS["finetune"], "-", "D"),
    "tournament_permute": ("#E0A030", "-", "o"),
    "tournament_weight_matching": ("#E0A030", "--", "s"),
    "permute": (COLORS["earlier"], "-", "o"),
    "weight_matching": (COLORS["earlier"], "--", "s"),
    "cca": (COLORS["earlier"], ":", "^"),
    "merge_many": ("#4F8F6B", "--", "v"),
    "ensemble": (COLORS["reference"], "-", ""),
    "base_avg": (COLORS["reference"], "--", ""),
}
"""Colour, line and marker of each method: colours are families, solid lines Permute, dashed ones weight matching."""


def many_scores(contents: Sequence[dict[str, Any]]) -> pd.DataFrame:
    """Top-1 accuracy against the number of models, over seeds.

    Args:
        contents: record files of ``many_models``, from :meth:`npmerge.results.Results.read`.

    Returns:
        ``mean`` and ``std`` in percent for each split, method and number of models.
    """
    parts = [
        table([content]).assign(
            models=content["config"]["models"],
            split=content["config"]["setting"].get("split") or "balanced",
        )
        for content in contents
    ]
    rows = pd.concat(parts)
    rows = rows[(rows["metric"] == "top1") & rows["method"].isin(METHODS)]
    return rows.groupby(["split", "method", "models"])["value"].agg(["mean", "std"]).reset_index()


def many_table(contents: Sequence[dict[str, Any]]) -> pd.DataFrame:
    """A row a method, a column for each split and number of models: mean ± standard deviation, as text.

    Args:
        contents: record files of ``many_models``.
    """
    rows = many_scores(contents)
    order = [method for method in METHODS if method in set(rows["method"])]
    columns = sorted(set(zip(rows["split"], rows["models"], strict=True)))
    cells = {
        (row["split"], row["models"], row["method"]): plus_minus(row["mean"], row["std"])
        for row in rows.to_dict("records")
    }
    return pd.DataFrame(
        {
            f"{split}, {count} models": [
                cells.get((split, count, method), NOTHING) for method in order
            ]
            for split, count in columns
        },
        index=[_name(method) for method in order],
    )


def plot_many(contents: Sequence[dict[str, Any]]) -> Figure:
    """Accuracy of the merged model against how many models went into it, in one panel a split.

    Args:
        contents: record files of ``many_models``.
    """
    rows = many_scores(contents)
    splits = sorted(set(rows["split"]))
    figure, axes = plt.subplots(
        len(splits), 1, figsize=(6.4, 0.9 + 3.4 * len(splits)), sharex=True, squeeze=False,
        layout="constrained",
    )  # fmt: skip
    for axis, split in zip(axes[:, 0], splits, strict=True):
        for method, (colour, line, marker) in LOOKS.items():
            here = rows[(rows["split"] == split) & (rows["method"] == method)]
            if here.empty:
                continue
            axis.errorbar(
                here["models"], here["mean"], here["std"].fillna(0), color=colour, ls=line,
                marker=marker or None, ms=6, lw=1.6, capsize=2, label=_name(method),
            )  # fmt: skip
        axis.set_title(split if split == "balanced" else f"{split} split", fontsize=11)
        axis.set_ylabel("test accuracy (%)")
        axis.set_xscale("log", base=2)
        counts = sorted(set(rows["models"]))
        axis.set_xticks(counts, [str(count) for count in counts])
        axis.minorticks_off()
    axes[-1][0].set_xlabel("models merged into one")
    handles, names = axes[0][0].get_legend_handles_labels()
    figure.legend(
        [handle[0] for handle in handles], names, loc="outside lower center", ncols=2,
        frameon=False, fontsize=9.5,
    )  # fmt: skip
    return figure


def _name(method: str) -> str:
    all_to_one = ("permute", "weight_matching", "cca")
    tournaments = ("np_permute", "np_weight_matching", "finetune_permute")
    how = ", all to one" * (method in all_to_one) + " tournament" * (method in tournaments)
    return label(method).removesuffix(" (ours)") + how
