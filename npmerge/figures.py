"""Tables and plots for the chapters: records in, something to look at out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from npmerge.evaluate import PathPoint
from npmerge.paper import METHODS, PLACE, Verdict, label, numbers, place_label

COLORS = {
    "earlier": "#4C78A8",
    "finetune": "#B279A2",
    "np": "#D1495B",
    "reference": "#6B7280",
    "A": "#2A9D8F",
    "B": "#E9A23B",
}
"""One colour a family of methods and a base model; distinguishable without red-green vision and on both themes' cards.
"""
NOTHING = "\N{EN DASH}"
"""What a table says where there is no number."""


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


def family(method: str) -> str:
    """Which family a method belongs to: a key of :data:`COLORS`."""
    if method.startswith("np_"):
        return "np"
    if method.startswith("finetune"):
        return "finetune"
    return "reference" if method in ("base_avg", "ensemble") else "earlier"


def summary(table: pd.DataFrame) -> pd.DataFrame:
    """Mean and standard deviation over seeds.

    Args:
        table: from :func:`npmerge.results.table`.

    Returns:
        Top-1 accuracy in percent: ``mean``, ``std`` (of a sample; NaN for one seed) and ``seeds`` for each dataset,
        model, setting, number of examples and method, methods in the paper's order.
    """
    top1 = table[(table["metric"] == "top1") & table["method"].isin(METHODS)]
    top1 = top1.fillna({"examples_per_class": ""}).astype({"examples_per_class": str})
    order = {method: place for place, method in enumerate(METHODS)}
    grouped = top1.groupby([*PLACE, "method"], sort=False)["value"]
    result = grouped.agg(mean="mean", std="std", seeds="count").reset_index()
    return result.sort_values(
        "method", key=lambda column: column.map(order), kind="stable", ignore_index=True
    )


def beside_paper(contents: Sequence[dict[str, Any]], table: pd.DataFrame) -> pd.DataFrame:
    """Our numbers beside the column of the paper that each setting reproduces or stands in for.

    Args:
        contents: from :meth:`npmerge.results.Results.read`; their configuration names the paper's column.
        table: their records.

    Returns:
        One row a method; for each setting our mean ± std and the paper's, as text.
    """
    ours, paper = summary(table), summary_of_paper()
    columns = {}
    for place in places(ours):
        dataset, model, setting, examples = place
        config = next(
            c["config"]["setting"]
            for c in contents
            if [c["records"][0][key] for key in PLACE[:3]] == [dataset, model, setting]
        )
        here = at(ours, place)
        their_data, their_model = config["beside"]
        same_table = table.loc[table["dataset"] == dataset, "table"].iloc[0]
        there = at(
            paper[paper["table"] == same_table], (their_data, their_model, setting, examples)
        )
        columns[f"{place_label(*place)} (ours)"] = here
        columns[f"{place_label(their_data, their_model, setting, examples)} (paper)"] = there
    found = {method for rows in columns.values() for method in rows.index}
    methods = [method for method in METHODS if method in found]
    cells = {name: [mean_std(rows, m) for m in methods] for name, rows in columns.items()}
    return pd.DataFrame(cells, index=[label(m) for m in methods])


def summary_of_paper() -> pd.DataFrame:
    """The paper's top-1 numbers in the shape of :func:`summary`, with their ``table``."""
    rows = numbers()
    return rows[rows["metric"] == "top1"].fillna({"examples_per_class": ""})


def places(rows: pd.DataFrame) -> list[tuple[str, ...]]:
    """The columns of a table that rows of :func:`summary` make, in their order.

    Args:
        rows: from :func:`summary`.
    """
    return list(dict.fromkeys(rows[PLACE].itertuples(index=False, name=None)))


def at(rows: pd.DataFrame, place: tuple[str, ...]) -> pd.DataFrame:
    """The rows of one column of a table, by method.

    Args:
        rows: from :func:`summary`.
        place: from :func:`places`.
    """
    here = (rows[PLACE].astype(str) == list(place)).all(axis=1)
    return rows[here].set_index("method")


