"""In which order units run, which base models go before them, and what still fits into the time there is."""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from statistics import fmean
from typing import Any

from npmerge.experiments.profile import Setting
from npmerge.results import Unit
from npmerge.zoo import BaseModel

SHOWN = 3
"""Names that an error lists."""


def in_order(units: Iterable[Unit], seeds: Sequence[int]) -> list[Unit]:
    """Units seed by seed, so that one seed of everything is there early; otherwise as they come.

    Args:
        units: of all experiments, one after another.
        seeds: in the order wanted.
    """
    return sorted(units, key=lambda unit: list(seeds).index(unit.seed))


def matching(units: Sequence[Unit], pattern: str | None) -> list[Unit]:
    """The units whose name below the profile matches a pattern.

    Args:
        units: to choose from.
        pattern: a shell pattern, e.g. ``"disjoint_splits/*dirichlet*"``; all by default.

    Raises:
        ValueError: none does.
    """
    if pattern is None:
        return list(units)
    found = [unit for unit in units if fnmatchcase(unit.label, pattern)]
    if not found:
        names = ", ".join(unit.label for unit in units[:SHOWN])
        more = f" and {len(units) - SHOWN} more" if len(units) > SHOWN else ""
        raise ValueError(f"no unit matches {pattern!r}: there are {names}{more}")
    return found


def duration(seconds: float | None) -> str:
    """Seconds as text, in the unit that suits them.

    Args:
        seconds: ``None`` if nobody knows.
    """
    if seconds is None:
        return "unknown"
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


class Durations:
    """How long units and the training of base models took, and so how long the next ones will take.

    Args:
        contents: record files of one profile.
        device: what they call the device that is used now; others say nothing about it.
    """

    def __init__(self, contents: Iterable[dict[str, Any]], device: str) -> None:
        self._seen: defaultdict[tuple[str, ...], list[float]] = defaultdict(list)
        for content in contents:
            unit, origin = content["unit"], content["provenance"]
            if origin.get("device") != device:
                continue
            kind = unit["experiment"], unit["setting"]
            if "seconds" in origin:
                self._note(("unit", *kind), origin["seconds"])
            bases = origin.get("base_models", {})
            if bases.get("trained"):
                self._note(("base model", *kind), bases["seconds"] / bases["trained"])

    def of(self, unit: Unit) -> float | None:
        """Seconds of a unit: those of its setting, else of its experiment, else of any; ``None`` if there are none."""
        return self._expected(("unit", unit.experiment, unit.setting))

    def of_base_model(self, unit: Unit) -> float | None:
        """Seconds that training one of the unit's base models takes."""
        return self._expected(("base model", unit.experiment, unit.setting))

    def note(self, unit: Unit, seconds: float) -> None:
        """Take a unit's seconds into account."""
        self._note(("unit", unit.experiment, unit.setting), seconds)

    def note_base_model(self, unit: Unit, seconds: float) -> None:
        """Take the seconds of one of the unit's base models into account."""
        self._note(("base model", unit.experiment, unit.setting), seconds)

    def _note(self, kind: tuple[str, ...], seconds: float) -> None:
        for length in range(1, len(kind) + 1):
            self._seen[kind[:length]].append(seconds)

    def _expected(self, kind: tuple[str, ...]) -> float | None:
        kinds = [kind[:length] for length in range(len(kind), 0, -1)]
        return next((fmean(self._seen[known]) for known in kinds if known in self._seen), None)


@dataclass(frozen=True)
class Training:
    """Base models to train before the units that need them.

    Attributes:
        unit: the first of those units.
        setting: what to load their data by.
        bases: what they are functions of.
    """

    unit: Unit
    setting: Setting
    bases: tuple[BaseModel, ...]


