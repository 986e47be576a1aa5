"""The record of ``make torture``: what was done to npmerge, and what came of it."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from npmerge.report.words import NOTHING, duration, short_revision

COLUMNS = (
    "part", "kind", "outcome", "count", "note", "seconds", "revision", "versions", "device", "date",
)  # fmt: skip
"""What the record has for each outcome of each kind of case."""
PARTS = ("kills", "flips", "places", "fuzz")
"""What is done."""
RIGHT = (
    "resumed to the same records", "remade", "refused", "harmless", "no checksum to tell by", "works", "one line",
    "withstood", "left out",
)  # fmt: skip
"""Outcomes that are as they should be; any other is a defect."""


def read_robustness(path: Path | str) -> pd.DataFrame:
    """The record, a row an outcome of a kind of case.

    Args:
        path: of the record; without a file it has no rows.

    Raises:
        ValueError: The file is no such record.
    """
    if not Path(path).exists():
        return pd.DataFrame(columns=list(COLUMNS))
    rows = pd.read_csv(path, dtype=str, keep_default_na=False)
    if tuple(rows.columns) != COLUMNS or not rows["count"].str.fullmatch(r"\d+").all():
        raise ValueError(f"{path} is no record of the torture: run make torture again")
    return rows.assign(count=pd.to_numeric(rows["count"]))


def robustness_parts(path: Path | str) -> dict[str, str]:
    """What the page on robustness shows, as Markdown: a table for each of :data:`PARTS`, and ``"findings"``.

    Args:
        path: of the record; without one each says that there is none.

    Raises:
        ValueError: The file is no such record.
    """
    rows = read_robustness(path)
    none = "There is no record of this yet."
    found = {part: rows[rows["part"] == part] for part in PARTS}
    told = {part: none if mine.empty else _table(mine) for part, mine in found.items()}
    return told | {"findings": none if rows.empty else f"{_verdict(rows)}\n\n{_source(rows)}"}


def _table(rows: pd.DataFrame) -> str:
    """A row a kind of case, a column an outcome."""
    outcomes = sorted(set(rows["outcome"]), key=lambda one: (one not in RIGHT, one))
    lines = [f"| | {' | '.join(outcomes)} |", "|---" + "|--:" * len(outcomes) + "|"]
    for kind, mine in rows.groupby("kind", sort=False):
        counts = mine.groupby("outcome")["count"].sum()
        cells = (f"{counts[one]:,}" if one in counts else NOTHING for one in outcomes)
        lines.append(f"| {kind} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _verdict(rows: pd.DataFrame) -> str:
    """The defects that the record shows, or that there are none."""
    wrong = rows[~rows["outcome"].isin(RIGHT)]
    if wrong.empty:
        return f"None of the {rows['count'].sum():,} cases ended otherwise than it should."
    lines = [
        f"- {one.kind}: {one.count:,} times {one.outcome} (`{str(one.note).replace('`', '')}`)"
        for one in wrong.itertuples()
    ]
    return "\n".join(["These ended otherwise than they should:", "", *lines])


def _source(rows: pd.DataFrame) -> str:
    """Where the numbers come from, a row a part."""
    lines = ["| | cases | took | with | on | revision | date |", "|---|--:|--:|---|---|---|---|"]
    for part, mine in rows.groupby("part", sort=False):
        one = mine.iloc[0]
        about = (one["versions"], one["device"], short_revision(one["revision"]), one["date"])
        seconds = duration(float(one["seconds"]))
        lines.append(f"| {part} | {mine['count'].sum():,} | {seconds} | {' | '.join(about)} |")
    return "\n".join(lines)
