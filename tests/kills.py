"""Workers that are killed at random moments."""

from __future__ import annotations

import os
import random
import signal
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from processes import children


def spawned(pid: int) -> list[int]:
    """The processes that a process has begun with Python's multiprocessing, such as Dask's workers."""
    found = []
    for child in children(pid):
        with suppress(OSError):
            if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes():
                found.append(child)
    return found


class Killer(threading.Thread):
    """Kills one of some processes again and again, so many times, while somebody works: ``with Killer(...) as killer``.

    Args:
        victims: finds the processes.
        kills: how many to kill.
        busy: whether it is worth while now.
        between: the least and the most seconds between two kills.
        seed: of the moments and the choice.
    """

    def __init__(
        self,
        victims: Callable[[], Sequence[int]],
        kills: int,
        *,
        busy: Callable[[], bool] = lambda: True,
        between: tuple[float, float] = (0, 0.5),
        seed: int = 0,
    ) -> None:
        super().__init__(daemon=True)
        self.killed: list[int] = []
        self._victims, self._kills, self._busy, self._between = victims, kills, busy, between
        self._random, self._over = random.Random(seed), threading.Event()

    def run(self) -> None:
        while len(self.killed) < self._kills:
            if self._over.wait(self._random.uniform(*self._between)):
                return
            found = [pid for pid in self._victims() if pid not in self.killed]
            if found and self._busy():
                pid = self._random.choice(found)
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
                    self.killed.append(pid)

    def __enter__(self) -> Killer:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self.join()
