"""NP Merge minus fine-tuning, wherever both were given the same: the picture and the table of the book's question."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from npmerge.aggregate import QUANTILES
from npmerge.catalogue import profile_names
from npmerge.experiments import EXPERIMENTS, cells, load_profile
from npmerge.methods import METHODS
from npmerge.report.captions import captioned
from npmerge.report.claims import SEEDS
from npmerge.report.margins import Margin, paired_margin
from npmerge.report.numbers import Place, in_order, paper_summary, place_of, size_order
from npmerge.report.plots import (
    describe,
    legend_below,
    looks,
    name_rows,
    panels,
    rows_height,
)
from npmerge.report.words import NOTHING, place_labels, seed_count, signed, size_label
from npmerge.store.records import Cell, Record

NP, FINETUNE = "np_merge", "finetune"
GRID = "comparison"
"""The experiment that varies one factor at a time."""
UNTOLD = "#6B7280"
"""Colour of a difference that its seeds do not tell from none."""
PAPER = "the paper"
FEW_ROWS = 12
"""Of a table that is shown as it is; a longer one is folded."""
LINEAR = 3
"""Percentage points around zero that the picture's axis shows to scale; beyond them it is logarithmic."""


@dataclass(frozen=True)
class Point:
    """NP Merge and fine-tuning, both given the same data, steps, learning rate or tuning.

    Attributes:
        source: whose numbers they are: ``"profile grid"``, or ``"the paper"``.
        group: what is varied.
        row: the value that it has here.
        align: the alignment before both.
        accuracy: of NP Merge and of fine-tuning, means in percent.
        singles: NP Merge minus fine-tuning in percentage points, a value a seed; none of the paper, which prints means.
        loss: of the last epoch of learning, NP Merge's and fine-tuning's, means in nats, if there are records.
        spread: between which coefficients the middle nine tenths of alpha lie at the end, means over the seeds.
    """

    source: str
    group: str
    row: str
    align: str
    accuracy: tuple[float, float]
    singles: tuple[float, ...] = ()
    loss: tuple[float, float] | None = None
    spread: tuple[float, float] | None = None

    @property
    def margin(self) -> Margin:
        """NP Merge minus fine-tuning, with its interval; of the paper, the difference of its means."""
        if not self.singles:
            return Margin(self.accuracy[0] - self.accuracy[1], math.nan, 0)
        return paired_margin(pd.Series(self.singles))

    @property
    def ahead(self) -> str:
        """Who is ahead by more than the interval: the label of a method, or empty if nobody can tell."""
        margin = self.margin
        if margin.seeds < SEEDS or not abs(margin.mean) > margin.half:
            return ""
        return METHODS[NP if margin.mean > 0 else FINETUNE].label


@dataclass(frozen=True)
class _Pair:
    """Records of the two methods whose configurations differ in the method alone, by seed."""

    first: Record
    np_merge: Mapping[int, Record]
    finetune: Mapping[int, Record]

    @property
    def config(self) -> dict[str, Any]:
        return self.first.config

    @property
    def options(self) -> dict[str, Any]:
        options: dict[str, Any] = self.config["aggregate"]["options"]
        return options

    def point(self, source: str, group: str, row: str) -> Point:
        seeds = sorted(self.np_merge.keys() & self.finetune.keys())
        ours, theirs = ([side[seed] for seed in seeds] for side in (self.np_merge, self.finetune))
        accuracies = [list(map(_top1, side)) for side in (ours, theirs)]
        singles = tuple(a - b for a, b in zip(*accuracies, strict=True))
        losses = [
            [one.details["history"][-1] for one in side if one.details.get("history")]
            for side in (ours, theirs)
        ]
        spreads = [one.details["spread"][-1] for one in ours if one.details.get("spread")]
        low, high = (QUANTILES.index(share) for share in (0.05, 0.95))
        return Point(
            source, group, row, str(self.first.rows[0].align),
            (fmean(accuracies[0]), fmean(accuracies[1])), singles,
            (fmean(losses[0]), fmean(losses[1])) if all(losses) else None,
            (fmean(one[low] for one in spreads), fmean(one[high] for one in spreads)) if spreads else None,
        )  # fmt: skip


