"""The plots that chapters share."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import chain, count
from textwrap import fill, wrap
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy.optimize import isotonic_regression
from torch import Tensor

from npmerge.evaluate import PathPoint
from npmerge.methods import METHODS, of_kind
from npmerge.report.numbers import by_method, in_order, is_merged, shown
from npmerge.report.vector import in_notebooks
from npmerge.report.words import place_labels
from npmerge.store.records import Record, table

WIDTH = 5.4
"""Inches of every figure: its text keeps ten pixels on a phone."""
MODELS = {"A": "#2A9D8F", "B": "#C47A1B"}
"""Colours of base models; distinguishable without red-green vision and on light and dark pages."""
REFERENCES = ("--", "-", "-.", ":")
"""Lines of what merged models are held against."""
LOOKS = (
    ((0, (1, 2)), "X", "#6B7280"),
    ("-", "o", "#4C78A8"),
    ("--", "s", "#4F8F6B"),
    (":", "^", "#8C6D31"),
    ("-.", "v", "#8661A8"),
    ((0, (5, 2, 1, 2)), "D", "#3B8EA5"),
    ((0, (3, 1)), "P", "#C06C3E"),
)
"""Line, marker and colour of alignments in the registry's order; they begin again where there are more."""
LETTERS = 26
"""Of a line of a name beside a panel."""
_LINE = 13.5
"""Points from one line of text to the next."""
_ROW = 0.25
"""Inches of a row with a name of one line."""
_NEXT = 0.72
"""Of a row, from one line of its name to the next."""


def style() -> None:
    """Set matplotlib and pandas up for the book: vector graphics that read on a phone, light and dark; whole texts."""
    pd.set_option("display.max_colwidth", None)
    plt.rcParams.update(
        {
            "figure.dpi": 110,
            "figure.facecolor": "white",
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.titlelocation": "left",
            "axes.titlesize": 11,
            "axes.grid": True,
            "grid.color": "black",
            "grid.alpha": 0.12,
            "legend.frameon": False,
            "font.size": 11,
        }
    )
    in_notebooks()


def describe(figure: Figure, alt: str, title: str = "") -> Figure:
    """Say what a figure shows: to who does not see it, and above it what was found.

    Args:
        figure: whose label becomes the alternative text, the title included.
        alt: what is drawn, and the numbers that matter.
        title: the finding.
    """
    if title:
        whole = title.replace(" %", "\N{NO-BREAK SPACE}%")
        lines = len(wrap(whole, 52))
        width = next(width for width in count(1) if len(wrap(whole, width)) <= lines)
        figure.suptitle(fill(whole, width), x=0.01, ha="left", fontsize=12, weight="bold")
    figure.set_label(" ".join(f"{text.rstrip('.')}." for text in (title, alt) if text))
    return figure


def looks(alignments: Iterable[str]) -> dict[str, tuple[Any, str, str]]:
    """A line, a marker and a colour for each alignment, in the registry's order; the same in every figure.

    Args:
        alignments: those of one figure.
    """
    asked = set(alignments)
    return {
        name: LOOKS[number % len(LOOKS)]
        for number, name in enumerate(of_kind("align"))
        if name in asked
    }


def panels(heights: Sequence[float], **options: Any) -> tuple[Figure, list[Axes]]:
    """An empty figure of panels one below the other.

    Args:
        heights: of the panels, in inches.
        options: of ``plt.subplots``.
    """
    figure, axes = plt.subplots(
        len(heights), 1, figsize=(WIDTH, 0.6 + sum(heights)), height_ratios=heights, squeeze=False,
        layout="constrained", **options,
    )  # fmt: skip
    return figure, list(axes[:, 0])


def name_rows(axis: Axes, names: Sequence[str]) -> dict[str, float]:
    """Give a panel a row for each name, from top to bottom; long names have several lines.

    Args:
        axis: the panel.
        names: each once.

    Returns:
        Where each row is on the axis.
    """
    rows, lines, ends = {}, [], np.cumsum([0.0, *map(_height, names)])
    for name, start, end in zip(names, ends, ends[1:], strict=False):
        rows[name] = middle = float(start + end) / 2
        axis.axhline(middle, color="black", alpha=plt.rcParams["grid.alpha"], lw=0.8, zorder=0)
        texts = wrap(name, LETTERS)
        lines += [(middle + _NEXT * (i - (len(texts) - 1) / 2), t) for i, t in enumerate(texts)]
    axis.set_yticks(*zip(*lines, strict=True))  # a line each: only single lines are flush right
    axis.tick_params(axis="y", length=0)
    axis.set_ylim(ends[-1], 0)
    axis.grid(visible=False, axis="y")
    return rows


