"""Fuzzers: bytes for the readers of files, words for the command line."""

from __future__ import annotations

import json
import logging
import random
import re
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

from torture.common import Case, environment
from torture.readers import READERS, atheris, seeds, tried

HERE = Path(__file__).parent
WITHSTOOD = "withstood"
LIMITS = [
    "-rss_limit_mb=6000",
    "-timeout=60",
    "-max_len=20000",
    "-print_final_stats=1",
    "-verbosity=0",
]
"""Of memory, of the seconds that an input may take, and of its bytes."""


def readers(folder: Path, *, seconds: float, seed: int = 0) -> Iterator[Case]:
    """Fuzz the readers of files.

    Args:
        folder: where to work.
        seconds: for all of them; with 0 the seeds and a few changes of each are read, in this process.
        seed: of the changes.
    """
    for name in READERS:
        kind, place = f"reader of {name}", folder / name.replace(" ", "_")
        (place / "work").mkdir(parents=True)
        if not seconds:
            yield from _replayed(kind, name, place, random.Random(seed))
        elif atheris is None:
            yield Case("fuzz", kind, "left out", "atheris is not installed")
        else:
            yield _fuzzed(kind, name, place, seconds / len(READERS), seed)


def _replayed(kind: str, name: str, place: Path, draw: random.Random) -> Iterator[Case]:
    logging.disable()
    try:
        for key, data in seeds(name, place).items():
            for number in range(6):
                given = bytearray(data)
                for _ in range(min(number, len(given))):
                    given[draw.randrange(len(given))] = draw.randrange(256)
                try:
                    with warnings.catch_warnings(action="ignore"):
                        tried(name, bytes(given), place / "work")
                except Exception as error:  # noqa: BLE001 - whatever it should not have raised
                    yield Case("fuzz", kind, "traceback", f"{key}: {type(error).__name__}: {error}")
                else:
                    yield Case("fuzz", kind, WITHSTOOD)
    finally:
        logging.disable(logging.NOTSET)


def _fuzzed(kind: str, name: str, place: Path, seconds: float, seed: int) -> Case:
    done = subprocess.run(
        [sys.executable, str(HERE / "readers.py"), name, str(place), f"-max_total_time={seconds:.0f}",
         f"-seed={seed + 1}", f"-artifact_prefix={place}/", *LIMITS],
        capture_output=True, text=True, errors="replace", env=environment(), check=False, cwd=place,
    )  # fmt: skip
    said = done.stdout + done.stderr
    units = re.search(r"number_of_executed_units:\s*(\d+)", said)
    count = int(units[1]) if units else 1
    if not done.returncode:
        return Case("fuzz", kind, WITHSTOOD, count=count)
    (place / "said").write_text(said)
    found = re.search(
        r"(?m)^(\w[\w.]*(?:Error|Exception|Bomb\w*)\b.*|.*(?:out-of-memory|timeout).*)$", said
    )
    return Case("fuzz", kind, "traceback", found[0] if found else said[-300:])


def command_line(folder: Path, *, seconds: float, seed: int = 0) -> Iterator[Case]:
    """Fuzz the command line.

    Args:
        folder: where to work.
        seconds: to take; with 0 some hundred commands.
        seed: of the words.
    """
    done = subprocess.run(
        [sys.executable, str(HERE / "fuzz_command.py"), str(folder), f"{seconds:g}", str(seed)],
        capture_output=True, text=True, errors="replace", env=environment(), check=False, cwd=folder,
    )  # fmt: skip
    if done.returncode:
        yield Case(
            "fuzz", "command line", "crash", f"status {done.returncode}: {done.stderr[-300:]}"
        )
        return
    found = json.loads(done.stdout.splitlines()[-1])
    for name, count in found["tried"].items():
        yield Case("fuzz", f"command {name}", WITHSTOOD, count=count)
    for name, outcome, note in found["wrong"]:
        yield Case("fuzz", f"command {name}", outcome, note)