def grid_points(records: Sequence[Record]) -> list[Point]:
    """The rows of the grid, grouped by the factor that is varied; each group has the reference too.

    Args:
        records: of :data:`GRID` at one profile.
    """
    pairs = _pairs(_as_listed(records))
    if not pairs:
        return []
    reference = pairs[0]
    source = f"profile {reference.first.cell.profile}"
    found = []
    for factor in _FACTORS:
        others = [pair for pair in pairs if _varied(pair, reference) is factor]
        for pair in sorted([reference, *others], key=factor.value) if others else []:
            row = factor.label(pair) + " (reference)" * (pair is reference)
            found.append(pair.point(source, factor.title, row))
    return found


def reference_sentence(records: Sequence[Record]) -> str:
    """What all rows of the grid have in common but for the one factor that each varies, as a sentence.

    Args:
        records: of :data:`GRID` at one profile.
    """
    pairs = _pairs(_as_listed(records))
    if not pairs:
        return ""
    first, options = pairs[0].first, pairs[0].options
    row, data = first.rows[0], first.config["data"]
    return (
        f"The reference: {row.model}x{row.width:g} on {row.dataset} at {row.image_size}x{row.image_size} pixels, "
        f"{METHODS[str(row.align)].label}; then {options['epochs']} epochs on all images in batches of "
        f"{data['batch_size']} at a learning rate of {options['lr']:g}."
    )


def other_points(records: Sequence[Record]) -> list[Point]:
    """What the records of other experiments say, a group a profile.

    Args:
        records: of any experiments and profiles, pairs of models only; those of :data:`GRID` are left out.
    """
    pairs = _pairs(
        [one for one in records if one.cell.experiment != GRID and one.rows[0].many is None]
    )
    places = [_whole(place_of(pair.first)) for pair in pairs]
    names = place_labels(replace(place, setting="") for place in places)
    found: dict[tuple[str, str, str], Point] = {}
    for pair, place in zip(pairs, places, strict=True):
        source = f"profile {pair.first.cell.profile}"
        row = names[replace(place, setting="")] + ", tuned" * pair.first.rows[0].tuned
        found.setdefault(
            (source, row, str(pair.first.rows[0].align)), pair.point(source, source, row)
        )
    return sorted(found.values(), key=lambda one: one.source)


def paper_points() -> list[Point]:
    """The paper's, wherever its tables of pairs have both after the same alignment."""
    found: dict[tuple[Place, str], Point] = {}
    names = place_labels(
        _whole(place) for one in EXPERIMENTS.values() for place in paper_summary(one.table)
    )
    for experiment in EXPERIMENTS.values():
        for place, here in paper_summary(experiment.table).items():
            for method in in_order(here):
                rival = replace(method, aggregate=FINETUNE)
                if method.aggregate == NP and rival in here:
                    ours, theirs = here[method][0], here[rival][0]
                    align = str(method.align)
                    point = Point(PAPER, PAPER, names[_whole(place)], align, (ours, theirs))
                    found.setdefault((_whole(place), align), point)
    return list(found.values())