def verdict_table(
    verdicts: Sequence[Verdict], column: Literal["status", "evidence"] = "status"
) -> pd.DataFrame:
    """The verdicts as a table: a row a claim, a column a setting.

    Args:
        verdicts: from :func:`npmerge.paper.verdicts`.
        column: what to show of each: its status, or the comparison with the smallest margin, in percentage points of
            top-1 accuracy.
    """
    rows: dict[str, dict[str, str]] = {}
    for v in verdicts:
        claim = f"{v.claim.text} ({v.claim.section})"
        rows.setdefault(claim, {})[v.place] = getattr(v, column)
    return pd.DataFrame.from_dict(rows, orient="index")


def choices(contents: Sequence[dict[str, Any]]) -> pd.DataFrame:
    """What was chosen on held-out training images, a row a unit; a choice at an edge of its grid is marked.

    Args:
        contents: from :meth:`npmerge.results.Results.read`.

    Returns:
        CCA's ridge and the tuned learning rates. A mark means that a value beyond the grid might have done better.
    """
    return pd.DataFrame(
        {
            **(
                {"CCA ridge": _choice(content["details"]["ridge"])}
                if "ridge" in content["details"]
                else {}
            ),
            **{
                f"{label(method)}: learning rate": _choice(tuned)
                for method, tuned in content["details"]["tuned_lr"].items()
            },
        }
        for content in contents
    ).set_axis([f"{c['unit']['setting']}, seed {c['unit']['seed']}" for c in contents])


def _choice(found: dict[str, Any]) -> str:
    tried = sorted(float(value) for value in found["trials"])
    edge = {tried[0]: " (lowest tried)", tried[-1]: " (highest tried)"}
    return f"{found['chosen']:g}{edge.get(found['chosen'], '')}"


def provenance_row(content: dict[str, Any]) -> dict[str, Any]:
    """Where a record file's numbers come from, as a row of a table.

    Args:
        content: one of those from :meth:`npmerge.results.Results.read`.
    """
    unit, source = content["unit"], content["provenance"]
    return {
        "record": f"{unit['profile']}/{unit['experiment']}/{unit['setting']}-seed{unit['seed']}",
        "revision": short_revision(source),
        "device": device_text(source),
        "torch": source["versions"]["torch"],
        "seconds": f"{source['seconds']:.0f}",
        "peak memory": f"{source['peak_memory_mib']} MiB",
    }


def device_text(provenance: dict[str, Any]) -> str:
    """The device of a record, and with how many threads.

    Args:
        provenance: see :func:`npmerge.results.provenance`.
    """
    return f"{provenance['device']}, threads: {provenance['threads']}"


def short_revision(provenance: dict[str, Any]) -> str:
    """The first digits of the source's revision, ``+`` behind them if it was changed.

    Args:
        provenance: see :func:`npmerge.results.provenance`.
    """
    whole: str = provenance["revision"]
    return whole.removeprefix("version ").removesuffix("+")[:8] + "+" * whole.endswith("+")


def plot_methods(table: pd.DataFrame, title: str = "") -> Figure:
    """How far each method is from the base models and the ensemble, in one panel a setting.

    Args:
        table: from :func:`npmerge.results.table`.
        title: above the panels.
    """
    ours = summary(table)
    shown = places(ours)
    figure, axes = plt.subplots(
        len(shown),
        1,
        figsize=(6.4, 0.6 + 3.2 * len(shown)),
        sharex=True,
        squeeze=False,
        layout="constrained",
    )
    methods = [m for m in METHODS if m not in ("base_avg", "ensemble") and m in set(ours["method"])]
    top1 = table[table["metric"] == "top1"].fillna({"examples_per_class": ""})
    for axis, place in zip(axes[:, 0], shown, strict=True):
        here, seeds = at(ours, place), at(top1, place)["value"]
        for row, method in enumerate(methods):
            colour, mean = COLORS[family(method)], here.loc[method, "mean"]
            values = seeds.loc[[method]].to_numpy(float)
            axis.plot([0, mean], [row, row], color=colour, lw=2, alpha=0.35, zorder=1)
            axis.plot(values, [row] * len(values), "|", color=colour, ms=10, zorder=2)
            axis.plot(mean, row, "o", color=colour, ms=8, zorder=3)
        for method, line in (("base_avg", "--"), ("ensemble", "-")):
            axis.axvline(
                here.loc[method, "mean"],
                color=COLORS["reference"],
                ls=line,
                lw=1.2,
                label=label(method),
            )
        axis.set_xlim(0, 102)
        axis.set_title(place_label(*place), fontsize=11)
        axis.set_yticks(range(len(methods)), [label(m) for m in methods])
        axis.invert_yaxis()
    axes[-1][0].set_xlabel("test accuracy (%)")
    handles, names = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=2, frameon=False)
    if title:
        figure.suptitle(title, fontsize=12)
    return figure


