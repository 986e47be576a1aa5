"""What the parts share: what came of a case, a small run to torture, and the processes that a command has begun."""

from __future__ import annotations

import json
import logging
import os
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from tiny import tiny_profile

from npmerge.experiments import cells
from npmerge.store.records import Cell, Records

COMMAND = Path(__file__).with_name("command.py")
PERMUTE = "*/permute-*"
"""Four cells of the tiny profile: a mean, NP Merge, fine-tuning and fine-tuning with a choice."""
MARK = "NPMERGE_TORTURE"
"""A variable of the environment that all processes of a command inherit."""


@dataclass(frozen=True)
class Case:
    """What came of one case.

    Attributes:
        part: which part of the torture.
        kind: what was done, or to what.
        outcome: what came of it.
        note: what there is to say, above all of an outcome that is not right.
        count: how often.
    """

    part: str
    kind: str
    outcome: str
    note: str = ""
    count: int = 1


@dataclass(frozen=True)
class Folders:
    """Records, base models and whatever else a command works with."""

    top: Path

    @property
    def results(self) -> Path:
        return self.top / "results"

    @property
    def zoo(self) -> Path:
        return self.top / "zoo"

    @property
    def records(self) -> Records:
        return Records(self.results)

    @property
    def journal(self) -> Path:
        return self.top / "journal"

    def words(self) -> list[str]:
        """The command line's options for these folders."""
        words = ["--results", str(self.results), "--zoo", str(self.zoo)]
        return [*words, "--models", str(self.top / "models")]

    def run_words(self, pattern: str, workers: int = 1) -> list[str]:
        """The command that runs some cells."""
        words = ["run", "same_data", "--profile", "tiny", "--seeds", "0", "--device", "cpu"]
        return [*words, "--cells", pattern, "--workers", str(workers), *self.words()]

    def files(self) -> set[Path]:
        """All files of records and models but for the locks, below the top."""
        found = (p for top in (self.results, self.zoo) for p in top.rglob("*") if p.is_file())
        return {path.relative_to(self.top) for path in found if path.parent.name != ".locks"}

    def content(self, path: Path) -> Any:
        """A record but for what differs between runs: seconds, and where it comes from."""
        content = json.loads((self.top / path).read_text())
        return {k: v for k, v in content.items() if k not in ("provenance", "digest", "seconds")}

    def done(self, todo: list[Cell]) -> dict[Path, bytes]:
        """The records that are whole, and their bytes."""
        paths = (self.records.path(cell) for cell in todo if self.records.done(cell))
        return {path.relative_to(self.top): path.read_bytes() for path in paths}


@cache
def tiny_cells(pattern: str = "*") -> list[Cell]:
    """Cells of the tiny profile."""
    from npmerge.experiments.listing import matching

    with pytest.MonkeyPatch.context() as patch:
        tiny_profile(patch)
        return matching(cells("same_data", "tiny", [0]), pattern)


def environment(**more: str) -> dict[str, str]:
    """Of a command that is tortured."""
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"} | more


class Nursery:
    """Begins commands without waiting for what they import: each is the child of a process that has done so.

    One command at a time, each in a session of its own.

    Args:
        said: where the output of the command goes.
        more: variables of the environment.
    """

    def __init__(self, said: Path, **more: str) -> None:
        self.said = said
        self._mark = f"{os.getpid()}-{time.monotonic_ns()}"
        self._process = subprocess.Popen(
            [sys.executable, str(COMMAND), "--nursery", str(said)], stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, env=environment(**more, **{MARK: self._mark}), text=True,
        )  # fmt: skip
        self.pid = 0
        self.returncode: int | None = None

    def __enter__(self) -> Nursery:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate()
        self.gone(0)

    def begin(self, words: list[str]) -> None:
        """Begin a command."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(words) + "\n")
        self._process.stdin.flush()
        self.pid, self.returncode = int(self._process.stdout.readline()), None

    def ended(self, seconds: float) -> bool:
        """Whether the command ends by itself in time."""
        out = self._process.stdout
        assert out is not None
        if self.returncode is None and select.select([out], [], [], seconds)[0]:
            self.returncode = int(out.readline())
        return self.returncode is not None

    def signal(self, number: int) -> None:
        """Send the command a signal, and wait for its end."""
        with suppress(ProcessLookupError):
            os.kill(self.pid, number)
        assert self.ended(120), "it does not end"

    def left(self) -> list[int]:
        """The processes that the command has begun and that are alive."""
        found = []
        for path in Path("/proc").glob("[0-9]*/environ"):
            with suppress(OSError):
                if f"{MARK}={self._mark}".encode() in path.read_bytes().split(b"\0"):
                    found.append(int(path.parent.name))
        return [pid for pid in found if pid != self._process.pid]

    def gone(self, seconds: float = 30) -> list[int]:
        """The processes that are left when they have had time to end; they are ended then."""
        end = time.monotonic() + seconds
        while (left := self.left()) and time.monotonic() < end:
            time.sleep(0.02)
        for pid in left:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        return left


@contextmanager
def messages() -> Iterator[list[str]]:
    """What is logged, from warnings on."""
    said: list[str] = []

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            said.append(record.getMessage())

    logger, handler = logging.getLogger("npmerge"), Handler(logging.WARNING)
    logger.addHandler(handler)
    try:
        yield said
    finally:
        logger.removeHandler(handler)


@contextmanager
def scratch(folder: Path, name: str) -> Iterator[Path]:
    """An empty folder, which is gone afterwards."""
    place = folder / name
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    try:
        yield place
    finally:
        shutil.rmtree(place, ignore_errors=True)