def comparison_table(points: Sequence[Point]) -> pd.DataFrame:
    """The numbers of the picture.

    Args:
        points: of any source.

    Returns:
        A row a point: the margin with its 95% interval, in percentage points; both accuracies; the training loss of the
        last epoch, NP Merge's / fine-tuning's; and the range of the middle nine tenths of alpha's coefficients.
    """
    rows = {
        (
            one.source,
            one.group if one.group != one.source else "",
            f"{one.row}, {METHODS[one.align].label}",
        ): {
            "NP \N{MINUS SIGN} fine-tuning": one.margin.text
            if one.singles
            else signed(one.margin.mean),
            "NP Merge": f"{one.accuracy[0]:.2f}",
            "fine-tuning": f"{one.accuracy[1]:.2f}",
            "loss at the end": f"{one.loss[0]:.2f} / {one.loss[1]:.2f}" if one.loss else NOTHING,
            "alpha": f"{one.spread[0]:.2f} to {one.spread[1]:.2f}" if one.spread else NOTHING,
        }
        for one in points
    }
    index = pd.MultiIndex.from_tuples(rows, names=["numbers of", "varied", "point"])
    return captioned(
        pd.DataFrame(list(rows.values()), index=index),
        "Every number of the picture: NP Merge minus fine-tuning in percentage points of top-1 accuracy, with its 95% "
        f"interval from two seeds on ({_sources(points)}).",
        folded=len(rows) > FEW_ROWS,
    )


def _sources(points: Sequence[Point]) -> str:
    """Whose numbers points are, and at which scale they were made."""
    known = dict.fromkeys(one.source for one in points)
    titles = {f"profile {one.name}": one.title for one in map(load_profile, profile_names())}
    titles[PAPER] = "32\N{MULTIPLICATION SIGN}32 pixels, 10 epochs of merging"
    return "; ".join(f"{name}: {titles[name]}" for name in known)


def answer(points: Sequence[Point]) -> str:
    """The answer in words, as Markdown: what favours whom, and who is ahead where.

    Args:
        points: from :func:`grid_points`.

    Returns:
        A sentence on what moves the margin the same way in every seed, from the first row of its group to the last;
        and a line a group. Fewer than :data:`npmerge.report.claims.SEEDS` seeds are not judged.
    """
    ours, theirs = METHODS[NP].label, METHODS[FINETUNE].label.lower()
    groups = _grouped(points)
    more = {
        sign: [name for (name, _), here in groups.items() if _trend(here) == sign]
        for sign in (1, -1)
    }
    sentences = [
        f"{ours} {verb} {theirs} with more of each of these: {', '.join(more[sign])}."
        for sign, verb in ((1, "gains on"), (-1, "loses ground to"))
        if more[sign]
    ]
    lines = []
    for (name, _), here in groups.items():
        values = ", ".join(f"{signed(one.margin.mean)} at {one.row}" for one in here)
        seeds = min(len(one.singles) for one in here)
        words = [
            f"{method} is ahead at {', '.join(one.row for one in here if one.ahead == method)}"
            for method in dict.fromkeys(one.ahead for one in here if one.ahead)
        ] or ["nobody is ahead by more than the seeds' spread"]
        if seeds < SEEDS:
            words = [f"{seed_count(seeds)}: not judged"]
        lines.append(f"- **{name}**: {values}; {'; '.join(words)}.")
    return "\n".join([" ".join(sentences), "", *lines])


