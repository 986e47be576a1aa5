"""The plots that chapters share."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import chain, cycle
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from npmerge.evaluate import PathPoint
from npmerge.methods import METHODS
from npmerge.report.numbers import by_method, in_order, is_merged, shown
from npmerge.report.words import place_labels
from npmerge.store.records import Record, table

MODELS = {"A": "#2A9D8F", "B": "#E9A23B"}
"""Colours of base models; distinguishable without red-green vision and on both themes' cards."""
REFERENCES = ("--", "-", "-.", ":")
"""Lines of what merged models are held against."""
LOOKS = (
    ("-", "o", "#D1495B"),
    ("--", "s", "#4C78A8"),
    (":", "^", "#2A9D8F"),
    ("-.", "v", "#7A5195"),
    ((0, (1, 3)), "P", "#E9A23B"),
)
"""Line, marker and colour of alignments; they begin again where there are more."""


def style() -> None:
    """Set matplotlib and pandas up for the book: sizes that read on a phone, a white card, whole texts."""
    pd.set_option("display.max_colwidth", None)
    plt.rcParams.update(
        {
            "figure.dpi": 110,
            "savefig.bbox": "tight",
            "figure.facecolor": "white",
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.grid": True,
            "grid.alpha": 0.25,
            "font.size": 11,
        }
    )


def looks(alignments: Iterable[str]) -> dict[str, tuple[Any, str, str]]:
    """A line, a marker and a colour for each alignment, in the registry's order.

    Args:
        alignments: those of one figure.
    """
    asked = set(alignments)
    known = [name for name in METHODS if name in asked]
    return {name: LOOKS[number % len(LOOKS)] for number, name in enumerate(known)}


def plot_methods(records: Sequence[Record], title: str = "") -> Figure:
    """How far each method is from the base models and the ensemble, in one panel a setting.

    Args:
        records: of one experiment at one profile.
        title: above the panels.
    """
    found = by_method(table(records))
    names = place_labels(found)
    methods = [method for method in in_order(chain(*found.values())) if shown(method)]
    merged = [method for method in methods if is_merged(method)]
    references = [method for method in methods if not is_merged(method)]
    figure, axes = plt.subplots(
        len(found),
        1,
        figsize=(6.4, 0.9 + (0.8 + 0.24 * len(merged)) * len(found)),
        sharex=True,
        squeeze=False,
        layout="constrained",
    )
    for axis, (place, here) in zip(axes[:, 0], found.items(), strict=True):
        for row, method in enumerate(merged):
            if method in here:
                colour, values = method.color, here[method].to_numpy(float)
                mean = float(np.nanmean(values))
                axis.plot([0, mean], [row, row], color=colour, lw=2, alpha=0.35, zorder=1)
                axis.plot(values, [row] * len(values), "|", color=colour, ms=10, zorder=2)
                axis.plot(mean, row, "o", color=colour, ms=8, zorder=3)
        for method, line in zip(references, cycle(REFERENCES), strict=False):
            if method in here:
                mean = here[method].mean()
                axis.axvline(mean, color=method.color, ls=line, lw=1.2, label=method.label)
        axis.set_xlim(0, 102)
        axis.set_title(names[place], fontsize=11)
        axis.set_yticks(range(len(merged)), [method.label for method in merged])
        axis.invert_yaxis()
    for name, colour in {method.aggregate: method.color for method in merged}.items():
        axes[0][0].plot([], [], "o", color=colour, ms=8, label=METHODS[name].label)
    axes[-1][0].set_xlabel("test accuracy (%)")
    legend_below(figure)
    if title:
        figure.suptitle(title, fontsize=12)
    return figure


def stored_paths(records: Sequence[Record]) -> dict[str, list[PathPoint]]:
    """The paths of the last setting's first seed, by alignment.

    Args:
        records: of one experiment at one profile.
    """
    kept = [record for record in records if "path" in record.details]
    where = next(
        (r.cell.setting, r.cell.seed) for r in kept if r.cell.setting == kept[-1].cell.setting
    )
    return {
        str(record.rows[0].align): [PathPoint(**point) for point in record.details["path"]]
        for record in kept
        if (record.cell.setting, record.cell.seed) == where
    }


def plot_paths(paths: Mapping[str, Sequence[PathPoint]]) -> Figure:
    """Accuracy and loss along the linear path from B to A, for each alignment.

    Args:
        paths: from :func:`npmerge.evaluate.paths.path`, by the alignment's name.
    """
    figure, axes = plt.subplots(1, 2, figsize=(8.4, 3.3), layout="constrained")
    for name, (_, marker, colour) in looks(paths).items():
        alphas = [point.alpha for point in paths[name]]
        for axis, key in zip(axes, ("accuracy", "loss"), strict=True):
            values = [getattr(point, key) for point in paths[name]]
            axis.plot(alphas, values, marker=marker, color=colour, label=METHODS[name].label)
    axes[0].set(xlabel="share of A, α", ylabel="test accuracy (%)", ylim=(0, 102))  # noqa: RUF001
    axes[1].set(xlabel="share of A, α", ylabel="test loss (nats)")  # noqa: RUF001
    legend_below(figure)
    return figure


