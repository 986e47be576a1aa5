"""In which order cells run, which base models go before them, and what still fits into the time there is."""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from statistics import fmean

from npmerge.store.records import Cell, Record
from npmerge.store.zoo import BaseModel


class Durations:
    """How long cells and the training of base models took, and so how long the next ones will take.

    Args:
        records: of one profile.
        device: what they call the device that is used now; others say nothing about it.
    """

    def __init__(self, records: Iterable[Record], device: str) -> None:
        self._seen: defaultdict[tuple[str, ...], list[float]] = defaultdict(list)
        for record in records:
            origin, cell = record.provenance, record.cell
            if origin.device == device:
                self._note(("cell", cell.experiment, cell.setting, cell.name), origin.seconds)
                for made in origin.base_models.values():
                    if made.get("device") == device:
                        self._note(("base model", cell.experiment, cell.setting), made["seconds"])

    def of(self, cell: Cell) -> float | None:
        """Seconds of a cell: those of its kind, else of its setting, experiment, or any; ``None`` if there are none."""
        return self._expected(("cell", cell.experiment, cell.setting, cell.name))

    def of_base_model(self, cell: Cell) -> float | None:
        """Seconds that training one of the cell's base models takes."""
        return self._expected(("base model", cell.experiment, cell.setting))

    def note(self, cell: Cell, seconds: float) -> None:
        """Take a cell's seconds into account."""
        self._note(("cell", cell.experiment, cell.setting, cell.name), seconds)

    def note_base_model(self, cell: Cell, seconds: float) -> None:
        """Take the seconds of one of the cell's base models into account."""
        self._note(("base model", cell.experiment, cell.setting), seconds)

    def _note(self, kind: tuple[str, ...], seconds: float) -> None:
        for length in range(1, len(kind) + 1):
            self._seen[kind[:length]].append(seconds)

    def _expected(self, kind: tuple[str, ...]) -> float | None:
        kinds = [kind[:length] for length in range(len(kind), 0, -1)]
        return next((fmean(self._seen[known]) for known in kinds if known in self._seen), None)


@dataclass(frozen=True)
class Training:
    """A base model to train before the cells that need it.

    Attributes:
        cell: the first of those cells.
        base: what it is a function of.
    """

    cell: Cell
    base: BaseModel

    @property
    def label(self) -> str:
        """For people."""
        return f"base model {self.base.name}"


Task = Cell | Training
"""What is begun and ended."""


class Schedule:
    """What to do next, so that no base model is trained twice and nothing begins that would not end in time.

    Args:
        cells: in the order wanted.
        bases: the base models that a cell needs.
        there: whether a base model is on disk.
        durations: of what was done before.
        deadline: ``time.monotonic()`` at which all must have ended; never by default.
        alone: whether a cell, because it measures time, is to have nothing beside it.
        busy: whether another command is at a task: it is left until there is nothing else to begin.
    """

    def __init__(
        self,
        cells: Sequence[Cell],
        *,
        bases: Callable[[Cell], Sequence[BaseModel]],
        there: Callable[[BaseModel], bool],
        durations: Durations,
        deadline: float | None = None,
        alone: Callable[[Cell], bool] = lambda cell: False,  # noqa: ARG005
        busy: Callable[[Task], bool] = lambda task: False,  # noqa: ARG005
    ) -> None:
        self.left = sorted(cells, key=alone)  # last: everything else waits for them
        known: dict[BaseModel, bool] = {}
        self._bases = {cell.label: tuple(dict.fromkeys(bases(cell))) for cell in cells}
        for some in self._bases.values():
            for base in some:
                if base not in known:
                    known[base] = there(base)
        self._missing = {base for base, is_there in known.items() if not is_there}
        self._begun: set[BaseModel] = set()
        self._running: list[Task] = []
        self._durations, self._alone, self._busy = durations, alone, busy
        self._deadline = math.inf if deadline is None else deadline

    def next(self) -> Task | None:
        """What to begin now; ``None`` if there is nothing, or nothing until something else is done."""
        if any(isinstance(task, Cell) and self._alone(task) for task in self._running):
            return None
        task = self._next()
        if isinstance(task, Cell):
            if self._alone(task) and self._running:
                return None  # until that has ended
            self.left.remove(task)
        if isinstance(task, Training):
            self._begun.add(task.base)
        if task is not None:
            self._running.append(task)
        return task

    def _next(self) -> Task | None:
        waiting = None
        for task in self._ready():
            if not self._busy(task):
                return task
            waiting = waiting or task
        return waiting

    def _ready(self) -> Iterator[Task]:
        """What could begin, the first first."""
        offered: set[BaseModel] = set()
        for cell in self.left:
            lacking = self._lacking(cell)
            if not lacking:
                if self._fits(self._durations.of(cell)):
                    yield cell
                continue
            for base in lacking:
                if base not in self._begun | offered:
                    offered.add(base)
                    if self._fits(self._durations.of_base_model(cell)):
                        yield Training(cell, base)

    def done(self, task: Task, seconds: float | None) -> None:
        """Take note of what has ended, and how long it took; ``None`` if it failed."""
        self._running.remove(task)
        if isinstance(task, Cell):
            if seconds is not None:
                self._durations.note(task, seconds)
        elif seconds is not None:
            self._missing.discard(task.base)
            self._durations.note_base_model(task.cell, seconds)

    def drop(self, base: BaseModel) -> list[Cell]:
        """Take out the cells that need a base model, which cannot be had; returns them."""
        lost = [cell for cell in self.left if base in self._bases[cell.label]]
        self.left = [cell for cell in self.left if cell not in lost]
        return lost

    def expected(self) -> float | None:
        """Seconds of all that is left, one after another; ``None`` if nobody knows.

        Base models of which nothing is known are left out: they may have been trained in the cells that are known.
        """
        total = 0.0
        counted: set[BaseModel] = set()
        for cell in self.left:
            own = self._durations.of(cell)
            if own is None:
                return None
            new = set(self._lacking(cell)) - counted
            counted |= new
            total += own + len(new) * (self._durations.of_base_model(cell) or 0)
        return total

    def _lacking(self, cell: Cell) -> list[BaseModel]:
        return [base for base in self._bases[cell.label] if base in self._missing]

    def _fits(self, seconds: float | None) -> bool:
        """Whether work of so many seconds fits; what nobody knows about is tried while there is time."""
        rest = self._deadline - time.monotonic()
        return rest > 0 and (not seconds or seconds <= rest)
