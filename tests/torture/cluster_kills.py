"""Run cells in this process, on a Dask cluster, and on one whose workers are killed."""

from __future__ import annotations

import argparse
import csv
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import torch

sys.path[0] = str(Path(__file__).resolve().parents[1])

from kills import Killer, spawned

from npmerge.report.machines import COLUMNS
from npmerge.run.engine import CellsFailedError, run_experiments
from npmerge.store.origins import device_label, revision


def records(folder: Path) -> dict[str, dict[str, Any]]:
    """Records but for what may differ between runs: seconds and where they come from."""
    found = {}
    for path in (folder / "results").rglob("*.json"):
        content = json.loads(path.read_text())
        for key in ("provenance", "digest", "seconds"):
            del content[key]
        measures = content["config"].get("measures", {})
        if measures.get("effort") or content["cell"]["experiment"] == "cost":
            continue  # they measure time
        found[str(path.relative_to(folder))] = content
    return found


def left_over(folder: Path) -> list[Path]:
    """Files that are neither records, models nor locks."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.parent.name != ".locks"]
    return [p for p in files if p.name.startswith(".") or p.suffix not in (".json", ".safetensors")]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("experiment", nargs="*", default=["same_data", "disjoint_splits"])
    parser.add_argument("--profile", default="digits")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--cells", metavar="PATTERN")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument(
        "--between", type=float, nargs=2, default=[1, 6], help="seconds between kills"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the kills")
    parser.add_argument("--output", type=Path, metavar="CSV")
    options = parser.parse_args()
    rows, wrong = [], 0
    with tempfile.TemporaryDirectory(prefix="cluster-") as name:
        for row, bad in runs(Path(name), options):
            print(row, flush=True)
            rows.append(row)
            wrong += bad
    if options.output:
        with options.output.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
    return min(wrong, 1)


def finished(
    experiment: list[str], how: dict[str, Any], killed: list[Any]
) -> tuple[int, list[Path]]:
    """Give a command again while kills make cells fail; returns how many failed, and the records."""
    failed = 0
    while True:
        before = len(killed)
        try:
            return failed, run_experiments(experiment, **how)
        except CellsFailedError as error:
            if len(killed) == before:
                raise
            print(error)
            failed += len(error.failed)


def _at_work(folder: Path) -> bool:
    """Whether a first task has begun: what is killed earlier ends the command, as it cannot start its cluster."""
    return any((folder / "zoo").rglob("*.safetensors.lock"))


def runs(top: Path, options: argparse.Namespace) -> Iterator[tuple[dict[str, Any], bool]]:
    on = {"cluster": f"local:{options.workers}"}
    expected: dict[str, Any] = {}
    for name, where, kills in (
        ("one process", {"workers": 1}, 0),
        ("a cluster on this machine", on, 0),
        ("the same, with workers killed", on, options.kills),
    ):
        folder, start = top / name.replace(" ", "-"), time.monotonic()
        killer = Killer(
            lambda: spawned(os.getpid()), kills, between=tuple(options.between), seed=options.seed,
            busy=partial(_at_work, folder),
        )  # fmt: skip
        how: dict[str, Any] = {
            "profile": options.profile, "seeds": options.seeds, "pattern": options.cells, "device": "cpu",
            "results": folder / "results", "zoo": folder / "zoo", **where,
        }  # fmt: skip
        with killer:
            failed, paths = finished(options.experiment, how, killer.killed)
        seconds, found = time.monotonic() - start, records(folder)
        expected = expected or found
        equal = sum(content == found.get(cell) for cell, content in expected.items())
        rest = left_over(folder)
        for path in rest:
            print("left over:", path)
        row = {
            "run": name, "workers": 1 if where is not on else options.workers,
            "kills": len(killer.killed), "cells": len(paths), "failed": failed, "compared": len(expected),
            "equal": equal, "left_over": len(rest), "seconds": f"{seconds:.0f}",
            "experiments": " ".join(options.experiment), "profile": options.profile,
            "seeds": " ".join(map(str, options.seeds)), "revision": revision(),
            "device": device_label(torch.device("cpu")), "date": datetime.now(UTC).date().isoformat(),
        }  # fmt: skip
        yield row, equal < len(expected) or bool(rest)


if __name__ == "__main__":
    sys.exit(main())
