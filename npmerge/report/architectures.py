"""The record of ``benchmarks/architectures.py``: which architectures' symmetry is read off right."""

from __future__ import annotations

import math
from pathlib import Path

import pandas as pd

from npmerge.report.words import NOTHING, short_revision

COLUMNS = (
    "source", "family", "name", "note", "parameters", "status", "reason", "groups", "moved", "difference", "seconds",
    "revision", "versions", "rebasin", "rebasin_moved",
)  # fmt: skip
"""What the record has for each architecture."""
NUMBERS = "parameters", "groups", "moved", "difference", "seconds", "rebasin_moved"
STATUSES = "right", "refused", "wrong", "error"
"""What can come of one: the outputs stayed; npmerge said that it cannot; they changed; it could not be run."""
THEIRS = "right", "nothing moved", "wrong", "fails"
"""The same of the package ``rebasin``."""


def read_architectures(path: Path | str) -> pd.DataFrame:
    """The record, a row an architecture, in the order of the catalogue.

    Args:
        path: of the record; without a file it has no rows.

    Raises:
        ValueError: The file is no such record.
    """
    if not Path(path).exists():
        return pd.DataFrame(columns=list(COLUMNS))
    rows = pd.read_csv(path, dtype=str, keep_default_na=False)
    if tuple(rows.columns) != COLUMNS or not set(rows["status"]) <= set(STATUSES):
        raise ValueError(f"{path} is no record of architectures.py: run it again with --record")
    return rows.assign(**{name: pd.to_numeric(rows[name]) for name in NUMBERS})


def architecture_summary(rows: pd.DataFrame) -> pd.DataFrame:
    """How many architectures of each library came out right, and over those: parameters moved, difference, time.

    Args:
        rows: from :func:`read_architectures`.
    """
    table = {}
    for source, every in rows.groupby("source", sort=False):
        right = every[every["status"] == "right"]
        table[source] = {
            "architectures": str(len(every)),
            "families": str(every["family"].nunique()),
            **{status: str(int((every["status"] == status).sum())) for status in STATUSES},
            "% right": f"{100 * len(right) / len(every):.1f}",
            "% of parameters moved: median (least)": _beside(100 * right["moved"], "min", "{:.2f}"),
            "largest difference": f"{right['difference'].max():.0e}",
            "seconds: median (most)": _beside(right["seconds"], "max", "{:.2f}"),
        }
    return pd.DataFrame.from_dict(table, orient="index").rename_axis("library")


def rebasin_summary(rows: pd.DataFrame) -> pd.DataFrame:
    """The same architectures with the package ``rebasin``, those on which it was tried.

    Args:
        rows: from :func:`read_architectures`.
    """
    table = {}
    for source, every in rows[rows["rebasin"] != ""].groupby("source", sort=False):
        kinds = every["rebasin"].where(every["rebasin"].isin(THEIRS[:-1]), THEIRS[-1])
        right = every[kinds == "right"]
        table[source] = {
            "architectures": str(len(every)),
            **{kind: str(int((kinds == kind).sum())) for kind in THEIRS},
            "% of parameters moved: median (least)": _beside(
                100 * right["rebasin_moved"], "min", "{:.2f}"
            ),
            "npmerge right": str(int((every["status"] == "right").sum())),
        }
    return pd.DataFrame.from_dict(table, orient="index").rename_axis("library")


def _beside(values: pd.Series[float], extreme: str, form: str) -> str:
    if values.empty:
        return NOTHING
    return f"{form.format(values.median())} ({form.format(values.agg(extreme))})"


def architecture_table(rows: pd.DataFrame, source: str) -> pd.DataFrame:
    """Every architecture of a library, as text.

    Args:
        rows: from :func:`read_architectures`.
        source: the library.
    """
    found = rows[rows["source"] == source]
    return pd.DataFrame(
        {
            "family": found["family"],
            "architecture": found["name"],
            "as built": [
                _built(n, note) for n, note in zip(found["parameters"], found["note"], strict=True)
            ],
            "outcome": found["status"],
            "groups": _texts(found["groups"], "{:.0f}"),
            "% moved": _texts(100 * found["moved"], "{:.2f}"),
            "difference": _texts(found["difference"], "{:.0e}"),
            "seconds": _texts(found["seconds"], "{:.2f}"),
            "rebasin": found["rebasin"].replace("", NOTHING),
        }
    ).set_index("family")


def _built(parameters: float, note: str) -> str:
    return ", ".join(filter(None, [_count(parameters), note]))


def _count(parameters: float) -> str:
    if math.isnan(parameters):
        return ""
    return f"{parameters / 1e6:.1f} M" if parameters >= 1e5 else f"{parameters / 1e3:.0f} k"


def _texts(values: pd.Series[float], form: str) -> list[str]:
    return [NOTHING if pd.isna(value) else form.format(value) for value in values]


def not_right(rows: pd.DataFrame) -> pd.DataFrame:
    """The architectures that did not come out right, and why.

    Args:
        rows: from :func:`read_architectures`.
    """
    found = rows[rows["status"] != "right"]
    return found[["source", "name", "status", "reason"]].set_index("name")


def least_moved(rows: pd.DataFrame, below: float = 0.9) -> pd.DataFrame:
    """Architectures that are right, but of whose parameters less than a share moves; the least first.

    Args:
        rows: from :func:`read_architectures`.
        below: the share.
    """
    found = rows[(rows["status"] == "right") & (rows["moved"] < below)].sort_values("moved")
    table = {
        "library": found["source"],
        "architecture": found["name"],
        "% moved": _texts(100 * found["moved"], "{:.1f}"),
    }
    return pd.DataFrame(table).set_index("architecture")


def architecture_sources(rows: pd.DataFrame) -> pd.DataFrame:
    """Where the numbers come from: which revision and versions each row was made with.

    Args:
        rows: from :func:`read_architectures`.
    """
    counts = rows.value_counts(["source", "versions", "revision"], sort=False).reset_index()
    table = {
        "library": counts["source"],
        "versions": counts["versions"],
        "revision": [short_revision(revision) for revision in counts["revision"]],
        "architectures": counts["count"].astype(str),
    }
    return pd.DataFrame(table).set_index("library")
