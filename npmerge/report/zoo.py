"""The tables and figures of the chapter on all methods."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import chain, product
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from npmerge.methods import GROUPS, Combination
from npmerge.report.captions import captioned, whose
from npmerge.report.claims import BASE, ENSEMBLE, SEEDS
from npmerge.report.margins import paired_margin
from npmerge.report.numbers import Place, by_method, is_merged, method_of, place_of, shown
from npmerge.report.plots import describe, label_ends, panels
from npmerge.report.words import NOTHING, duration, listed, place_labels, plus_minus, span
from npmerge.store.records import Record, table

AVERAGE = Combination("mean", "permute")
"""What every method is held against: the average after the alignment that comes before most of them."""
DIRECT = Combination("mean", "identity")
"""Two networks averaged as they are."""
NP = ("np_merge", "permute", "reset_batchnorm")
"""NP Merge as the paper has it."""
MARKERS = dict(zip(GROUPS, "osD^vX", strict=True))
"""A marker for each group of needs."""
APART = "apart"
"""Where models have initial weights of their own."""

Numbers = Mapping[Combination, "pd.Series[float]"]


def findings(records: Sequence[Record]) -> str:
    """What was found, as Markdown: a few sentences a setting.

    Args:
        records: of ``zoo`` at one profile.

    Returns:
        The range of each group of methods, and how many are above the average by more than the seeds' spread.
    """
    found = by_method(table(records))
    names = place_labels(found)
    return "\n".join(
        f"- **{names[place]}**: {' '.join(_sentences(here))}" for place, here in found.items()
    )


def _sentences(here: Numbers) -> Iterator[str]:
    if BASE in here and ENSEMBLE in here:
        yield (
            f"Each network alone has {here[BASE].mean():.1f} %, the ensemble of both {here[ENSEMBLE].mean():.1f} %"
            + (
                f", their average after Permute {here[AVERAGE].mean():.1f} %."
                if AVERAGE in here
                else "."
            )
        )
    for group, methods in _grouped(here).items():
        ranked = sorted(methods, key=lambda method: float(here[method].mean()))
        low, high = ranked[0], ranked[-1]
        yield (
            f"*Needs {group}* ({len(ranked)}): from {here[low].mean():.1f} % ({_name(low)}) to "
            f"{here[high].mean():.1f} % ({_name(high)})."
        )


def _grouped(here: Numbers) -> dict[str, list[Combination]]:
    """The methods that merge, by what they need."""
    merged = [method for method in here if is_merged(method)]
    groups = {group: [m for m in merged if m.group == group] for group in GROUPS}
    return {group: some for group, some in groups.items() if some}


def zoo_table(records: Sequence[Record], place: Place) -> pd.DataFrame:
    """All methods in one setting, those together that need the same.

    Args:
        records: of ``zoo`` at one profile.
        place: the setting.

    Returns:
        A row a method: the accuracy, how far it is from the average after Permute, paired over the seeds, and what it
        takes: passes over the data, seconds and memory.
    """
    here = by_method(table(records))[place]
    took = _took(records, place)
    rows = {
        (group, method.label): {
            "accuracy": plus_minus(float(here[method].mean()), float(here[method].std())),
            "minus the average": NOTHING
            if method == AVERAGE or AVERAGE not in here
            else _margin(here[method] - here[AVERAGE]),
            **took[method],
        }
        for group, methods in _grouped(here).items()
        for method in methods
    }
    index = pd.MultiIndex.from_tuples(rows, names=["needs", "method"])
    return captioned(
        pd.DataFrame(list(rows.values()), index=index),
        f"Every method on {place_labels([place])[place]} ({whose(records)}): test accuracy in percent, mean ± standard "
        "deviation over the seeds; the margin to the average after Permute in percentage points with its 95% interval; "
        "passes over the optimisation data and memory on top of the models in MiB, counted in a rehearsal; seconds of "
        "alignment, learning and correction.",
        folded=True,
    )


def _margin(differences: pd.Series[float]) -> str:
    """Without the number of seeds, which the caption says."""
    return paired_margin(differences.dropna()).text.partition(" (")[0]


def _took(records: Sequence[Record], place: Place) -> dict[Combination, dict[str, str]]:
    """What each method takes; seconds are means over the seeds."""
    found: dict[Combination, dict[str, list[float]]] = {}
    for record in records:
        if place_of(record) == place:
            about = found.setdefault(method_of(record), {"passes": [], "MiB": [], "s": []})
            values = {row.metric: row.value for row in record.rows}
            about["passes"] += [values["passes"]] if "passes" in values else []
            about["MiB"] += [values["peak_mib"]] if "peak_mib" in values else []
            spent = record.seconds
            about["s"].append(spent.alignment + spent.learning + spent.reset)
    return {
        method: {
            "passes": _mean(about["passes"], ".1f"),
            "seconds": duration(float(np.mean(about["s"]))),
            "MiB": _mean(about["MiB"], ".0f"),
        }
        for method, about in found.items()
    }


def _mean(values: Sequence[float], form: str) -> str:
    return format(float(np.mean(values)), form) if values else NOTHING


def combinations_table(records: Sequence[Record]) -> pd.DataFrame:
    """What becomes of NP Merge after another alignment, from another point, or before another correction.

    Args:
        records: of ``zoo`` at one profile.

    Returns:
        A row a variant and a column a setting: its margin to NP Merge after Permute, in percentage points.
    """
    found = by_method(table(records))
    names = place_labels(found)
    variants: dict[Combination, dict[str, str]] = {}
    for place, here in found.items():
        variations = [method for method in here if method.family == "np"]
        known = [m for m in variations if (m.aggregate, m.align, m.correct) == NP]
        for plain, method in product(known, variations):
            if method != plain:
                margin = _margin(here[method] - here[plain])
                variants.setdefault(method, {})[names[place]] = margin
    return captioned(
        pd.DataFrame.from_dict(
            {_name(method): row for method, row in variants.items()}, orient="index"
        ).fillna(NOTHING),
        "Variants of NP Merge minus NP Merge after Permute, both with the same data, steps and learning rates to "
        f"choose from, in percentage points with the 95% interval over the seeds ({whose(records)}).",
    )


def plot_effort(records: Sequence[Record]) -> Figure:
    """Accuracy against passes over the data, a panel a setting; colours are families, markers what a method needs.

    The most accurate method of each group of needs is named.

    Args:
        records: of ``zoo`` at one profile.
    """
    found = by_method(table(records))
    names = place_labels(found)
    figure, axes = panels([3.4] * len(found), sharex=True)
    highest: dict[str, list[float]] = {}
    told = []
    for axis, (place, here) in zip(axes, found.items(), strict=True):
        passes = _passes(records, place)
        for method, line in ((BASE, ":"), (ENSEMBLE, "--")):
            if method in here:
                level = float(here[method].mean())
                ends = [0, max(passes.values())]
                label = f"{method.label} {level:.1f}"
                axis.plot(ends, [level] * 2, color=method.color, ls=line, lw=1, label=label)
        said = []
        for group, methods in _grouped(here).items():
            points = {m: float(here[m].mean()) for m in methods if m in passes}
            best = max(points, key=lambda method: points[method])
            for method, mean in points.items():
                named = f"{_name(method)} {mean:.1f}" if method == best else None
                axis.plot(
                    passes[method], mean, MARKERS[group], color=method.color, alpha=0.85,
                    ms=9 if named else 6, label=named,
                )  # fmt: skip
            highest.setdefault(group, []).append(points[best])
            said.append(f"needs {group}: {_name(best)} {points[best]:.1f} %")
        axis.set_xscale("symlog", linthresh=1)
        axis.set_xticks([0, 1, 10, 100], ["0", "1", "10", "100"])
        axis.set(ylabel="test accuracy (%)")
        axis.set_title(names[place])
        told.append(f"{names[place]}: {', '.join(said)}")
    axes[-1].set_xlabel("passes over the optimisation data")
    marks = [
        Line2D([], [], ls="", marker=MARKERS[group], color="#6B7280", label=f"needs {group}")
        for group in highest
    ]
    figure.legend(handles=marks, loc="outside lower left", ncols=1)
    label_ends(axes, 24)
    title = "The highest that " + ", ".join(
        f"{group} reaches: {span(values, '.1f')} %"
        for group, values in highest.items()
        if group in (GROUPS[1], GROUPS[4])
    )
    return describe(figure, f"The most accurate of each group. {'. '.join(told)}", title)


def _name(method: Combination) -> str:
    return method.label.removesuffix(" (ours)").removesuffix(", tuned")


def _passes(records: Sequence[Record], place: Place) -> dict[Combination, float]:
    return {
        method_of(record): row.value
        for record in records
        if place_of(record) == place
        for row in record.rows
        if row.metric == "passes"
    }


def trunk_findings(records: Sequence[Record]) -> str:
    """Where each kind of method lives, as Markdown.

    Args:
        records: of ``shared_trunk`` at one profile.
    """
    columns = _by_trunk(records)
    lines = []
    for name, here in columns.items():
        where = {APART: "Trained apart", "0": "From common initial weights"}.get(
            name, f"After {name} common epoch{'s' * (name != '1')}"
        )
        told = [
            f"{word} {here[method].mean():.1f} %"
            for word, method in (("averaged as they are", DIRECT), ("the ensemble", ENSEMBLE))
            if method in here
        ]
        needing = [method for method in here if method.group == GROUPS[-1]]
        if needing and DIRECT in here:
            margins = [paired_margin((here[m] - here[DIRECT]).dropna()) for m in needing]
            values = span((float(here[m].mean()) for m in needing), ".1f")
            text = f"methods with the trunk as base {values} %"
            if min(margin.seeds for margin in margins) >= SEEDS:
                ahead, behind = (
                    sum(sign * margin.mean > margin.half for margin in margins) for sign in (1, -1)
                )
                text += (
                    f" ({ahead or 'none'} of {len(needing)} above the average beyond the seeds' spread, "
                    f"{behind or 'none'} below)"
                )
            told.append(text)
        learned = [m for m in here if is_merged(m) and m.group == GROUPS[4]]
        if learned:
            values = span((float(here[m].mean()) for m in learned), ".1f")
            told.append(f"learned with labels {values} %")
        lines.append(f"- {where}: {', '.join(told)}.")
    return "\n".join(lines)


def trunk_table(records: Sequence[Record]) -> pd.DataFrame:
    """How good each method is by the epochs that the models were trained together.

    Args:
        records: of ``shared_trunk`` at one profile.

    Returns:
        A row a method, those together that need the same, and a column a number of common epochs.
    """
    columns = _by_trunk(records)
    methods = list(dict.fromkeys(filter(shown, chain.from_iterable(columns.values()))))
    order = [*(m for m in methods if not is_merged(m)), *(
        method
        for group in GROUPS
        for method in methods
        if is_merged(method) and method.group == group
    )]  # fmt: skip
    rows = {
        (method.group if is_merged(method) else NOTHING, method.label): {
            name: plus_minus(float(here[method].mean()), float(here[method].std()))
            if method in here
            else NOTHING
            for name, here in columns.items()
        }
        for method in order
    }
    index = pd.MultiIndex.from_tuples(rows, names=["needs", "method"])
    return captioned(
        pd.DataFrame(list(rows.values()), index=index),
        f"Test accuracy in percent by the epochs trained together ({whose(records)}); {APART}: with initial weights "
        "of their own.",
        folded=True,
    )


def plot_trunk(records: Sequence[Record]) -> Figure:
    """Accuracy by the epochs that the models were trained together; a panel for methods with a base and one without.

    Args:
        records: of ``shared_trunk`` at one profile.
    """
    columns = _by_trunk(records)
    names = list(columns)
    methods = list(dict.fromkeys(method for here in columns.values() for method in here))
    merged = [method for method in methods if is_merged(method)]
    both = {
        "no base needed": [m for m in merged if m.group != GROUPS[-1]],
        "with the trunk as base": [m for m in merged if m.group == GROUPS[-1]],
    }
    figure, axes = panels([3.8, 3.8], sharex=True, sharey=True)
    for axis, (title, some) in zip(axes, both.items(), strict=True):
        for number, method in enumerate(some):
            places = [i for i, name in enumerate(names) if method in columns[name]]
            values = [float(columns[names[i]][method].mean()) for i in places]
            axis.plot(
                places, values, marker=MARKERS[GROUPS[number % len(GROUPS)]], ms=5, lw=1.3,
                color=method.color, ls=("-", "--", ":", "-.")[number % 4], label=_name(method).removesuffix("-D"),
            )  # fmt: skip
        for method in (BASE, ENSEMBLE):
            if all(method in here for here in columns.values()):
                values = [float(here[method].mean()) for here in columns.values()]
                axis.plot(values, color=method.color, ls=(0, (1, 2)), lw=1.2, label=method.label)
        axis.set(ylabel="test accuracy (%)")
        axis.set_title(title)
    axes[-1].set_xticks(range(len(names)), names)
    axes[-1].set_xlabel("epochs trained together")
    label_ends(axes)
    first, last = (columns[name] for name in (names[0], names[-1]))
    title = (
        f"Averaged as they are, networks reach {first[DIRECT].mean():.1f} % if trained apart, "
        f"{last[DIRECT].mean():.1f} % after {names[-1]} common epochs"
    )
    told = (
        f"{name}: {span((float(v.mean()) for m, v in here.items() if is_merged(m)), '.1f')} %"
        for name, here in columns.items()
    )
    return describe(figure, f"From the lowest method to the highest, {listed(told)}", title)


def _by_trunk(records: Sequence[Record]) -> dict[str, Numbers]:
    """The numbers of each method by the common epochs, in words."""
    found: dict[Any, list[Record]] = {}
    for record in records:
        found.setdefault(record.config["setting"].get("trunk"), []).append(record)
    return {
        APART if together is None else str(together): next(iter(by_method(table(some)).values()))
        for together, some in sorted(
            found.items(), key=lambda one: -1 if one[0] is None else one[0]
        )
    }