def plot_alpha(alpha: dict[str, Tensor]) -> Figure:
    """Where the learned coefficients of the weights lie, layer by layer; dark where many are.

    The axis ends where the outermost two in a thousand begin, as far below one half as above it.

    Args:
        alpha: tensors of coefficients in (0, 1), by parameter name; vectors (biases, batch norm) are left out.
    """
    weights = {name: a.detach().cpu().numpy() for name, a in alpha.items() if a.ndim > 1}
    every = np.concatenate([a.ravel() for a in weights.values()])
    low, high = np.quantile(every, [0.05, 0.95])
    reach = max(float(np.quantile(np.abs(every - 0.5), 0.998)), 0.01)
    ends = 0.5 - reach, 0.5 + reach
    counts = np.stack([np.histogram(a, bins=50, range=ends)[0] for a in weights.values()])
    density = counts / counts.sum(axis=1, keepdims=True)
    rows = len(weights)
    figure, axis = plt.subplots(figsize=(7.2, 1.4 + 0.2 * rows), layout="constrained")
    image = axis.imshow(density, aspect="auto", cmap="Purples", extent=(*ends, rows, 0), vmin=0)
    axis.set_title(
        f"nine tenths of all coefficients lie between {low:.2f} and {high:.2f}", fontsize=11
    )
    axis.set_yticks(np.arange(rows) + 0.5, [n.removesuffix(".weight") for n in weights], fontsize=8)
    axis.axvline(0.5, color="black", lw=0.8, ls=":")
    axis.set(xlabel="α: from all B (0) to all A (1)")  # noqa: RUF001
    axis.grid(visible=False)
    figure.colorbar(image, ax=axis, label="share of the tensor", shrink=0.7)
    return figure


def plot_correlations(before: Tensor, after: Tensor) -> Figure:
    """The correlations between A's and B's neurons before and after alignment.

    Args:
        before: ``(size, size)``, A's neurons in rows, B's in columns.
        after: the same for B as aligned.
    """
    figure, axes = plt.subplots(1, 2, figsize=(7.2, 3.4), layout="constrained")
    for axis, matrix, title in zip(
        axes, (before, after), ("B as trained", "B aligned to A"), strict=True
    ):
        image = axis.imshow(matrix.cpu().numpy(), vmin=-1, vmax=1, cmap="RdBu_r")
        axis.set(xlabel="neuron of B", ylabel="neuron of A")
        axis.set_title(title, fontsize=11)
        axis.grid(visible=False)
    figure.colorbar(image, ax=axes, label="correlation", shrink=0.8)
    return figure


def plot_neuron_pair(images: Tensor, first: Tensor, second: Tensor, correlation: float) -> Figure:
    """What two matched neurons see: the images in the top row, the two activation maps below.

    Args:
        images: ``(n, C, H, W)``, as the models get them.
        first: activation maps of A's neuron, ``(n, h, w)``.
        second: those of the B neuron matched to it.
        correlation: between the two, over all data.
    """
    rows = (images.mean(dim=1), first, second)
    count = len(images)
    figure, axes = plt.subplots(3, count, figsize=(1.05 * count + 1, 3.6), layout="constrained")
    for row, (maps, name) in enumerate(
        zip(rows, ("image", "A's neuron", "B's neuron"), strict=True)
    ):
        for column in range(count):
            axis: Axes = axes[row][column]
            axis.imshow(maps[column].cpu().numpy(), cmap="gray" if row == 0 else "viridis")
            axis.set(xticks=[], yticks=[])
            axis.grid(visible=False)
        axes[row][0].set_ylabel(name)
    figure.suptitle(f"a matched pair of neurons, correlation {correlation:.2f}", fontsize=11)
    return figure


def legend_below(figure: Figure, *, ncols: int = 3, title: str | None = None) -> None:
    """Put the legend of all panels below the whole figure, each name once.

    Args:
        figure: to draw in.
        ncols: columns of the legend.
        title: of the legend.
    """
    found: dict[str, Any] = {}
    for axis in figure.axes:
        for handle, name in zip(*axis.get_legend_handles_labels(), strict=True):
            found.setdefault(name, handle)
    figure.legend(
        list(found.values()), list(found), loc="outside lower center", ncols=ncols, frameon=False,
        title=title,
    )  # fmt: skip