def plot_comparison(points: Sequence[Point]) -> Figure:
    """NP Merge minus fine-tuning, a row a point, in one panel a group; right of the zero line NP Merge is better.

    Filled marks are means over the seeds with their 95% intervals, small ones single seeds, hollow ones the paper's
    means. They have the colour of who is better, or none where the interval does not tell. Beyond :data:`LINEAR` points
    either side the axis is logarithmic.

    Args:
        points: in the order in which they are shown.
    """
    groups = _grouped(points)
    names = {group: list(dict.fromkeys(one.row for one in here)) for group, here in groups.items()}
    titles = {group: _title(*group, here).replace(" (", "\n(") for group, here in groups.items()}
    heights = [
        0.62 + 0.19 * titles[group].count("\n") + rows_height(names[group]) for group in groups
    ]
    figure, axes = panels(heights, sharex=True)
    drawn = looks({one.align for one in points})
    for axis, (group, here) in zip(axes, groups.items(), strict=True):
        axis.set_title(titles[group])
        axis.axvline(0, color="black", lw=1.2, zorder=1)
        rows = name_rows(axis, names[group])
        aligned = [align for align in drawn if any(one.align == align for one in here)]
        shifts = dict(zip(aligned, np.linspace(-0.2, 0.2, len(aligned)), strict=True))
        for one in here:
            shift = shifts[one.align] if len(aligned) > 1 else 0.0
            _draw(axis, one, rows[one.row] + shift, drawn[one.align][1])
    last = axes[-1]
    _scale(last, [value for one in points for value in (*one.singles, *_ends(one))])
    ours, theirs = METHODS[NP].label, METHODS[FINETUNE].label.lower()
    last.set_xlabel(
        f"\N{LEFTWARDS ARROW} {theirs} better  |  {ours} better \N{RIGHTWARDS ARROW}\npoints of test accuracy"
    )
    for align, (_, marker, _) in drawn.items():
        last.plot([], [], marker, color="black", label=f"after {METHODS[align].label}")
    if len({not one.singles for one in points}) > 1:
        last.plot([], [], "o", color="black", mfc="none", label=PAPER)
    legend_below(figure)
    alt = "Settings of too few seeds, and those whose interval has zero in it, count for neither"
    return describe(figure, alt, _lead_text(points))


def _lead_text(points: Sequence[Point]) -> str:
    """In how many settings NP Merge is ahead and behind: ours beyond the interval, the paper's by its means."""
    settings = {(one.source, one.align, one.accuracy): one for one in points}.values()
    ours = [one.ahead for one in settings if one.singles]
    paper = [one.margin.mean > 0 for one in settings if not one.singles]
    first, second = METHODS[NP].label, METHODS[FINETUNE].label
    told = [
        f"in {ours.count(first)} of {len(ours)} settings here and behind in {ours.count(second)}" * bool(ours),
        f"in {sum(paper)} of {len(paper)} in the paper" * bool(paper),
    ]  # fmt: skip
    return f"{first} is ahead of {second.lower()} {'; '.join(filter(None, told))}"


def _grouped(points: Sequence[Point]) -> dict[tuple[str, str], list[Point]]:
    """Those of one source in one group together, in their order."""
    groups: dict[tuple[str, str], list[Point]] = {}
    for one in points:
        groups.setdefault((one.group, one.source), []).append(one)
    return groups


def _trend(here: Sequence[Point]) -> int:
    """1 if the last row's margin is above the first's in every seed, -1 if below, 0 if seeds disagree or are few."""
    first, last = here[0].singles, here[-1].singles
    if len(first) != len(last) or len(first) < SEEDS:
        return 0
    signs = {(b > a) - (b < a) for a, b in zip(first, last, strict=True)}
    return signs.pop() if len(signs) == 1 else 0


def _title(group: str, source: str, here: Sequence[Point]) -> str:
    """A group's name, whose numbers they are, and of how many seeds."""
    counts = sorted({len(one.singles) for one in here if one.singles})
    seeds = " or ".join([*map(str, counts[:-1]), *map(seed_count, counts[-1:])]) or "means"
    return f"{group} ({', '.join([source] * (source != group) + [seeds])})"


def _draw(axis: Axes, one: Point, y: float, marker: str) -> None:
    told = bool(one.ahead) or not one.singles
    colour = METHODS[NP if one.margin.mean > 0 else FINETUNE].color if told else UNTOLD
    if one.singles:
        axis.plot(_ends(one), [y, y], color=colour, lw=2, alpha=0.5, zorder=2)
        axis.plot(one.singles, [y] * len(one.singles), ".", color=colour, ms=5, alpha=0.6, zorder=3)
    face = colour if one.singles else "none"
    axis.plot(one.margin.mean, y, marker, color=colour, mfc=face, ms=6, zorder=4)


def _ends(one: Point) -> tuple[float, float]:
    """Those of the interval; the mean where there is none."""
    margin = one.margin
    return (margin.mean, margin.mean) if math.isnan(margin.half) else (margin.low, margin.high)


