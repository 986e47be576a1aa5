"""The table of what came of the torture."""

from __future__ import annotations

import csv
import sys
from collections import Counter
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import torch

from npmerge.report.robustness import COLUMNS, RIGHT, read_robustness
from npmerge.store.files import write_atomically
from npmerge.store.origins import device_label, revision
from torture.common import Case


def told(name: str, cases: Sequence[Case], seconds: float) -> int:
    """Print what came of a part, and return how many outcomes are wrong."""
    wrong = 0
    print(f"== {name}: {sum(case.count for case in cases)} cases in {seconds:.0f} s")
    for (kind, outcome), count in _counts(cases).items():
        bad = outcome not in RIGHT
        wrong += count * bad
        print(f"{'!!' if bad else '  '} {count:5}  {kind}: {outcome}")
    for case in cases:
        if case.note:
            print(f"   {case.kind}: {case.outcome}: {case.note}")
    sys.stdout.flush()
    return wrong


def write(path: Path, part: str, cases: Sequence[Case], seconds: float) -> None:
    """Put a part's rows into a table, in the place of those that it has."""
    old = read_robustness(path)
    rows = [row for row in old.astype(str).to_dict("records") if row["part"] != part]
    notes: dict[tuple[str, str], str] = {}
    for case in cases:
        if case.note:
            notes.setdefault((case.kind, case.outcome), case.note)
    about = {
        "seconds": f"{seconds:.0f}",
        "revision": revision(),
        "versions": f"python {sys.version_info.major}.{sys.version_info.minor}, torch {version('torch')}",
        "device": device_label(torch.device("cpu")),
        "date": datetime.now(UTC).date().isoformat(),
    }
    for (kind, outcome), count in _counts(cases).items():
        note = " ".join(notes.get((kind, outcome), "").split())[:200]
        rows.append(
            {"part": part, "kind": kind, "outcome": outcome, "count": str(count), "note": note}
            | about
        )

    def to(file: Path) -> None:
        with file.open("w", newline="", encoding="utf-8") as opened:
            writer = csv.DictWriter(opened, COLUMNS, lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)

    write_atomically(path, to)


def _counts(cases: Sequence[Case]) -> Counter[tuple[str, str]]:
    found: Counter[tuple[str, str]] = Counter()
    for case in cases:
        found[case.kind, case.outcome] += case.count
    return found
