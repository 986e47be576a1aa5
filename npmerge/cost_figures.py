"""Tables and plots of what merging costs and what it buys."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from npmerge import experiments
from npmerge.experiments.cost import AVERAGE, FINETUNE, NP
from npmerge.experiments.schedule import duration
from npmerge.figures import COLORS, NOTHING, device_text, family
from npmerge.paper import label, signed
from npmerge.results import table

TOURNAMENT = "tournament_"
"""What the records' setting begins with where more than one pair is merged; the number of models follows."""


def measured(contents: Sequence[dict[str, Any]]) -> pd.DataFrame:
    """The means over the seeds, a row a network and method, from narrow to wide.

    Args:
        contents: from :meth:`npmerge.results.Results.read`.

    Returns:
        ``dataset``, ``model``, ``width``, ``method`` and a column for each metric; one that a method does not have
        is NaN.
    """
    rows = _pairs(table(contents))
    found = rows.pivot_table(index=["dataset", "model", "method"], columns="metric", values="value")
    found = found.reset_index().rename_axis(columns=None)
    found["width"] = found["model"].map(_by_width(contents))
    order = {method: place for place, method in enumerate((AVERAGE, FINETUNE, NP))}
    return found.sort_values(
        ["width", "method"],
        key=lambda column: column.map(order) if column.name == "method" else column,
        ignore_index=True,
    )


def cost_table(contents: Sequence[dict[str, Any]]) -> pd.DataFrame:
    """What each method costs and how good its model is, a row a network and method.

    Args:
        contents: from :meth:`npmerge.results.Results.read`.
    """
    found = measured(contents)
    columns = {
        "parameters": ("parameters optimised", "{:,.0f}"),
        "held_mib": ("held, MiB", "{:.2f}"),
        "peak_mib": ("peak, MiB", "{:.1f}"),
        "seconds_per_epoch": ("s an epoch", "{:.2f}"),
        "seconds": ("s in all", "{:.1f}"),
        "top1": ("top-1, %", "{:.1f}"),
    }
    rows = pd.DataFrame(
        {
            title: ["" if np.isnan(value) else text.format(value) for value in found[name]]
            for name, (title, text) in columns.items()
        }
    )
    names = [found["model"], found["method"].map(label)]
    return rows.set_index(pd.MultiIndex.from_arrays(names, names=["network", "method"]))


def ratios(contents: Sequence[dict[str, Any]]) -> pd.DataFrame:
    """NP Merge beside fine-tuning, a row a network.

    Args:
        contents: from :meth:`npmerge.results.Results.read`.

    Returns:
        ``time``, the median over the epochs of the ratio of two epochs that ran one after the other, its range
        (``low``, ``high``), and the ratios of the memory ``held`` and at its ``peak``. The first epoch is left out if
        there are more.
    """
    wide = measured(contents).pivot(index="model", columns="method")
    each = pd.DataFrame(
        {"model": _model(content), "ratio": ratio}
        for content in contents
        for ratio in _epoch_ratios(content)
    )
    found: pd.DataFrame = each.groupby("model").agg(
        time=("ratio", "median"), low=("ratio", "min"), high=("ratio", "max")
    )
    for name in ("held", "peak"):
        found[name] = wide[f"{name}_mib", NP] / wide[f"{name}_mib", FINETUNE]
    return found.reindex(list(_by_width(contents)))


def ratio_table(contents: Sequence[dict[str, Any]]) -> pd.DataFrame:
    """:func:`ratios` as text.

    Args:
        contents: from :meth:`npmerge.results.Results.read`.
    """
    found = ratios(contents)
    return pd.DataFrame(
        {
            "time of an epoch": [
                f"{time:.2f} ({low:.2f}-{high:.2f})"
                for time, low, high in found[["time", "low", "high"]].to_numpy()
            ],
            "memory held": found["held"].map("{:.2f}".format).to_list(),
            "peak memory": found["peak"].map("{:.2f}".format).to_list(),
        },
        index=found.index,
    )


def curves(contents: Sequence[dict[str, Any]]) -> pd.DataFrame:
    """Accuracy after each epoch, with the seconds from the two trained models until then.

    Args:
        contents: from :meth:`npmerge.results.Results.read`.

    Returns:
        Means over the seeds: ``model``, ``width``, ``method``, ``epoch``, ``seconds`` and ``top1``, from narrow to
        wide. Epoch 0 is the average.
    """
    rows = [
        {"model": _model(content), "width": content["config"]["setting"]["width"]}
        | {"method": method}
        | point
        for content in contents
        for method, points in content["details"]["curves"].items()
        for point in points
    ]
    keys = ["width", "model", "method", "epoch"]
    return pd.DataFrame(rows).groupby(keys)[["seconds", "top1"]].mean().reset_index()


