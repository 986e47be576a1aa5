"""The paper's experiments, one module a section; each is a list of independent units."""

from __future__ import annotations

import copy
import logging
import os
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Protocol, TypeVar

import torch
from tqdm import tqdm

from npmerge.device import free_memory, kernels, models_at_once, pick_device
from npmerge.experiments import (
    cost,
    data_size,
    disjoint_splits,
    imagenet,
    many_models,
    same_data,
)
from npmerge.experiments.merging import Machine
from npmerge.experiments.profile import NAMES as PROFILES
from npmerge.experiments.profile import Profile, Setting, load_profile
from npmerge.experiments.schedule import Durations, Schedule, Training, in_order, matching
from npmerge.results import Outcome, Results, Unit, device_label, provenance, revision
from npmerge.zoo import BaseModel, Zoo

log = logging.getLogger(__name__)

T = TypeVar("T")

__all__ = [
    "ALL",
    "EXPERIMENTS",
    "PROFILES",
    "Profile",
    "Progress",
    "load_profile",
    "names",
    "pick_device",
    "run",
    "status",
    "units",
]

ALL = "ALL"
"""Stands for all experiments."""


class Experiment(Protocol):
    """What a module of this package has.

    One that measures time also has ``ALONE = True``: then no other unit runs beside one of its own.
    """

    def units(self, profile: Profile, seeds: Sequence[int]) -> list[Unit]:
        """List the units."""

    def base_models(self, unit: Unit) -> list[BaseModel]:
        """The base models that a unit needs."""

    def run(self, unit: Unit, *, zoo: Zoo, machine: Machine) -> Outcome:
        """Run one unit."""


EXPERIMENTS: dict[str, Experiment] = {
    module.NAME: module
    for module in (same_data, disjoint_splits, imagenet, data_size, many_models, cost)
}
"""The experiments in the paper's order."""


def names(experiments: str | Sequence[str]) -> list[str]:
    """Experiments by name, each once.

    Args:
        experiments: a name, several, or ``"ALL"``, which is all of them in the paper's order.

    Raises:
        ValueError: there is no such experiment.
    """
    given = [experiments] if isinstance(experiments, str) else experiments
    for name in given:
        if name not in EXPERIMENTS and name != ALL:
            known = ", ".join(EXPERIMENTS)
            raise ValueError(f"unknown experiment {name!r}: choose one of {known}, or {ALL}")
    return list(EXPERIMENTS) if ALL in given else list(dict.fromkeys(given))


def units(experiment: str | Sequence[str], profile: str, seeds: Sequence[int]) -> list[Unit]:
    """The units of an experiment, or of several, one experiment after the other.

    Args:
        experiment: its name, e.g. ``"same_data"``; see :func:`names`.
        profile: name of the parameter set.
        seeds: each at most once.

    Raises:
        ValueError: an unknown experiment or profile, no seed, a negative seed, or one given twice.
    """
    chosen = names(experiment)
    twice = sorted({seed for seed in seeds if list(seeds).count(seed) > 1})
    if twice:
        raise ValueError(f"seed {twice[0]} is given twice: give each seed once")
    if not seeds or min(seeds) < 0:
        raise ValueError(f"seeds are {list(seeds)}: give at least one, none below 0")
    parameters = load_profile(profile)
    return [unit for name in chosen for unit in EXPERIMENTS[name].units(parameters, seeds)]


