"""The report card on the first page, the page of claims and the page of numbers, as Markdown."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby

import pandas as pd

from npmerge.experiments import EXPERIMENTS, load_profile, load_profiles
from npmerge.methods import Combination
from npmerge.parameters import PUBLISHED
from npmerge.report.ledger import ICONS, POINTS, Entry, Outcome, Row, hold_claims
from npmerge.report.numbers import (
    Place,
    combination,
    method_of,
    paper_numbers,
    place_of,
    place_of_row,
)
from npmerge.report.pages import everything, today
from npmerge.report.tables import in_paper
from npmerge.report.words import NOTHING, listed, plus_minus, seed_count, signed
from npmerge.store.records import Record

CHAPTERS = {
    "same_data": "/notebooks/01_same_data",
    "disjoint_splits": "/notebooks/02_disjoint_splits",
    "imagenet": "/notebooks/02_disjoint_splits",
    "data_size": "/notebooks/03_data_size",
    "many_models": "/notebooks/04_many_models",
}
"""The chapter of each experiment that the paper makes claims by."""


def first_page(rows: Sequence[Row]) -> str:
    """The report card: what held, what did not and what nobody knows yet, a line a claim.

    Args:
        rows: from :func:`npmerge.report.ledger.hold_claims`.
    """
    lines = [_summary(rows), ""]
    for experiment, group in groupby(rows, key=lambda row: row.entry.experiment):
        chapter = f"{{doc}}`{EXPERIMENTS[experiment].title} <{CHAPTERS[experiment]}>`"
        lines += [f"**{chapter}**", "", "{.report-card}", *map(_line, group), ""]
    return "\n".join(lines)


def what_held(*experiments: str, folder: str = PUBLISHED) -> str:
    """The lines of the report card that a chapter is about, from the records that come with the project.

    Args:
        experiments: their names.
        folder: of the records.
    """
    records = {
        profile.name: today(everything(folder, profile.name))
        for profile in load_profiles(demonstration=False)
    }
    rows = [row for row in hold_claims(records) if row.entry.experiment in experiments]
    run = [row for row in rows if row.best[1].outcome != "not run"]
    lines = ["\n".join(map(_line, run))] if run else []
    if others := len(rows) - len(run):
        are = "claim has" if others == 1 else "claims have"
        lines.append(
            f"{others} {'further ' * bool(run)}{are} not been put to the test at a larger scale yet."
        )
    return "\n\n".join(lines)


def _summary(rows: Sequence[Row]) -> str:
    """How many claims there are of each kind, and at which scale."""
    largest = load_profiles(demonstration=False)[0].name
    bests = [row.best for row in rows]
    counts = Counter(finding.outcome for _, finding in bests)
    there = sum(row.ours[largest].outcome != "not run" for row in rows if largest in row.ours)
    scale = (
        f"{there} of the paper's claims have been put to the test at the paper's own scale."
        if there
        else "**None of the paper's numbers has been reproduced at the paper's own scale yet.**"
    )
    words: dict[Outcome, str] = {
        "reproduced": "held",
        "not reproduced": "did not hold",
        "inconclusive": "could not be decided",
        "not judged": "cannot be judged yet, since there are fewer than three seeds or nothing but the demonstration",
        "not run": "were not put to the test",
    }
    told = [f"{counts[key]} {text}" for key, text in words.items() if counts[key]]
    printed = [row.paper.status for row in rows if row.paper.evidence]
    refuted = printed.count("not borne out")
    return (
        f"{scale} Of {len(rows)} empirical claims, each at the largest scale that says something, {listed(told)}. "
        f"The paper's own tables have numbers for {len(printed)} of the claims and do not bear out {refuted} of these "
        "as they are worded. {doc}`claims` has the evidence for each line, {doc}`numbers` every number."
    )


def _line(row: Row) -> str:
    profile, finding = row.best
    where = f" ({_scale(profile)})" * (finding.outcome != "not run")
    own = f"; *{row.paper.status} by the paper's tables*" * (row.paper.status == "not borne out")
    unit = f" {row.entry.unit}" * ("by" in finding.status and row.entry.unit != POINTS)
    return f"- {ICONS[finding.outcome]} **{finding.status}{unit}**{where}: {row.entry.text}{own}"


def _scale(profile: str) -> str:
    return f"profile `{profile}`"


def claims_page(rows: Sequence[Row]) -> str:
    """Every claim with its section, what the paper's tables say, and what each profile does.

    Args:
        rows: from :func:`npmerge.report.ledger.hold_claims`.
    """
    lines = []
    for experiment, group in groupby(rows, key=lambda row: row.entry.experiment):
        chapter = f"{{doc}}`{EXPERIMENTS[experiment].title} <{CHAPTERS[experiment]}>`"
        lines += [f"## {EXPERIMENTS[experiment].title}", "", f"The chapter: {chapter}.", ""]
        for row in group:
            entry = row.entry
            lines += [
                f"**{entry.text[:1].upper()}{entry.text[1:]}.** {_source(entry)}",
                "",
                f"- The paper's own numbers: {_told(row.paper.status, row.paper.evidence)}",
                *_profiles(row),
                "",
            ]
    return "\n".join(lines)


def _profiles(row: Row) -> Iterator[str]:
    for profile, finding in row.ours.items():
        if finding.outcome != "not run":
            told = _told(finding.status, finding.evidence)
            yield f"- {ICONS[finding.outcome]} {_scale(profile)}: {told}"
    idle = [f"`{name}`" for name, finding in row.ours.items() if finding.outcome == "not run"]
    if idle:
        yield f"- {ICONS['not run']} **not run** at {listed(idle)}"


def _source(entry: Entry) -> str:
    return f"Section {entry.section}, {entry.table}; effects in {entry.unit}."


def disagreements(rows: Sequence[Row]) -> str:
    """Where the paper's own tables do not bear out what it says, a line a claim.

    Args:
        rows: from :func:`npmerge.report.ledger.hold_claims`.
    """
    return "\n".join(
        f"- {row.entry.text} (Section {row.entry.section}, {row.entry.table}): {row.paper.evidence}"
        for row in rows
        if row.paper.status == "not borne out"
    )


def _told(status: str, evidence: str) -> str:
    return f"**{status}**" + f" ({evidence})" * bool(evidence)


def every_number(records: Mapping[str, Sequence[Record]]) -> pd.DataFrame:
    """The paper's 90 numbers, ours beside them.

    Args:
        records: by profile.

    Returns:
        A row a number: where it stands in the paper, its ``paper`` mean and ``std``; and for each profile with records
        of it our mean, ``std``, ``seeds``, ``difference`` to the paper's, and the ``records``.
    """
    ours = {profile: own for profile, some in records.items() if (own := _beside(some))}
    rows = []
    for row in paper_numbers().to_dict("records"):
        place, method = place_of_row(row), combination(row)
        cells = {
            "table": row["table"], "dataset": place.dataset, "model": place.model,
            "split": place.split or "", "images a class": place.examples or "",
            "method": method.label, "metric": row["metric"], "paper": row["mean"], "paper std": row["std"],
        }  # fmt: skip
        for profile, known in ours.items():
            found = known.get((row["table"], place, method, row["metric"]), [])
            values = pd.Series([value for value, _ in found], dtype=float)
            cells |= {
                profile: round(values.mean(), 2),
                f"{profile} std": round(values.std(), 2),
                f"{profile} seeds": len(values),
                f"{profile} difference": round(values.mean() - row["mean"], 2),
                f"{profile} records": " ".join(name for _, name in found),
            }
        rows.append(cells)
    return pd.DataFrame(rows)


def _beside(
    records: Sequence[Record],
) -> dict[tuple[str, Place, Combination, str], list[tuple[float, str]]]:
    """Values, and the records that have them, by the number of the paper that they stand beside."""
    found: dict[tuple[str, Place, Combination, str], list[tuple[float, str]]] = {}
    for record in records:
        cell = record.cell
        place = in_paper(place_of(record), record)
        if place is None:
            continue
        name = f"{cell.profile}/{cell.experiment}/{cell.setting}/seed{cell.seed}/{cell.name}.json"
        for row in record.rows:
            key = (EXPERIMENTS[cell.experiment].table, place, method_of(record), row.metric)
            found.setdefault(key, []).append((row.value, name))
    return found


def numbers_page(numbers: pd.DataFrame) -> str:
    """Every number as a table to read: the paper's, and ours with the difference, for each profile that has some.

    Args:
        numbers: from :func:`every_number`.
    """
    profiles = [name.removesuffix(" seeds") for name in numbers.columns if name.endswith(" seeds")]
    told = [p for p in profiles if numbers[f"{p} seeds"].any()]
    lines = [
        "Ours are of these profiles:",
        "",
        *(f"- `{p}`: {load_profile(p).title}" for p in told),
        "",
    ]
    where = ["table", "dataset", "model", "split", "images a class", "metric"]
    for key, rows in numbers.groupby(where, sort=False):
        name, dataset, model, split, images, metric = map(str, key)
        known = [p for p in told if rows[f"{p} seeds"].any()]
        titles = ["Method", "Paper", *(f"`{p}`" for p in known)]
        size = f"{images} images" + " a class" * (images != "all") if images else ""
        words = (model, dataset, split.capitalize(), size, metric.replace("top", "top-"))
        lines += [f"## Table {name}: {', '.join(filter(None, words))}", ""]
        lines += [f"| {' | '.join(titles)} |", "|---" + "|--:" * (len(titles) - 1) + "|"]
        for row in rows.to_dict("records"):
            cells = [row["method"], plus_minus(row["paper"], row["paper std"])]
            for profile in known:
                seeds = row[f"{profile} seeds"]
                value = plus_minus(row[profile], row[f"{profile} std"])
                gap = signed(row[f"{profile} difference"]) if seeds else ""
                cells.append(f"{value} ({gap}; {seed_count(seeds)})" if seeds else NOTHING)
            lines.append(
                f"| {' | '.join(cells)} |".replace(
                    " \N{PLUS-MINUS SIGN} ",
                    "\N{NO-BREAK SPACE}\N{PLUS-MINUS SIGN}\N{NO-BREAK SPACE}",
                )
            )
        lines.append("")
    return "\n".join(lines)