def bought_table(contents: Sequence[dict[str, Any]]) -> pd.DataFrame:
    """Percentage points of accuracy above the average, and how many of them a second bought.

    Args:
        contents: from :meth:`npmerge.results.Results.read`.
    """
    found = curves(contents)
    rows = {}
    for model in _by_width(contents):
        for method in (FINETUNE, NP):
            here = found[(found["model"] == model) & (found["method"] == method)]
            gained = here["top1"].to_numpy(float) - here["top1"].iloc[0]
            spent = here["seconds"].to_numpy(float) - here["seconds"].iloc[0]
            texts = {"average, %": f"{here['top1'].iloc[0]:.1f}"}
            for epoch in dict.fromkeys((1, len(here) - 1)):
                after = f"after {epoch} epoch{'s' * (epoch > 1)}"
                texts[f"points {after}"] = signed(gained[epoch])
                texts[f"points/s {after}"] = signed(gained[epoch] / spent[epoch])
            rows[model, label(method)] = texts
    result = pd.DataFrame.from_dict(rows, orient="index").fillna("")
    return result.rename_axis(index=["network", "method"])


def tournament_table(contents: Sequence[dict[str, Any]]) -> pd.DataFrame:
    """Time and memory of NP Merge with more models, one epoch for each pair; a row a number of models.

    Args:
        contents: from :meth:`npmerge.results.Results.read`.
    """
    found = _tournaments(contents)
    return pd.DataFrame(
        {
            "merges": found["merges"].map("{:.0f}".format),
            "s": found["seconds"].map("{:.1f}".format),
            "s a merge": (found["seconds"] / found["merges"]).map("{:.1f}".format),
            "peak, MiB": found["peak_mib"].map("{:.2f}".format),
        }
    )


def verdict(contents: Sequence[dict[str, Any]]) -> str:
    """What the records say, in sentences (Markdown).

    Args:
        contents: from :meth:`npmerge.results.Results.read`.
    """
    beside = ratios(contents)
    wide = measured(contents).pivot(index="model", columns="method")
    slower = wide["seconds", NP] / wide["seconds", AVERAGE]
    gain = wide["top1", NP] - wide["top1", AVERAGE]
    ahead = wide["top1", NP] - wide["top1", FINETUNE]
    to_average = (
        f"Beside **averaging**, NP Merge took {_span(slower, '.1f')} times as long, and the change in accuracy was "
        f"{_span(gain, '+.1f')} percentage points."
    )
    to_finetuning = (
        f"Beside **fine-tuning**, an epoch took {_span(beside['time'], '.2f')} times as long. NP Merge held "
        f"{_span(beside['held'], '.2f')} times the memory between two steps; at the peak of a step it was "
        f"{_span(beside['peak'], '.2f')} times as much. It optimised as many numbers, and after as many epochs the "
        f"difference in accuracy was {_span(ahead, '+.1f')} percentage points."
    )
    lines = [to_average, to_finetuning]
    more = _tournaments(contents)
    if len(more) > 1:
        few, many = more.index.min(), more.index.max()
        times = more.loc[many] / more.loc[few]
        lines.append(
            f"With {many} **models** in the place of {few} there were {times['merges']:.0f} times as many merges. The "
            f"tournament took {times['seconds']:.1f} times as long, and its peak memory was {times['peak_mib']:.2f} "
            "times as much."
        )
    return "\n".join(f"- {line}" for line in lines)


def expenses(contents: Mapping[str, Sequence[dict[str, Any]]]) -> pd.DataFrame:
    """What each experiment took, a row a profile and experiment.

    The time of a seed is what its units would take one after the other if each took as long as those measured, with
    the base models that were trained for them. Units side by side take less.

    Args:
        contents: the record files of all experiments, by the name of their profile.

    Returns:
        A table of text; dashes where there is no record.
    """
    rows = {}
    for profile, kept in contents.items():
        for experiment in experiments.EXPERIMENTS:
            if whole := len(experiments.units(experiment, profile, [0])):
                mine = [one for one in kept if one["unit"]["experiment"] == experiment]
                rows[profile, experiment] = _expense([one["provenance"] for one in mine], whole)
    table = pd.DataFrame.from_dict(rows, orient="index").fillna(NOTHING)
    table.index = pd.MultiIndex.from_tuples(table.index, names=["profile", "experiment"])
    return table


def _expense(sources: Sequence[dict[str, Any]], whole: int) -> dict[str, str]:
    known = {"units a seed": str(whole), "records": str(len(sources) or "none")}
    if not sources:
        return known
    training = sum(source.get("base_models", {}).get("seconds", 0) for source in sources)
    seconds = training + sum(source["seconds"] for source in sources)
    peaks = [source["peak_memory_mib"] for source in sources if source["peak_memory_mib"]]
    return known | {
        "time a seed": duration(seconds / len(sources) * whole),
        "peak memory": f"{max(peaks):,.0f} MiB" if peaks else NOTHING,
        "device": ", ".join(sorted(set(map(device_text, sources)))),
    }


