"""The tables and the figure of the chapter on the size of the optimisation data."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import chain, cycle

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from npmerge.experiments import EXPERIMENTS
from npmerge.methods import METHODS, Combination
from npmerge.report.captions import captioned, whose
from npmerge.report.margins import paired_margin
from npmerge.report.numbers import (
    Size,
    by_method,
    in_order,
    is_merged,
    paper_summary,
    size_order,
    summary,
)
from npmerge.report.plots import REFERENCES, describe, label_ends, panels
from npmerge.report.tables import in_paper, mean_std
from npmerge.report.words import NOTHING, aggregation_label, place_labels, size_label
from npmerge.store.records import Record, table


def data_size_table(records: Sequence[Record]) -> pd.DataFrame:
    """Our numbers on optimisation data of several sizes beside the paper's.

    Args:
        records: of ``data_size`` at one profile.

    Returns:
        A row for each alignment and number of images a class, ours or the paper's; for each setting the methods' mean ±
        std in ours and in the paper, as text.
    """
    ours = summary(table(records))
    paper = paper_summary(EXPERIMENTS[records[0].cell.experiment].table)
    places = list(dict.fromkeys(replace(place, examples=None) for place in ours))
    theirs = {place: found for place in places if (found := in_paper(place, records[0]))}
    names = place_labels(places) | place_labels(theirs.values())
    sizes = sorted({place.examples for place in (*ours, *paper)}, key=size_order, reverse=True)
    methods = _merged(chain(*ours.values(), *paper.values()))
    ways, alignments = _ways(methods), _alignments(methods)
    cells: dict[tuple[str, str], list[str]] = {}
    for place in places:
        columns = [(f"{names[place]} (ours)", ours, place)]
        if place in theirs:
            columns.append((f"{names[theirs[place]]} (paper)", paper, theirs[place]))
        for title, source, where in columns:
            for way in ways:
                cells[title, aggregation_label(way)] = [
                    mean_std(
                        source.get(replace(where, examples=size), {}), replace(way, align=align)
                    )
                    for align in alignments
                    for size in sizes
                ]
    rows = [(METHODS[align].label, size_label(size)) for align in alignments for size in sizes]
    index = pd.MultiIndex.from_tuples(rows, names=["alignment", "images"])
    result = pd.DataFrame(cells, index=index)
    return captioned(
        result.loc[:, (result != NOTHING).any()],
        "Top-1 accuracy on the full test set in percent, by the number of optimisation images, mean ± standard "
        f"deviation over the seeds ({whose(records, paper=bool(theirs))}).",
    )


def data_size_winners(records: Sequence[Record]) -> pd.DataFrame:
    """Which method is best at each number of optimisation images a class, and how far ahead of another family it is.

    Args:
        records: of ``data_size`` at one profile.

    Returns:
        A row for each setting and number of images, a column an alignment: the method with the highest mean, its lead
        over the best method of another family in percentage points, with its 95% interval.
    """
    found = by_method(table(records))
    names = place_labels(replace(place, examples=None) for place in found)
    rows: dict[tuple[str, str], dict[str, str]] = {}
    for place, here in found.items():
        row = rows.setdefault(
            (names[replace(place, examples=None)], size_label(place.examples)), {}
        )
        for align in _alignments(_merged(here)):
            ranked = sorted(
                (method for method in _merged(here) if method.align == align),
                key=lambda method: -here[method].mean(),
            )
            first = ranked[0]
            text = first.label
            for rival in [method for method in ranked if method.family != first.family][:1]:
                lead = paired_margin((here[first] - here[rival]).dropna())
                text += f", {lead.text} over {rival.label}"
            row[f"after {METHODS[align].label}"] = text
    index = pd.MultiIndex.from_tuples(rows, names=["setting", "images"])
    return captioned(
        pd.DataFrame(list(rows.values()), index=index),
        "The method with the highest mean, and its lead in percentage points over the best method of another family "
        "(merging only, NP Merge, fine-tuning), from two seeds on with its 95% interval.",
    )


def plot_data_size(records: Sequence[Record]) -> Figure:
    """Accuracy against the number of optimisation images a class, in one panel an alignment, of one setting.

    Bands are standard deviations over the seeds. Lines across are what merged models are held against, with batch norm
    reset on all training images. Where the setting is the paper's own, thin dashed lines are the paper's numbers.

    Args:
        records: of ``data_size`` in one setting.

    Raises:
        ValueError: there are several settings.
    """
    settings = sorted({record.cell.setting for record in records})
    if len(settings) != 1:
        raise ValueError(f"{len(settings)} settings, {settings}: give the records of one")
    ours = summary(table(records))
    paper = paper_summary(EXPERIMENTS[records[0].cell.experiment].table)
    place = replace(next(iter(ours)), examples=None)
    theirs = in_paper(place, records[0])
    if theirs != replace(place, setting=""):
        paper = {}
    here = {place.examples: rows for place, rows in ours.items()}
    there = {one.examples: rows for one, rows in paper.items()}
    ticks = sorted({*here, *there}, key=size_order)
    methods = _merged(chain(*ours.values()))
    alignments = _alignments(methods)
    figure, axes = panels([3.0] * len(alignments), sharex=True, sharey=True)
    for axis, align in zip(axes, alignments, strict=True):
        for method in (m for m in methods if m.align == align):
            line, marker = (":", "D") if method.tuned else ("-", "o")
            x, mean, std = _by_size(here, method, ticks)
            axis.plot(
                x, mean, line, marker=marker, ms=5, color=method.color,
                label=aggregation_label(method),
            )  # fmt: skip
            axis.fill_between(x, mean - std, mean + std, color=method.color, alpha=0.15, lw=0)
            x, mean, _ = _by_size(there, method, ticks)
            if len(x):
                axis.plot(x, mean, "--", color=method.color, lw=1)
        whole = here[ticks[-1]]
        across = [method for method in whole if not is_merged(method)]
        for method, line in zip(across, cycle(REFERENCES), strict=False):
            level = whole[method][0]
            axis.axhline(level, color=method.color, ls=line, lw=1.2, label=method.label)
        dashes = "; dashes: the paper's" * bool(there)
        axis.set_title(f"after {METHODS[align].label}, test accuracy (%){dashes}")
    axes[-1].set_xticks(range(len(ticks)), [str(size) for size in ticks])
    axes[-1].set_xlabel("optimisation images a class (not to scale)")
    label_ends(axes)
    sizes = sorted(here, key=size_order)
    best = {size: max(_merged(here[size]), key=lambda method: here[size][method]) for size in sizes}
    told = [
        f"with {size_label(size, 'all images')} {best[size].label}, {here[size][best[size]][0]:.1f} %"
        for size in sizes
    ]
    title = f"Best {'; '.join(dict.fromkeys((told[0], told[-1])))}"
    alt = f"Test accuracy by optimisation images, {place_labels([place])[place]}"
    return describe(figure, f"{alt}. Best {'; '.join(told)}", title)


def _by_size(
    rows: Mapping[Size, Mapping[Combination, tuple[float, float]]],
    method: Combination,
    ticks: Sequence[Size],
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Where a method's sizes stand on the axis, and its means and deviations there."""
    found = [
        (x, *rows[size][method])
        for x, size in enumerate(ticks)
        if size in rows and method in rows[size]
    ]
    x, mean, std = np.asarray(found, float).reshape(-1, 3).T
    return x, mean, np.nan_to_num(std)


def _merged(methods: Iterable[Combination]) -> list[Combination]:
    """Those that merge after an alignment, each once, in the registry's order."""
    return [m for m in in_order(methods) if is_merged(m) and m.align is not None]


def _ways(methods: Iterable[Combination]) -> list[Combination]:
    """What is done after the alignments."""
    return list(dict.fromkeys(replace(method, align=None) for method in methods))


def _alignments(methods: Iterable[Combination]) -> list[str]:
    known = {method.align for method in methods}
    return [name for name in METHODS if name in known]