def plot_paths(paths: dict[str, list[PathPoint]]) -> Figure:
    """Accuracy and loss along the linear path from B to A, for each alignment.

    Args:
        paths: from :func:`npmerge.evaluate.path`, by method.
    """
    figure, axes = plt.subplots(1, 2, figsize=(8.4, 3.3), layout="constrained")
    markers = {"direct": "s", "permute": "o", "weight_matching": "^"}
    colours = {"direct": "#9CA3AF", "permute": "#D1495B", "weight_matching": "#4C78A8"}
    for method, points in paths.items():
        alphas = [p.alpha for p in points]
        for axis, key in zip(axes, ("accuracy", "loss"), strict=True):
            axis.plot(
                alphas,
                [getattr(p, key) for p in points],
                marker=markers[method],
                color=colours[method],
                label=label(method),
            )
    axes[0].set(xlabel="share of A, α", ylabel="test accuracy (%)", ylim=(0, 102))  # noqa: RUF001
    axes[1].set(xlabel="share of A, α", ylabel="test loss (nats)")  # noqa: RUF001
    handles, names = axes[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=3, frameon=False)
    return figure


def plot_alpha(alpha: dict[str, Tensor]) -> Figure:
    """Where the learned coefficients of the weights lie, layer by layer; dark where many are.

    Args:
        alpha: tensors of coefficients in (0, 1), by parameter name; vectors (biases, batch norm) are left out.
    """
    weights = {name: a.detach().cpu().numpy() for name, a in alpha.items() if a.ndim > 1}
    counts = np.stack([np.histogram(a, bins=50, range=(0, 1))[0] for a in weights.values()])
    density = counts / counts.sum(axis=1, keepdims=True)
    rows = len(weights)
    figure, axis = plt.subplots(figsize=(7.2, 1.4 + 0.2 * rows), layout="constrained")
    image = axis.imshow(density, aspect="auto", cmap="Purples", extent=(0, 1, rows, 0), vmin=0)
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


def legend_below(figure: Figure, axis: Axes, *, ncols: int = 3, title: str | None = None) -> None:
    """Put an axis' legend below the whole figure.

    Args:
        figure: to draw in.
        axis: that has the legend's lines.
        ncols: columns of the legend.
        title: of the legend.
    """
    handles, names = axis.get_legend_handles_labels()
    figure.legend(
        handles, names, loc="outside lower center", ncols=ncols, frameon=False, title=title
    )


def plus_minus(mean: Any, std: Any) -> str:
    """Mean ± standard deviation as text.

    Args:
        mean: in percent.
        std: left out if it is NaN.
    """
    return f"{mean:.2f}" if np.isnan(std) else f"{mean:.2f} ± {std:.2f}"


def mean_std(rows: pd.DataFrame, method: str) -> str:
    """A method's mean ± standard deviation as text.

    Args:
        rows: from :func:`at`.
        method: :data:`NOTHING` stands for one that is not there.
    """
    if method not in rows.index:
        return NOTHING
    return plus_minus(*rows.loc[method, ["mean", "std"]].to_numpy(float))
