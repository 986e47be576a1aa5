"""What experiments would cost on so many devices: their own schedule, run on paper with measured rates."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from heapq import heappop, heappush
from itertools import count
from statistics import fmean

from npmerge import experiments
from npmerge.catalogue import ALL
from npmerge.experiments import EXPERIMENTS, cells
from npmerge.experiments.listing import in_order, matching
from npmerge.run.amounts import Network, Part, parts, trained_images
from npmerge.run.rates import Rates, cell_of
from npmerge.run.schedule import Durations, Schedule, Task
from npmerge.run.work import base_models
from npmerge.store.records import Cell, Record
from npmerge.store.zoo import BaseModel


@dataclass(frozen=True)
class Plan:
    """What some cells would take.

    Attributes:
        cells: how many.
        base_models: how many are trained for them.
        work: seconds of all, one after another.
        wall: seconds until all is done, by the number of workers.
        least: seconds that no number of workers goes below.
    """

    cells: int
    base_models: int
    work: float
    wall: dict[int, float]
    least: float


def plan_cells(
    todo: Sequence[Cell],
    workers: Sequence[int],
    rates: Rates,
    *,
    records: Iterable[Record] = (),
    speed: float = 1.0,
) -> Plan:
    """Run cells and the training of their base models on paper, none of which is there yet.

    Args:
        todo: the cells, in the order in which they would be done.
        workers: numbers of devices, each of which does one thing at a time.
        rates: of the device.
        records: of these cells on this device; what they say goes before the rates.
        speed: how many times as fast the devices are; matching stays as it is, since assignments are solved on the CPU.

    Raises:
        ValueError: nothing tells how long a cell takes.
    """
    seconds = _Estimates(todo, rates, list(records), speed)

    def schedule() -> Schedule:
        return Schedule(
            todo, bases=base_models, there=lambda _: False, alone=_alone,
            durations=Durations((), ""),
        )  # fmt: skip

    return Plan(
        len(todo),
        len(seconds.bases),
        sum(seconds.cells.values()) + sum(seconds.bases.values()),
        {number: makespan(schedule(), number, seconds.of) for number in workers},
        _least(todo, seconds),
    )


def plan_experiments(
    experiment: str | Sequence[str],
    *,
    profile: str,
    seeds: Sequence[int] = (0, 1, 2),
    pattern: str | None = None,
    workers: Sequence[int] = (1,),
    rates: Rates,
    records: Iterable[Record] = (),
    speed: float = 1.0,
) -> dict[str, Plan]:
    """Plan experiments, each by itself and, under ``"ALL"``, together, where they share base models.

    Args:
        experiment: its name; several; or ``"ALL"``.
        profile: name of the parameter set.
        seeds: each at most once.
        pattern: only cells whose name below the profile matches this shell pattern.
        workers: numbers of devices.
        rates: of the device.
        records: of the device, of any profile; those of this one go before the rates.
        speed: how many times as fast the devices are.

    Raises:
        ValueError: an unknown name, a seed given twice, a pattern that matches nothing, a number that is not above 0,
            or nothing tells how long a cell takes.
    """
    if min(workers) < 1:
        raise ValueError(f"workers is {min(workers)}: give 1 or more")
    if not 0 < speed < math.inf:
        raise ValueError(f"speed is {speed:g}: give a number above 0")
    first = experiments.load_profile(profile).first
    todo = in_order(matching(cells(experiment, profile, seeds), pattern), seeds, first)
    if not todo:
        raise ValueError(f"profile {profile!r} has no cells of {experiment}: choose others")
    known = [record for record in records if record.cell.profile == profile]
    chosen = {name: [cell for cell in todo if cell.experiment == name] for name in EXPERIMENTS}
    return {
        name: plan_cells(some, workers, rates, records=known, speed=speed)
        for name, some in [*chosen.items(), (ALL, todo)]
        if some
    }


def makespan(schedule: Schedule, workers: int, seconds: Callable[[Task], float]) -> float:
    """Seconds until a schedule is done, if so many workers begin what it says as soon as they are free.

    Args:
        schedule: without a deadline; it is used up.
        workers: how many.
        seconds: of a task.
    """
    now, number = 0.0, count()
    running: list[tuple[float, int, Task]] = []
    while True:
        while len(running) < workers and (task := schedule.next()):
            heappush(running, (now + seconds(task), next(number), task))
        if not running:
            return now
        now = running[0][0]
        while running and running[0][0] == now:
            task = heappop(running)[2]
            schedule.done(task, seconds(task))


class _Estimates:
    """Seconds of cells and of base models."""

    def __init__(
        self, todo: Sequence[Cell], rates: Rates, records: list[Record], speed: float
    ) -> None:
        self._rates, self._speed = rates, speed
        known: defaultdict[tuple[str, ...], list[float]] = defaultdict(list)
        trained: dict[str, float] = {}
        for record in records:
            origin = record.provenance
            known[_kind(cell_of(record))].append(origin.seconds)
            bases = origin.base_models.items()
            trained |= {k: made["seconds"] for k, made in bases if made["device"] == origin.device}
        self.cells: dict[str, float] = {}
        self.bases: dict[BaseModel, float] = {}
        made: set[object] = set()
        for cell in todo:
            for base in dict.fromkeys(base_models(cell)):
                if base not in self.bases:
                    self.bases[base] = self._trained(base, trained, made)
            took = known.get(_kind(cell))
            self.cells[cell.label] = fmean(took) / speed if took else self._cell(cell, made)

    def of(self, task: Task) -> float:
        return self.cells[task.label] if isinstance(task, Cell) else self.bases[task.base]

    def _trained(self, base: BaseModel, known: Mapping[str, float], made: set[object]) -> float:
        if base.name in known:
            return known[base.name] / self._speed
        network = Network(base.dataset, base.model, base.width, base.image_size)
        own = self._seconds(network, Part("", "training", trained_images(base)))
        if base.trunk is None or base.trunk in made:
            return own
        made.add(base.trunk)  # by the first that goes on from it, while the others wait
        return own + self._trained(base.trunk, known, made)

    def _cell(self, cell: Cell, made: set[object]) -> float:
        network, total = Network.of(cell.config["setting"]), 0.0
        found = parts(cell)
        if found is None:
            raise ValueError(
                f"nothing tells how long {cell.label} takes: run one seed of it first, or plan other experiments"
            )
        for part in found:
            if part.shared is None or part.shared not in made:
                made.add(part.shared)
                total += self._seconds(network, part)
        return total

    def _seconds(self, network: Network, part: Part) -> float:
        work = part.times * network.work(part.kind)
        seconds = self._rates.seconds(part.kind, network.name, work) if work else 0.0
        if seconds is None:
            raise ValueError(
                f"nothing tells how long {part.kind} takes with {network.name} on this device: time it with "
                "`npmerge plan --measure FILE`"
            )
        return seconds if part.kind == "matching" else seconds / self._speed


def _least(todo: Sequence[Cell], seconds: _Estimates) -> float:
    """Base models go before their cells; and what is done alone, after all that is not or before it."""
    alone = sum(seconds.cells[cell.label] for cell in todo if _alone(cell))
    paths = (
        max(map(seconds.bases.__getitem__, base_models(cell)), default=0.0)
        + (0.0 if _alone(cell) else seconds.cells[cell.label])
        for cell in todo
    )
    return alone + max(paths, default=0.0)


def _kind(cell: Cell) -> tuple[str, ...]:
    return cell.experiment, cell.setting, cell.name


def _alone(cell: Cell) -> bool:
    return EXPERIMENTS[cell.experiment].alone