def rows_height(names: Iterable[str]) -> float:
    """How many inches of a panel the rows of :func:`name_rows` need.

    Args:
        names: of the rows.
    """
    return _ROW * sum(map(_height, names))


def _height(name: str) -> float:
    return 1 + _NEXT * (len(wrap(name, LETTERS)) - 1)


def plot_methods(records: Sequence[Record]) -> Figure:
    """How good each method is beside the base models and the ensemble, a row a method, a panel a setting.

    Dots are means, ticks single seeds; colours are what is done after the alignment.

    Args:
        records: of one experiment at one profile.
    """
    found = by_method(table(records))
    names = place_labels(found)
    methods = [method for method in in_order(chain(*found.values())) if shown(method)]
    labels = [method.label for method in methods]
    figure, axes = panels([0.7 + rows_height(labels)] * len(found), sharex=True)
    told, margins = [], []
    for axis, (place, here) in zip(axes, found.items(), strict=True):
        means = {method: float(here[method].mean()) for method in methods if method in here}
        rows = name_rows(axis, labels)
        for method, mean in means.items():
            row, merged = rows[method.label], is_merged(method)
            axis.plot(here[method], [row] * len(here[method]), "|", color=method.color, ms=9)
            axis.plot(mean, row, "o" if merged else "D", color=method.color, ms=7)
            axis.text(1.02, row, f"{mean:.1f}", va="center", transform=axis.get_yaxis_transform())
            if not merged:
                axis.axvline(mean, color=method.color, lw=1, ls=":")
        axis.set_title(names[place])
        best = max(filter(is_merged, means), key=lambda method: means[method], default=None)
        if best is not None:
            others = ", ".join(f"{m.label} {means[m]:.1f} %" for m in means if not is_merged(m))
            told.append(f"{names[place]}: {best.label} is best with {means[best]:.1f} %; {others}")
            margins += [means[best] - means[m] for m in means if m.aggregate == "ensemble"]
    axes[-1].set_xlabel("test accuracy (%)")
    return describe(figure, f"Test accuracy by method. {'. '.join(told)}", _to_ensemble(margins))


def _to_ensemble(margins: Sequence[float]) -> str:
    """How the best merged network of each setting compares with the ensemble."""
    if len(margins) == 1:
        side = "above" if margins[0] > 0 else "below"
        return f"The best merged network is {abs(margins[0]):.1f} points {side} the ensemble"
    ahead = sum(margin > 0 for margin in margins)
    where = f"{ahead or 'none'} of {len(margins)} settings"
    return f"A merged network is above the ensemble in {where}" if margins else ""


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
    figure, axes = panels([2.3, 2.3], sharex=True)
    half = {
        name: min(points, key=lambda point: abs(point.alpha - 0.5))
        for name, points in paths.items()
    }
    drawn = looks(paths)
    for name, (line, marker, colour) in drawn.items():
        alphas = [point.alpha for point in paths[name]]
        label = f"{METHODS[name].label}: {half[name].accuracy:.1f} % halfway"
        for axis, key in zip(axes, ("accuracy", "loss"), strict=True):
            values = [getattr(point, key) for point in paths[name]]
            axis.plot(alphas, values, ls=line, marker=marker, ms=5, color=colour, label=label)
    axes[0].set_title("test accuracy (%)")
    axes[1].set_title("test loss (nats)")
    axes[1].set_xlabel("share of A, α")  # noqa: RUF001
    legend_below(figure, ncols=1)
    first, *_, last = sorted(drawn, key=lambda name: half[name].accuracy) * 2
    texts = [f"{METHODS[name].label} {half[name].accuracy:.1f} %" for name in (last, first)]
    title = f"Halfway from B to A: {' to '.join(dict.fromkeys(texts))}"
    ends = paths[last][0].accuracy, paths[last][-1].accuracy
    alt = f"Accuracy and loss on the line from B ({ends[0]:.1f} %) to A ({ends[1]:.1f} %)"
    told = ", ".join(f"{METHODS[name].label} {half[name].accuracy:.1f} %" for name in drawn)
    return describe(figure, f"{alt}; halfway: {told}", title)


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
    figure, (axis,) = panels([0.8 + 0.2 * rows])
    image = axis.imshow(density, aspect="auto", cmap="Purples", extent=(*ends, rows, 0), vmin=0)
    axis.set_yticks(np.arange(rows) + 0.5, [n.removesuffix(".weight") for n in weights], fontsize=9)
    axis.axvline(0.5, color="black", lw=0.8, ls=":")
    axis.set(xlabel="α: from all B (0) to all A (1)")  # noqa: RUF001
    axis.grid(visible=False)
    figure.colorbar(
        image, ax=axis, label="share of the tensor", location="bottom", shrink=0.7, aspect=40
    )
    title = f"Nine tenths of all coefficients lie between {low:.2f} and {high:.2f}"
    return describe(figure, f"Where alpha lies in each of {rows} weight tensors", title)