def _scale(axis: Axes, shown: Sequence[float]) -> None:
    """An axis to scale around zero, so that small differences are seen beside large ones."""
    reach = max(LINEAR, 1.25 * max(map(abs, shown)))
    axis.set_xscale("symlog", linthresh=LINEAR, linscale=1)
    ticks = [value for value in (1, 3, 10, 30, 100) if value <= reach]
    values = [-value for value in reversed(ticks)] + [0, *ticks]
    axis.set_xticks(
        values, [f"{value:+d}".replace("-", "\N{MINUS SIGN}") if value else "0" for value in values]
    )
    axis.minorticks_off()
    axis.set_xlim(-reach, reach)


def _as_listed(records: Sequence[Record]) -> list[Record]:
    """In the order of today's cells, which begin with the reference."""
    seeds = sorted({record.cell.seed for record in records})
    profiles = dict.fromkeys(record.cell.profile for record in records)
    labels = [cell.label for name in profiles for cell in cells(GRID, name, seeds)]
    order = {label: number for number, label in enumerate(labels)}

    def place(record: Record) -> int:
        label = Cell(**record.cell.model_dump(), config=record.config).label
        return order.get(label, len(order))

    return sorted(records, key=place)


def _pairs(records: Iterable[Record]) -> list[_Pair]:
    """NP Merge and fine-tuning where their configurations differ in the method alone, in the records' order."""
    found: dict[str, tuple[Record, dict[str, dict[int, Record]]]] = {}
    for record in records:
        aggregate = record.config.get("aggregate", {})
        if aggregate.get("method") not in (NP, FINETUNE):
            continue
        cell = record.cell
        given = record.config | {"seed": None, "aggregate": aggregate["options"]}
        key = json.dumps([cell.profile, cell.experiment, cell.setting, given], sort_keys=True)
        _, sides = found.setdefault(key, (record, {NP: {}, FINETUNE: {}}))
        sides[aggregate["method"]][cell.seed] = record
    pairs = [_Pair(first, sides[NP], sides[FINETUNE]) for first, sides in found.values()]
    return [pair for pair in pairs if pair.np_merge.keys() & pair.finetune.keys()]


@dataclass(frozen=True)
class _Factor:
    """What may be varied.

    Attributes:
        title: of its group of rows.
        value: a point's, a number that rows are ordered by.
        label: of a point's row.
    """

    title: str
    value: Callable[[_Pair], float]
    label: Callable[[_Pair], str]


_FACTORS = (
    _Factor(
        "width of the network",
        lambda pair: pair.first.rows[0].width,
        lambda pair: f"{pair.first.rows[0].width:g}",
    ),
    _Factor(
        "optimisation images, at equal steps",
        lambda pair: size_order(pair.first.rows[0].examples_per_class),
        lambda pair: size_label(pair.first.rows[0].examples_per_class, "all"),
    ),
    _Factor(
        "epochs, on all images",
        lambda pair: pair.options["epochs"],
        lambda pair: f"{pair.options['epochs']}",
    ),
    _Factor(
        "tuning of both",
        lambda pair: pair.first.rows[0].tuned,
        lambda pair: "each tuned" if pair.first.rows[0].tuned else "not tuned",
    ),
    _Factor(
        "learning rate of both",
        lambda pair: pair.options["lr"],
        lambda pair: f"{pair.options['lr']:g}",
    ),
)
"""In the order in which a point is looked at: with fewer images there are more epochs, for as many steps."""


def _varied(pair: _Pair, reference: _Pair) -> _Factor | None:
    """The factor that a point of the grid varies; ``None`` if it is the reference."""
    return next((one for one in _FACTORS if one.value(pair) != one.value(reference)), None)


def _whole(place: Place) -> Place:
    """A place; all the images there are is what a place has where nobody varies their number."""
    return replace(place, examples=None) if place.examples == "all" else place


def _top1(record: Record) -> float:
    return next(row.value for row in record.rows if row.metric == "top1")
