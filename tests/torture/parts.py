"""The parts, each in small for the tests and in full."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from torture.common import Case
from torture.flips import flips
from torture.fuzzing import command_line, readers
from torture.kills import kills
from torture.places import places

Part = Callable[[Path, float, int], Iterator[Case]]
"""Of a folder to work in, the seconds that fuzzers may take (0 for all in small), and a seed."""


def _kills(folder: Path, seconds: float, seed: int) -> Iterator[Case]:
    counts = (
        {"runs": 80, "workers": 12, "books": 8}
        if seconds
        else {"runs": 2, "workers": 0, "books": 0}
    )
    return kills(folder, **counts, seed=seed)


def _fuzz(folder: Path, seconds: float, seed: int) -> Iterator[Case]:
    yield from readers(folder / "readers", seconds=seconds / 2, seed=seed)
    (folder / "command").mkdir()
    yield from command_line(folder / "command", seconds=seconds / 2, seed=seed)


PARTS: dict[str, Part] = {
    "kills": _kills,
    "flips": lambda folder, seconds, seed: flips(folder, scale=1 if seconds else 0.05, seed=seed),
    "places": lambda folder, seconds, _: places(folder, small=not seconds),
    "fuzz": _fuzz,
}