def run(
    experiment: str | Sequence[str],
    *,
    profile: str = "digits",
    seeds: Sequence[int] = (0, 1, 2),
    pattern: str | None = None,
    device: str = "auto",
    results: Path | str = "results",
    zoo: Path | str = "zoo",
    recompute: bool = False,
    deterministic: bool = False,
    at_once: int | None = None,
    dry_run: bool = False,
    time_budget: float | None = None,
    progress: bool = False,
) -> list[Path]:
    """Run the units of experiments that have no record yet, seed by seed.

    Names, device and data are checked before the first unit begins. Base models are trained before the units that need
    them, each once. Where several are trained at once (on CUDA), those of a setting are trained together, for all
    units. On a CPU a profile that fixes the threads of a unit has its units run side by side, as many as the cores
    allow. The numbers are the same but for rounding.

    Args:
        experiment: its name, e.g. ``"same_data"``; several; or ``"ALL"``.
        profile: name of the parameter set.
        seeds: each at most once.
        pattern: only units whose name below the profile matches this shell pattern, e.g. ``"*dirichlet*"``.
        device: ``"cpu"``, ``"cuda"``, ...; ``"auto"`` takes a GPU if there is one.
        results: folder of the record files.
        zoo: folder of the base models.
        recompute: make every record again; base models are kept.
        deterministic: use deterministic kernels; see :func:`npmerge.device.kernels`.
        at_once: models to train at the same time; by default one on a CPU and 16 on CUDA.
        dry_run: rehearse every unit with the same networks and batches but one epoch of two of them, and keep nothing.
        time_budget: seconds; begin nothing that, as far as records tell, would not end before they are over.
        progress: show progress bars on stderr.

    Returns:
        The record files, one a unit that has been run, seed by seed; none of a dry run.

    Raises:
        ValueError: an unknown name, a seed given twice, a pattern that matches nothing, a budget that is not above 0,
            or a device that is not there.
        DataError: a data set that a unit needs is not there.
    """
    if time_budget is not None and not time_budget > 0:
        raise ValueError(f"the time budget is {time_budget:g} seconds: give more than 0")
    deadline = None if time_budget is None else time.monotonic() + time_budget
    todo = in_order(matching(units(experiment, profile, seeds), pattern), seeds)
    work = partial(
        _run_units, device=pick_device(device), threads=load_profile(profile).threads,
        deterministic=deterministic, at_once=at_once, deadline=deadline, progress=progress,
    )  # fmt: skip
    if dry_run:
        with TemporaryDirectory(prefix="npmerge-") as folder:
            short = [replace(unit, config=_shortened(unit.config)) for unit in todo]
            work(short, results=Results(Path(folder) / "results"), zoo=Zoo(Path(folder) / "zoo"))
        return []
    records = Results(results)
    missing = [unit for unit in todo if recompute or not records.finished(unit)]
    left = work(missing, results=records, zoo=Zoo(zoo))
    if left:
        log.warning("the same command goes on from there%s", ", without recompute" * recompute)
    names_left = {unit.name for unit in left}
    return [records.path(unit) for unit in todo if unit.name not in names_left]


@dataclass(frozen=True)
class Progress:
    """How far an experiment is.

    Attributes:
        experiment: its name.
        units: how many units are in each state: ``done``, ``running``, ``missing``, ``stale`` (made under another
            configuration) or ``damaged``.
        seconds: that the rest will take; ``None`` if records of this device do not tell.
    """

    experiment: str
    units: Counter[str]
    seconds: float | None


def status(
    experiment: str | Sequence[str] = ALL,
    *,
    profile: str = "digits",
    seeds: Sequence[int] = (0, 1, 2),
    pattern: str | None = None,
    device: str = "auto",
    results: Path | str = "results",
    zoo: Path | str = "zoo",
) -> list[Progress]:
    """How far experiments are, and how long the rest will take on a device.

    Args:
        experiment: its name, several, or ``"ALL"``.
        profile: name of the parameter set.
        seeds: each at most once.
        pattern: only units whose name below the profile matches this shell pattern.
        device: where the rest is to run.
        results: folder of the record files.
        zoo: folder of the base models.

    Raises:
        ValueError: as :func:`run`.
    """
    todo = matching(units(experiment, profile, seeds), pattern)
    where, records, models = pick_device(device), Results(results), Zoo(zoo)
    durations = _durations(records, profile, where)
    found = []
    for name in dict.fromkeys(unit.experiment for unit in todo):
        mine = [unit for unit in todo if unit.experiment == name]
        starts = [records.started(unit) for unit in mine]
        states = [
            "running" if start else records.state(unit)
            for unit, start in zip(mine, starts, strict=True)
        ]
        rest = [unit for unit, state in zip(mine, states, strict=True) if state != "done"]
        seconds = _schedule(rest, models, durations).expected()
        if seconds is not None:
            seconds -= sum(time.time() - start for start in starts if start)
            seconds = max(0.0, seconds) / _workers(len(rest), where, load_profile(profile).threads)
        found.append(Progress(name, Counter(states), seconds))
    return found


def _durations(records: Results, profile: str, device: torch.device) -> Durations:
    contents = (content for name in EXPERIMENTS for content in records.whole(profile, name))
    return Durations(contents, device_label(device))


def _schedule(units: Sequence[Unit], zoo: Zoo, durations: Durations, **options: Any) -> Schedule:
    return Schedule(
        units,
        bases=lambda unit: EXPERIMENTS[unit.experiment].base_models(unit),
        there=lambda base: (zoo.folder / base.address).exists(),
        alone=lambda unit: getattr(EXPERIMENTS[unit.experiment], "ALONE", False),
        durations=durations,
        **options,
    )


