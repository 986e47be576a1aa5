"""The record of ``tests/torture/cluster_kills.py``: cells on a Dask cluster, with workers killed and without."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from npmerge.catalogue import ALL
from npmerge.report.words import short_revision

COLUMNS = (
    "run", "workers", "kills", "cells", "failed", "compared", "equal", "left_over", "seconds", "experiments", "profile",
    "seeds", "revision", "device", "date",
)  # fmt: skip
"""What the record has for each run."""
SAME = "compared", "experiments", "profile", "seeds", "revision", "device"
"""What all runs of a record have in common, or they could not be held against one another."""


def cluster_findings(path: Path | str) -> str:
    """What the record says, as a table and a sentence on where it comes from.

    Args:
        path: of the record; it need not exist.

    Raises:
        ValueError: The file is no such record.
    """
    if not Path(path).exists():
        return "There is no record of `tests/torture/cluster_kills.py` yet."
    rows = pd.read_csv(path, dtype=str, keep_default_na=False)
    if tuple(rows.columns) != COLUMNS or rows.empty:
        raise ValueError(f"{path} is no record of cluster_kills.py: run it again with --output")
    if len(rows[list(SAME)].drop_duplicates()) > 1:
        raise ValueError(
            f"{path} has rows of several calls: run cluster_kills.py again with --output"
        )
    lines = [
        "| Cells in | workers | kills | given up at first | records equal to the first run's | files left over |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    lines += [
        f"| {one.run} | {one.workers} | {one.kills} | {one.failed} | {one.equal} of {one.compared} | "
        f"{one.left_over} |"
        for one in rows.itertuples()
    ]
    first = rows.iloc[0]
    named, seeds = (first[name].replace(" ", ", ") for name in ("experiments", "seeds"))
    source = (
        f"{'All experiments' if named == ALL else f'Experiments {named}'} at `{first['profile']}`, "
        f"seed{'s' * (',' in seeds)} {seeds}; {first['device']}, revision {short_revision(first['revision'])}, "
        f"{first['date']}. Records that measure time are left out."
    )
    return "\n".join([*lines, "", source])