def plot_correlations(before: Tensor, after: Tensor) -> Figure:
    """The correlations between A's and B's neurons before and after alignment.

    Args:
        before: ``(size, size)``, A's neurons in rows, B's in columns.
        after: the same for B as aligned.
    """
    figure, axes = plt.subplots(
        1, 2, figsize=(WIDTH, 0.68 * WIDTH), sharey=True, layout="constrained"
    )
    for axis, matrix, title in zip(
        axes, (before, after), ("B as trained", "B aligned to A"), strict=True
    ):
        image = axis.imshow(matrix.cpu().numpy(), vmin=-1, vmax=1, cmap="RdBu_r")
        axis.set(xlabel="neuron of B")
        axis.set_title(title)
        axis.grid(visible=False)
    axes[0].set_ylabel("neuron of A")
    figure.colorbar(image, ax=axes, label="correlation", location="bottom", shrink=0.6, aspect=30)
    means = [float(matrix.diagonal().mean()) for matrix in (before, after)]
    title = f"Pairs correlate by {means[0]:z.2f} on average before matching, {means[1]:z.2f} after"
    return describe(figure, f"Two heat maps of {len(before)} by {len(before)} correlations", title)


def plot_neuron_pair(images: Tensor, first: Tensor, second: Tensor, correlation: float) -> Figure:
    """What two matched neurons see: the images in the top row, the two activation maps below.

    Args:
        images: ``(n, C, H, W)``, as the models get them.
        first: activation maps of A's neuron, ``(n, h, w)``.
        second: those of the B neuron matched to it.
        correlation: between the two, over all data.
    """
    rows = (images.mean(dim=1), first, second)
    columns = len(images)
    figure, axes = plt.subplots(
        3, columns, figsize=(WIDTH, 0.9 + 3 * (WIDTH - 0.4) / columns), squeeze=False,
        layout="constrained",
    )  # fmt: skip
    for row, (maps, name) in enumerate(zip(rows, ("image", "A", "B"), strict=True)):
        for column in range(columns):
            axis: Axes = axes[row][column]
            axis.imshow(maps[column].cpu().numpy(), cmap="gray" if row == 0 else "viridis")
            axis.set(xticks=[], yticks=[])
            axis.grid(visible=False)
        axes[row][0].set_ylabel(name)
    title = f"A matched pair of neurons, correlation {correlation:.2f}"
    alt = f"{columns} images, and below each the activation maps of A's neuron and of B's"
    return describe(figure, alt, title)


def label_ends(axes: Sequence[Axes], letters: int = 18) -> None:
    """Name every labelled line at its right end, the names at least a line of text apart: no legend is needed.

    Args:
        axes: of one figure, with all that is to be drawn.
        letters: of a line of a name.
    """
    figure: Any = axes[0].figure
    figure.draw_without_rendering()
    for axis in axes:
        height = axis.get_position().height * figure.get_figheight() * 72
        on_axes = axis.transScale + axis.transLimits
        handles, texts = axis.get_legend_handles_labels()
        lines: dict[str, Any] = dict(zip(texts, handles, strict=True))
        ends = {text: line.get_xydata()[-1] for text, line in lines.items()}
        wanted = {text: height * on_axes.transform((1, end[1]))[1] for text, end in ends.items()}
        names = {text: fill(text, letters) for text in sorted(lines, key=lambda text: wanted[text])}
        tall = np.array([_LINE * (1 + name.count("\n")) for name in names.values()])
        room = np.cumsum(tall) - tall / 2
        centres = isotonic_regression(np.array([wanted[text] for text in names]) - room).x
        centres = np.clip(centres, 0, max(0, height - tall.sum())) + room
        for (text, name), centre in zip(names.items(), centres, strict=True):
            axis.annotate(
                name, ends[text], (1.06, centre / height), xycoords=lines[text].get_transform(),
                textcoords="axes fraction", va="center", annotation_clip=False,
                arrowprops={
                    "arrowstyle": "-", "color": lines[text].get_color(), "lw": 0.8,
                    "relpos": (0, 0.5), "shrinkA": 1, "shrinkB": 3,
                },
            )  # fmt: skip


def legend_below(figure: Figure, *, ncols: int = 2, title: str | None = None) -> None:
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
        list(found.values()), list(found), loc="outside lower center", ncols=ncols, title=title
    )