def _workers(count: int, device: torch.device, threads: int | None) -> int:
    """How many units run side by side."""
    if not threads or device.type != "cpu":
        return 1
    return max(1, min(count, (os.cpu_count() or 1) // threads))


def _shortened(config: dict[str, Any]) -> dict[str, Any]:
    """A configuration that exercises every line of a unit in little time."""
    short = copy.deepcopy(config)
    sections = [short["setting"], short["setting"]["recipe"], short["optimisation"]]
    for section in sections:
        for name, least in (("epochs", 1), ("tuned_epochs", 1), ("path_points", 2)):
            if name in section:
                section[name] = least
    sizes = (section["batch_size"] for section in sections if "batch_size" in section)
    short["setting"]["images"] = 2 * max(sizes)
    return short


def _run_units(
    units: Sequence[Unit],
    *,
    results: Results,
    zoo: Zoo,
    device: torch.device,
    threads: int | None,
    deterministic: bool,
    at_once: int | None,
    deadline: float | None,
    progress: bool,
) -> list[Unit]:
    """Run units and the trainings that they need; what is left is what did not fit into the time."""
    if not units:
        return []
    _check_data(units)
    workers = _workers(len(units), device, threads)
    plan = _schedule(
        units, zoo, _durations(results, units[0].profile, device), deadline=deadline,
        together=(models_at_once(device) if at_once is None else at_once) > 1,
    )  # fmt: skip
    one = partial(_run_unit, results=results, source=revision(), deterministic=deterministic)
    work = partial(
        _work, zoo=zoo, device=device, threads=threads, deterministic=deterministic,
        at_once=at_once, progress=progress and workers == 1,
    )  # fmt: skip
    running: dict[Future[float], Unit | Training] = {}
    with (
        tqdm(total=len(units), unit="unit", disable=not progress) as bar,
        _executor(workers) as executor,
    ):
        while True:
            while len(running) < workers and (task := plan.next()):
                job = (
                    partial(_train, task)
                    if isinstance(task, Training)
                    else partial(one, task, trained=plan.trained(task))
                )
                running[executor.submit(work, job)] = task
            if not running:
                break
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                task = running.pop(future)
                plan.done(task, future.result())
                bar.update(isinstance(task, Unit))
    if plan.left:
        text = "%d of %d units are left: they do not fit into the time budget"
        log.warning(text, len(plan.left), len(units))
    return plan.left


def _check_data(units: Sequence[Unit]) -> None:
    """Load every data set once, so that one that is not there is known before the first unit, not after hours."""
    settings = [Setting(**unit.config["setting"]) for unit in units]
    for setting in {(s.dataset, s.image_size, s.images): s for s in settings}.values():
        setting.load()


class _Here(Executor):
    """Does a job when it is handed in, in this process."""

    def submit(self, job: Callable[..., T], /, *args: Any, **options: Any) -> Future[T]:
        done: Future[T] = Future()
        done.set_result(job(*args, **options))
        return done


def _executor(workers: int) -> Executor:
    if workers == 1:
        return _Here()
    return ProcessPoolExecutor(workers, mp_context=get_context("spawn"))


def _work(
    job: Callable[..., None],
    *,
    zoo: Zoo,
    device: torch.device,
    threads: int | None,
    deterministic: bool,
    at_once: int | None,
    progress: bool,
) -> float:
    """Do a job under the conditions of the run, and return its seconds."""
    before = torch.get_num_threads()
    if threads:
        torch.set_num_threads(threads)
    free_memory(device)
    start = time.perf_counter()
    try:
        with kernels(deterministic=deterministic):
            job(zoo=zoo, machine=Machine(device, at_once, progress))
    finally:
        torch.set_num_threads(before)
    return time.perf_counter() - start


def _train(task: Training, *, zoo: Zoo, machine: Machine) -> None:
    log.info("training base models of %s on %s", task.setting.name, machine.device)
    zoo.get_all(
        task.bases, task.setting.load(), device=machine.device, at_once=machine.at_once,
        progress=machine.label(f"base models of {task.setting.name}"),
    )  # fmt: skip


def _run_unit(
    unit: Unit,
    *,
    zoo: Zoo,
    machine: Machine,
    results: Results,
    source: str,
    deterministic: bool,
    trained: dict[str, Any],
) -> None:
    log.info("running %s on %s", unit.name, machine.device)
    start = time.perf_counter()
    with results.running(unit):
        outcome = EXPERIMENTS[unit.experiment].run(unit, zoo=zoo, machine=machine)
        origin = provenance(machine.device, time.perf_counter() - start, source)
        origin |= {"base_models": trained, "deterministic": deterministic}
        results.write(unit, outcome, origin)
