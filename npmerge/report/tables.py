"""The tables that chapters share."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import chain
from typing import Any, Literal

import pandas as pd

from npmerge.experiments import EXPERIMENTS, setting_of
from npmerge.methods import Combination
from npmerge.report.captions import captioned, whose
from npmerge.report.claims import Verdict
from npmerge.report.numbers import Place, in_order, method_of, paper_summary, place_of, summary
from npmerge.report.words import (
    NOTHING,
    STALE,
    device_text,
    place_labels,
    plus_minus,
    short_revision,
    size_label,
)
from npmerge.store.records import Record, table

FEW_PLACES = 3
"""Up to so many settings are columns of a table of verdicts; more are rows."""


def beside_paper(records: Sequence[Record]) -> pd.DataFrame:
    """Our numbers beside the column of the paper that each setting reproduces or stands in for.

    Args:
        records: of one experiment at one profile.

    Returns:
        One row a method; for each setting our mean ± std and the paper's, as text.
    """
    ours = summary(table(records))
    theirs = {place: found for place in ours if (found := in_paper(place, records[0]))}
    names = place_labels(ours) | place_labels(theirs.values())
    paper = paper_summary(EXPERIMENTS[records[0].cell.experiment].table)
    columns = {}
    for place, here in ours.items():
        columns[f"{names[place]} (ours)"] = here
        if place in theirs:
            columns[f"{names[theirs[place]]} (paper)"] = paper.get(theirs[place], {})
    methods = in_order(chain(*columns.values()))
    cells = {title: [mean_std(rows, m) for m in methods] for title, rows in columns.items()}
    return captioned(
        pd.DataFrame(cells, index=[method.label for method in methods]),
        "Top-1 accuracy on the full test set in percent, mean ± standard deviation over the seeds "
        f"({whose(records, paper=bool(theirs))}).",
    )


def in_paper(place: Place, record: Record) -> Place | None:
    """The column of the paper that a place is shown beside; ``None`` if there is none, or the profile has changed.

    Args:
        place: of a record's rows.
        record: of the same experiment and profile.
    """
    cell = record.cell
    try:
        beside = setting_of(cell.profile, cell.experiment, place.setting).beside
    except ValueError:
        return None
    if beside is None:
        return None
    dataset, model = beside
    return replace(place, dataset=dataset, model=model, setting="")


def mean_std(rows: Mapping[Combination, tuple[float, float]], method: Combination) -> str:
    """A method's mean ± standard deviation as text.

    Args:
        rows: of one place.
        method: :data:`~npmerge.report.words.NOTHING` stands for one that is not there.
    """
    return plus_minus(*rows[method]) if method in rows else NOTHING


def verdict_table(
    verdicts: Sequence[Verdict], column: Literal["status", "evidence"] = "status"
) -> pd.DataFrame:
    """The verdicts as a table: a row a claim, a column a setting, or the other way round for many settings.

    Args:
        verdicts: from :func:`npmerge.report.claims.verdicts`.
        column: what to show of each: its status, or the comparison that decides and its margin, in percentage points of
            top-1 accuracy.
    """
    rows: dict[str, dict[str, str]] = {}
    for v in verdicts:
        claim = f"{v.claim.text} ({v.claim.section})"
        rows.setdefault(claim, {})[v.place] = getattr(v, column)
    result = pd.DataFrame.from_dict(rows, orient="index")
    if column == "status":
        caption = "The verdict on each claim in each setting."
    else:
        caption = (
            "The evidence: the comparison that decides, with its mean margin in percentage points of top-1 accuracy "
            "and, from two seeds on, its 95% interval."
        )
    return captioned(
        result if result.shape[1] <= FEW_PLACES else result.T, caption, folded=column == "evidence"
    )


def choices(records: Sequence[Record]) -> pd.DataFrame:
    """What was chosen on held-out training images; a choice at an edge of its grid is marked.

    Args:
        records: of any experiments.

    Returns:
        A row a setting and seed, a column an option of a method. A mark means that a value beyond the grid might have
        done better.
    """
    rows: dict[str, dict[str, str]] = {}
    for record in records:
        place = place_of(record)
        words = (
            place.setting,
            f"{place.models} models" * (place.models != 2),
            size_label(place.examples, "all images"),
            f"seed {record.cell.seed}",
        )
        for option, choice in record.details.get("chosen", {}).items():
            found = rows.setdefault(", ".join(filter(None, words)), {})
            found[f"{method_of(record).label}: {option}"] = _choice(choice)
    if not rows:
        return captioned(pd.DataFrame(), "Nothing was chosen: every option was given.")
    return captioned(
        pd.DataFrame.from_dict(rows, orient="index").fillna(NOTHING),
        "What was chosen on held-out training data. At an edge of the grid, which is marked, a value beyond it might "
        "have done better: the method's number is then a lower bound.",
        folded=True,
    )


def sources(records: Sequence[Record], stale: Collection[Record] = ()) -> pd.DataFrame:
    """Where the numbers come from, a row a setting and seed.

    Args:
        records: of any experiments.
        stale: those that were made under another configuration than today's; they get a mark.
    """
    found: dict[str, list[Record]] = {}
    for record in records:
        cell = record.cell
        name = f"{cell.profile}/{cell.experiment}/{cell.setting}, seed {cell.seed}"
        found.setdefault(name, []).append(record)
    rows = {
        name + f" {STALE}" * any(one in stale for one in group): _source(group)
        for name, group in found.items()
    }
    return captioned(
        pd.DataFrame.from_dict(rows, orient="index").rename_axis("record"),
        "The records behind this page: how many, and what made them.",
        folded=True,
    )


def _source(records: Sequence[Record]) -> dict[str, str]:
    origins = [record.provenance for record in records]
    peaks = [one.peak_memory_mib for one in origins if one.peak_memory_mib]
    return {
        "numbers": str(len(records)),
        "revision": _each(short_revision(one.revision) for one in origins),
        "device": _each(map(device_text, origins)),
        "torch": _each(one.versions["torch"] for one in origins),
        "seconds": f"{sum(one.seconds for one in origins):.0f}",
        "peak memory": f"{max(peaks)} MiB" if peaks else NOTHING,
    }


def _each(words: Iterable[str]) -> str:
    return ", ".join(dict.fromkeys(words))


def _choice(found: dict[str, Any]) -> str:
    chosen = found["chosen"]
    if not isinstance(chosen, (int, float)):
        return str(chosen)
    tried = sorted(map(float, found["trials"]))
    edge = {tried[0]: " (lowest tried)", tried[-1]: " (highest tried)"}
    return f"{chosen:g}{edge.get(chosen, '')}"