def plot_width(contents: Sequence[dict[str, Any]]) -> Figure:
    """Seconds an epoch and peak memory against the width of the network.

    Args:
        contents: from :meth:`npmerge.results.Results.read`.
    """
    found = measured(contents)
    figure, axes = plt.subplots(2, 1, figsize=(6.4, 6), sharex=True, layout="constrained")
    panels = {
        "seconds_per_epoch": "seconds",
        "peak_mib": "peak memory (MiB)",
    }
    for axis, (metric, title) in zip(axes, panels.items(), strict=True):
        for method, rows in found.groupby("method", sort=False):
            # The average takes a pass over the data too, but one only.
            name = "seconds" if method == AVERAGE and metric == "seconds_per_epoch" else metric
            _line(axis, str(method), rows["width"], rows[name])
        axis.set(xscale="log", yscale="log", ylabel=title)
        for which in (axis.xaxis, axis.yaxis):
            which.set_minor_locator(NullLocator())
        axis.set_yticks(*_ticks(axis.get_ylim()))
    widths = sorted(set(found["width"]))
    axes[1].set_xticks(widths, [f"x{width:g}" for width in widths])
    axes[1].set_xlabel("width of the network")
    _legend(figure, axes[0], {AVERAGE: "Average, in all"})
    return figure


def plot_curves(contents: Sequence[dict[str, Any]]) -> Figure:
    """Test accuracy against seconds, one point an epoch, in one panel a network.

    Args:
        contents: from :meth:`npmerge.results.Results.read`.
    """
    found = curves(contents)
    models = list(dict.fromkeys(found["model"]))
    figure, axes = plt.subplots(
        len(models), 1, figsize=(6.4, 0.9 + 2.3 * len(models)), squeeze=False, layout="constrained"
    )
    for axis, model in zip(axes[:, 0], models, strict=True):
        here = found[found["model"] == model]
        for method in (FINETUNE, NP):
            points = here[here["method"] == method]
            _line(axis, method, points["seconds"], points["top1"])
        start = here[here["epoch"] == 0].iloc[0]
        _line(axis, AVERAGE, [start["seconds"]], [start["top1"]])
        axis.set_ylim(max(0, here["top1"].min() // 10 * 10 - 5), 102)
        axis.set_xlim(0, None)
        axis.set_title(model, fontsize=11)
    axes[-1, 0].set_xlabel("seconds since the two models were trained")
    figure.supylabel("test accuracy (%)", fontsize=11)
    _legend(figure, axes[0, 0], {})
    return figure


def _line(axis: Axes, method: str, x: Any, y: Any) -> None:
    # Fine-tuning's marks are larger, to be seen where NP Merge's lie on them.
    marker, size, order = {AVERAGE: ("s", 7, 5), FINETUNE: ("D", 9, 3), NP: ("o", 6, 4)}[method]
    colour = COLORS[family(method)]
    axis.plot(x, y, marker=marker, ms=size, color=colour, label=method, lw=1.8, zorder=order)


def _legend(figure: Figure, axis: Axes, names: dict[str, str]) -> None:
    handles, methods = axis.get_legend_handles_labels()
    known = {AVERAGE: "Average", FINETUNE: "Fine-tuning", NP: "NP Merge"} | names
    figure.legend(
        handles, [known[m] for m in methods], loc="outside lower center", ncols=3, frameon=False
    )


def _ticks(limits: tuple[float, float]) -> tuple[list[float], list[str]]:
    """1, 2, 5, 10, ... within the limits of a logarithmic axis."""
    low, high = limits
    decades = range(int(np.floor(np.log10(low))), int(np.ceil(np.log10(high))) + 1)
    every = [digit * 10.0**decade for decade in decades for digit in (1, 2, 5)]
    inside = [value for value in every if low <= value <= high]
    if len(inside) > 6:
        inside = [value for value in inside if f"{value:e}"[0] == "1"]
    return inside, [f"{value:g}" for value in inside]


def _pairs(rows: pd.DataFrame) -> pd.DataFrame:
    return rows[~rows["setting"].str.startswith(TOURNAMENT)]


def _tournaments(contents: Sequence[dict[str, Any]]) -> pd.DataFrame:
    rows = table(contents)
    rows = rows[rows["setting"].str.startswith(TOURNAMENT)]
    models = rows["setting"].str.removeprefix(TOURNAMENT).astype(int).rename("models")
    return rows.pivot_table(index=models, columns="metric", values="value")


def _epoch_ratios(content: dict[str, Any]) -> list[float]:
    epochs = content["details"]["epochs"]
    each = [ours / theirs for ours, theirs in zip(epochs[NP], epochs[FINETUNE], strict=True)]
    return each[1:] or each


def _by_width(contents: Sequence[dict[str, Any]]) -> dict[str, float]:
    """The networks with their widths, from narrow to wide."""
    widths = {_model(content): content["config"]["setting"]["width"] for content in contents}
    return dict(sorted(widths.items(), key=lambda item: item[1]))


def _model(content: dict[str, Any]) -> str:
    return str(content["records"][0]["model"])


def _span(values: pd.Series, form: str) -> str:
    """The lowest and the highest of some numbers; one of them if they look the same."""
    ends = [
        format(value, form).replace("-", "\N{MINUS SIGN}") for value in (values.min(), values.max())
    ]
    return " to ".join(dict.fromkeys(ends))