class Schedule:
    """What to do next, so that no base model is trained twice and nothing begins that would not end in time.

    Args:
        units: in the order wanted.
        bases: the base models that a unit needs.
        there: whether a base model is on disk.
        durations: of what was done before.
        deadline: ``time.monotonic()`` at which all must have ended; never by default.
        together: train all missing base models of a setting at once, those of later units too; one by one by default.
        alone: whether a unit, because it measures time, is to have nothing beside it.
    """

    def __init__(
        self,
        units: Sequence[Unit],
        *,
        bases: Callable[[Unit], Sequence[BaseModel]],
        there: Callable[[BaseModel], bool],
        durations: Durations,
        deadline: float | None = None,
        together: bool = False,
        alone: Callable[[Unit], bool] = lambda unit: False,  # noqa: ARG005
    ) -> None:
        self.left = list(units)
        self._bases = {unit.name: {base.address: base for base in bases(unit)} for unit in units}
        every = {address: base for some in self._bases.values() for address, base in some.items()}
        self._missing = {address for address, base in every.items() if not there(base)}
        self._begun: set[str] = set()  # base models
        self._seconds: dict[str, float] = {}  # of each base model trained
        self._running: list[Unit | Training] = []
        self._durations, self._together, self._alone = durations, together, alone
        self._deadline = math.inf if deadline is None else deadline

    def next(self) -> Unit | Training | None:
        """What to begin now; ``None`` if there is nothing, or nothing until something else is done."""
        if any(isinstance(task, Unit) and self._alone(task) for task in self._running):
            return None
        task = self._next()
        if isinstance(task, Unit):
            if self._alone(task) and self._running:
                return None  # until that has ended
            self.left.remove(task)
        if isinstance(task, Training):
            self._begun |= {base.address for base in task.bases}
        if task is not None:
            self._running.append(task)
        return task

    def _next(self) -> Unit | Training | None:
        for unit in self.left:
            lacking = self._lacking(unit)
            if not lacking:
                if self._fitting(self._durations.of(unit)):
                    return unit
                continue
            setting = _setting(unit)
            if self._together:
                alike = [other for other in self.left if _setting(other) == setting]
                lacking = {k: base for other in alike for k, base in self._lacking(other).items()}
            free = [base for address, base in lacking.items() if address not in self._begun]
            wanted = free if self._together else free[:1]
            fitting = self._fitting(self._durations.of_base_model(unit), len(wanted))
            if fitting:
                return Training(unit, setting, tuple(wanted[:fitting]))
        return None

    def done(self, task: Unit | Training, seconds: float) -> None:
        """Take note of what has ended, and how long it took."""
        self._running.remove(task)
        if isinstance(task, Unit):
            self._durations.note(task, seconds)
            return
        each = seconds / len(task.bases)
        for base in task.bases:
            self._missing.discard(base.address)
            self._seconds[base.address] = each
            self._durations.note_base_model(task.unit, each)

    def trained(self, unit: Unit) -> dict[str, Any]:
        """How many of the unit's base models were trained for this schedule, and their seconds, for its record."""
        seconds = [self._seconds[k] for k in self._bases[unit.name] if k in self._seconds]
        return {"trained": len(seconds), "seconds": round(sum(seconds), 1)}

    def expected(self) -> float | None:
        """Seconds of all that is left, one after another; ``None`` if nobody knows.

        Base models of which nothing is known are left out: they may have been trained in the units that are known.
        """
        total = 0.0
        counted: set[str] = set()
        for unit in self.left:
            own = self._durations.of(unit)
            if own is None:
                return None
            new = self._lacking(unit).keys() - counted
            counted |= new
            total += own + len(new) * (self._durations.of_base_model(unit) or 0)
        return total

    def _lacking(self, unit: Unit) -> dict[str, BaseModel]:
        return {k: base for k, base in self._bases[unit.name].items() if k in self._missing}

    def _fitting(self, each: float | None, count: int = 1) -> int:
        """How many pieces of work of so many seconds fit; what nobody knows about is tried while there is time."""
        rest = self._deadline - time.monotonic()
        if rest <= 0:
            return 0
        return count if not each else int(min(count, rest / each))


def _setting(unit: Unit) -> Setting:
    return Setting(**unit.config["setting"])
