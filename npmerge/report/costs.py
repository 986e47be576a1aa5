"""Tables and plots of what merging costs and what it buys."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from npmerge import experiments
from npmerge.methods import METHODS, Combination
from npmerge.report.captions import captioned, whose
from npmerge.report.numbers import place_of
from npmerge.report.plots import describe, label_ends, panels
from npmerge.report.words import NOTHING, device_text, duration, signed, span
from npmerge.store.records import Record, table

START, CONTROL, OURS = "mean", "finetune", "np_merge"
"""What learning begins with, what learning is held against, and what the sentences are about."""
MARKERS = "sDo^vP"
"""Of the methods in their order; they begin again where there are more."""


def measured(records: Sequence[Record]) -> pd.DataFrame:
    """The means over the seeds, a row a network and method, from narrow to wide.

    Args:
        records: of ``cost``.

    Returns:
        ``model``, ``width``, ``method`` (the aggregation after Permute) and a column for each metric; one that a method
        does not have is NaN.
    """
    rows = table([record for record in records if record.rows[0].many is None])
    rows = rows.assign(
        model=[
            f"{name}x{width:g}" for name, width in zip(rows["model"], rows["width"], strict=True)
        ],
        place=rows["aggregate"].map(list(METHODS).index),
    )
    keys = ["width", "place", "model", "aggregate"]
    found = rows.pivot_table(index=keys, columns="metric", values="value").reset_index()
    return found.rename(columns={"aggregate": "method"}).rename_axis(columns=None)


def cost_table(records: Sequence[Record]) -> pd.DataFrame:
    """What each method costs and how good its model is, a row a network and method.

    Args:
        records: of ``cost``.
    """
    found = measured(records)
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
    names = zip(found["model"], map(_label, found["method"]), strict=True)
    return captioned(
        rows.set_index(pd.MultiIndex.from_tuples(names, names=["network", "method"])),
        "What each method costs, from two trained networks to a merged one, the alignment included, and how good its "
        f"network is ({whose(records)}).",
    )


def ratios(records: Sequence[Record]) -> pd.DataFrame:
    """The other methods that learn beside fine-tuning, a row a network and method.

    Args:
        records: of ``cost``.

    Returns:
        ``time``, the median over the epochs of the ratio of two epochs that ran one after the other, its range
        (``low``, ``high``), and the ratios of the memory ``held`` and at its ``peak``. The first epoch is left out if
        there are more.
    """
    values = measured(records).set_index(["model", "method"])
    rows = []
    for model, method in values.index:
        if method in (START, CONTROL):
            continue
        each: list[float] = []
        for record in records:
            epochs = record.details.get("epochs", {})
            if method in epochs and place_of(record).model == model:
                took = zip(epochs[method], epochs[CONTROL], strict=True)
                ratio = [ours / theirs for ours, theirs in took]
                each += ratio[1:] or ratio
        row = {"model": model, "method": method, "time": np.median(each)}
        row |= {"low": min(each), "high": max(each)}
        for name in ("held", "peak"):
            column = values[f"{name}_mib"]
            row[name] = column[model, method] / column[model, CONTROL]
        rows.append(row)
    return pd.DataFrame(rows).set_index(["model", "method"])


def ratio_table(records: Sequence[Record]) -> pd.DataFrame:
    """:func:`ratios` as text.

    Args:
        records: of ``cost``.
    """
    found = ratios(records)
    texts = {
        "time of an epoch": [
            f"{time:.2f} ({low:.2f}-{high:.2f})"
            for time, low, high in found[["time", "low", "high"]].to_numpy()
        ],
        "memory held": found["held"].map("{:.2f}".format).to_list(),
        "peak memory": found["peak"].map("{:.2f}".format).to_list(),
    }
    index = pd.MultiIndex.from_tuples(
        [(model, _label(method)) for model, method in found.index], names=["network", "method"]
    )
    return captioned(
        pd.DataFrame(texts, index=index),
        "Cost as a multiple of fine-tuning's, 1 being as much; in brackets the smallest and the largest ratio of two "
        f"epochs that followed each other ({whose(records)}).",
    )


def curves(records: Sequence[Record]) -> pd.DataFrame:
    """Accuracy after each epoch, with the seconds from the two trained models until then.

    Args:
        records: of ``cost``.

    Returns:
        Means over the seeds: ``model``, ``width``, ``method``, ``epoch``, ``seconds`` and ``top1``, from narrow to
        wide. Epoch 0 is the average.
    """
    rows = [
        {"width": record.rows[0].width, "model": place_of(record).model, "method": method} | point
        for record in records
        for method, points in record.details.get("curves", {}).items()
        for point in points
    ]
    keys = ["width", "model", "method", "epoch"]
    found = pd.DataFrame(rows).groupby(keys, sort=False)[["seconds", "top1"]].mean()
    found = found.reset_index().assign(place=lambda rows: rows["method"].map(list(METHODS).index))
    return found.sort_values(["width", "place"], kind="stable", ignore_index=True)


def bought_table(records: Sequence[Record]) -> pd.DataFrame:
    """Percentage points of accuracy above the average, and how many of them a second bought.

    Args:
        records: of ``cost``.
    """
    rows = {}
    for (model, method), here in curves(records).groupby(["model", "method"], sort=False):
        gained = here["top1"].to_numpy(float) - here["top1"].iloc[0]
        spent = here["seconds"].to_numpy(float) - here["seconds"].iloc[0]
        texts = {"average, %": f"{here['top1'].iloc[0]:.1f}"}
        for epoch in dict.fromkeys((1, len(here) - 1)):
            after = f"after {epoch} epoch{'s' * (epoch > 1)}"
            texts[f"points {after}"] = signed(gained[epoch])
            texts[f"points/s {after}"] = signed(gained[epoch] / spent[epoch])
        rows[model, _label(str(method))] = texts
    result = pd.DataFrame.from_dict(rows, orient="index").fillna("")
    return captioned(
        result.rename_axis(index=["network", "method"]),
        "Percentage points of accuracy above the average, and how many of them each second of learning bought: over "
        f"the first epoch and over all ({whose(records)}).",
    )


def tournament_table(records: Sequence[Record]) -> pd.DataFrame:
    """Time and memory of NP Merge with more models, one epoch for each pair; a row a number of models.

    Args:
        records: of ``cost``.
    """
    found = _tournaments(records)
    texts = {
        "merges": found["merges"].map("{:.0f}".format),
        "s": found["seconds"].map("{:.1f}".format),
        "s a merge": (found["seconds"] / found["merges"]).map("{:.1f}".format),
        "peak, MiB": found["peak_mib"].map("{:.2f}".format),
    }
    return captioned(
        pd.DataFrame(texts),
        "Tournaments of NP Merge with more and more models, one epoch for each pair, and the most memory at any time "
        f"({whose(records)}).",
    )


def verdict(records: Sequence[Record]) -> str:
    """What the records say of NP Merge, in sentences (Markdown).

    Args:
        records: of ``cost``.
    """
    beside = ratios(records).xs(OURS, level="method")
    values = measured(records).set_index(["model", "method"])
    ours, average, control = (values.xs(m, level="method") for m in (OURS, START, CONTROL))
    gain, ahead = ours["top1"] - average["top1"], ours["top1"] - control["top1"]
    to_average = (
        f"Beside **averaging**, NP Merge took {span(ours['seconds'] / average['seconds'], '.1f')} times as long, and "
        f"the change in accuracy was {span(gain, '+.1f')} percentage points."
    )
    to_finetuning = (
        f"Beside **fine-tuning**, an epoch took {span(beside['time'], '.2f')} times as long. NP Merge held "
        f"{span(beside['held'], '.2f')} times the memory between two steps; at the peak of a step it was "
        f"{span(beside['peak'], '.2f')} times as much. It optimised as many numbers, and after as many epochs the "
        f"difference in accuracy was {span(ahead, '+.1f')} percentage points."
    )
    lines = [to_average, to_finetuning]
    more = _tournaments(records)
    if len(more) > 1:
        few, many = more.index.min(), more.index.max()
        times = more.loc[many] / more.loc[few]
        lines.append(
            f"With {many} **models** in the place of {few} there were {times['merges']:.0f} times as many merges. The "
            f"tournament took {times['seconds']:.1f} times as long, and its peak memory was {times['peak_mib']:.2f} "
            "times as much."
        )
    return "\n".join(f"- {line}" for line in lines)


def expenses(records: Mapping[str, Sequence[Record]]) -> pd.DataFrame:
    """What each experiment took, a row a profile and experiment.

    The time of a seed is what its numbers take one after the other, on average over the seeds, with the base models
    that were trained for them. Several side by side take less.

    Args:
        records: of all experiments, by the name of their profile.

    Returns:
        A table of text; dashes where there is no record.
    """
    rows = {}
    for profile, kept in records.items():
        for experiment in experiments.EXPERIMENTS:
            if whole := len(experiments.cells(experiment, profile, [0])):
                mine = [one for one in kept if one.cell.experiment == experiment]
                rows[profile, experiment] = _expense(mine, whole)
    result = pd.DataFrame.from_dict(rows, orient="index").fillna(NOTHING)
    result.index = pd.MultiIndex.from_tuples(result.index, names=["profile", "experiment"])
    return captioned(
        result,
        "What one seed of each experiment took: the time, the most memory of its process, and the device.",
    )


def _expense(records: Sequence[Record], whole: int) -> dict[str, str]:
    known = {"numbers a seed": str(whole), "records": str(len(records) or "none")}
    if not records:
        return known
    spent: dict[tuple[str, str], list[float]] = {}
    for record in records:
        where = record.cell.setting, record.cell.name
        spent.setdefault(where, []).append(record.provenance.seconds)
    sources = [record.provenance for record in records]
    trained = {
        name: one.get("seconds", 0) for each in sources for name, one in each.base_models.items()
    }
    seeds = len({record.cell.seed for record in records})
    seconds = sum(map(fmean, spent.values())) + sum(trained.values()) / seeds
    peaks = [source.peak_memory_mib for source in sources if source.peak_memory_mib]
    return known | {
        "time a seed": "more than " * (len(spent) < whole) + duration(seconds),
        "peak memory": f"{max(peaks):,.0f} MiB" if peaks else NOTHING,
        "device": ", ".join(sorted(set(map(device_text, sources)))),
    }


def plot_width(records: Sequence[Record]) -> Figure:
    """Seconds of an epoch, of what has epochs, and peak memory against the width of the network; axes are logarithmic.

    Args:
        records: of ``cost``.
    """
    found = measured(records)
    figure, axes = panels([2.4, 2.4], sharex=True)
    metrics = {"seconds_per_epoch": "seconds an epoch", "peak_mib": "peak memory (MiB)"}
    for axis, (metric, title) in zip(axes, metrics.items(), strict=True):
        for _, rows in found.dropna(subset=metric).groupby("place"):
            _line(axis, rows["method"].iloc[0], rows["width"], rows[metric])
        axis.set_title(title)
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        for which in (axis.xaxis, axis.yaxis):
            which.set_minor_locator(NullLocator())
        axis.set_yticks(*_ticks(axis.get_ylim()))
    widths = sorted(set(found["width"]))
    axes[1].set_xticks(widths, [f"x{width:g}" for width in widths])
    axes[1].set_xlabel("width of the network")
    label_ends(axes)
    both = ratios(records).xs(OURS, level="method")
    ours, theirs = METHODS[OURS].label, METHODS[CONTROL].label.lower()
    title = f"An epoch of {ours} takes {span(both['time'], '.2f')} times as long as one of {theirs}"
    peak = f"Peak memory is {span(both['peak'], '.2f')} times {theirs}'s"
    alt = f"Seconds an epoch and peak memory at {len(widths)} widths, x{widths[0]:g} to x{widths[-1]:g}"
    return describe(figure, f"{peak}. {alt}", title)


def plot_curves(records: Sequence[Record]) -> Figure:
    """Test accuracy against seconds, one point an epoch, in one panel a network.

    Args:
        records: of ``cost``.
    """
    found = curves(records)
    models = list(dict.fromkeys(found["model"]))
    figure, axes = panels([2.1] * len(models))
    for axis, model in zip(axes, models, strict=True):
        here = found[found["model"] == model]
        for method, points in here.groupby("method", sort=False):
            _line(axis, str(method), points["seconds"], points["top1"])
        start = here[here["epoch"] == 0].iloc[0]
        axis.plot(
            start["seconds"], start["top1"], MARKERS[0], color=METHODS[START].color, ms=6, zorder=5
        )
        axis.annotate(
            f"{METHODS[START].label} {start['top1']:.1f}", (start["seconds"], start["top1"]), (8, 0),
            textcoords="offset points", va="center",
        )  # fmt: skip
        axis.set_xlim(0, None)
        axis.set_title(f"{model}, test accuracy (%)")
    axes[-1].set_xlabel("seconds since the two models were trained")
    label_ends(axes)
    last = (
        found[found["epoch"] == found["epoch"].max()]
        .pivot(index="model", columns="method", values="top1")
        .loc[models]
    )
    ours, theirs = METHODS[OURS].label, METHODS[CONTROL].label.lower()
    lead = last[OURS] - last[CONTROL]
    title = f"{ours} minus {theirs} after the last epoch: {span(lead, '+.1f')} points"
    told = [
        f"{model}: {ours} {row[OURS]:.1f} %, {theirs} {row[CONTROL]:.1f} %"
        for model, row in last.iterrows()
    ]
    return describe(figure, f"Test accuracy by seconds. {'; '.join(told)}", title)


def _label(method: str) -> str:
    return Combination(method, "permute").label


def _line(axis: Axes, method: str, x: Any, y: Any) -> None:
    # Fine-tuning's marks are the largest, to be seen where others lie on them.
    number = [name for name, one in METHODS.items() if one.kind == "aggregate"].index(method)
    size, order = (9, 3) if method == CONTROL else (6, 4)
    axis.plot(
        x, y, marker=MARKERS[number % len(MARKERS)], ms=size, lw=1.8, zorder=order,
        color=METHODS[method].color, label=METHODS[method].label,
    )  # fmt: skip


def _ticks(limits: tuple[float, float]) -> tuple[list[float], list[str]]:
    """About three to six round numbers within the limits of a logarithmic axis."""
    low, high = limits
    decades = range(int(np.floor(np.log10(low))), int(np.ceil(np.log10(high))) + 1)
    for digits in ((1,), (1, 2, 5), (1, 1.5, 2, 3, 5, 7)):
        every = [digit * 10.0**decade for decade in decades for digit in digits]
        inside = [value for value in every if low <= value <= high]
        if len(inside) >= 3:
            break
    return inside, [f"{value:g}" for value in inside]


def _tournaments(records: Sequence[Record]) -> pd.DataFrame:
    rows = table([record for record in records if record.rows[0].many is not None])
    return rows.pivot_table(index="models", columns="metric", values="value")
