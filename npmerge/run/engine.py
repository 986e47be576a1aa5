"""Runs the cells that have no record yet: in order, in the time there is, side by side."""

from __future__ import annotations

import copy
import logging
import os
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from tqdm import tqdm

from npmerge.catalogue import ALL
from npmerge.device import free_memory, kernels, pick_device, threads
from npmerge.experiments import EXPERIMENTS, cells, load_profile
from npmerge.experiments.listing import in_order, matching
from npmerge.run.schedule import Durations, Schedule, Task, Training
from npmerge.run.work import Bench, base_models, do_cell, load_images
from npmerge.run.workers import executor
from npmerge.store.files import is_locked, probe
from npmerge.store.origins import device_label, provenance, revision
from npmerge.store.records import Cell, Records
from npmerge.store.zoo import Zoo

log = logging.getLogger(__name__)


class CellsFailedError(RuntimeError):
    """Some cells failed; the others are done.

    Attributes:
        failed: why, by the cell's name below the profile.
    """

    def __init__(self, failed: dict[str, str]) -> None:
        self.failed = failed
        lines = [f"  {name}: {reason}" for name, reason in failed.items()]
        super().__init__("\n".join([f"{len(failed)} cells failed, the others are done:", *lines]))


def run_experiments(
    experiment: str | Sequence[str],
    *,
    profile: str = "digits",
    seeds: Sequence[int] = (0, 1, 2),
    pattern: str | None = None,
    device: str = "auto",
    results: Path | str = "results",
    zoo: Path | str = "zoo",
    models: Path | str = "models",
    recompute: bool = False,
    deterministic: bool = False,
    workers: int | None = None,
    dry_run: bool = False,
    time_budget: float | None = None,
    progress: bool = False,
) -> list[Path]:
    """Run the cells of experiments that have no record yet, seed by seed.

    Names, device, places and data are checked before the first cell begins. Base models are trained before the cells
    that need them, each once. Two commands may run at the same time: what one is at, the other leaves alone. A cell
    that fails is noted with its reason, and the others go on.

    Args:
        experiment: its name, e.g. ``"same_data"``; several; or ``"ALL"``.
        profile: name of the parameter set.
        seeds: each at most once.
        pattern: only cells whose name below the profile matches this shell pattern, e.g. ``"*dirichlet*"``.
        device: ``"cpu"``, ``"cuda"``, ...; ``"auto"`` takes a GPU if there is one.
        results: folder of the record files.
        zoo: folder of the base models and of what cells share.
        models: folder of published base models, which are looked for first and only read; it need not exist.
        recompute: make every record again; base models are kept.
        deterministic: use deterministic kernels; see :func:`npmerge.device.kernels`.
        workers: processes that do cells side by side; by default as many as the cores allow with the profile's threads
            on a CPU, and one on a GPU.
        dry_run: rehearse every cell with the same networks and batches but one epoch of two of them, and keep nothing.
        time_budget: seconds; begin nothing that, as far as records tell, would not end before they are over.
        progress: show progress bars on stderr.

    Returns:
        The record files, one a cell that has been run, seed by seed; none of a dry run.

    Raises:
        ValueError: an unknown name, a seed given twice, a pattern that matches nothing, a number that is not above 0,
            or a device that is not there.
        DataError: a data set that a cell needs is not there.
        OSError: a folder cannot be written.
        CellsFailedError: some cells failed.
    """
    for name, value in (("time_budget", time_budget), ("workers", workers)):
        if value is not None and not value > 0:
            raise ValueError(f"{name} is {value:g}: give more than 0")
    deadline = None if time_budget is None else time.monotonic() + time_budget
    todo = in_order(
        matching(cells(experiment, profile, seeds), pattern), seeds, load_profile(profile).first
    )
    begin = partial(
        _Run, device=pick_device(device), deterministic=deterministic, workers=workers,
        deadline=deadline, progress=progress,
    )  # fmt: skip
    if dry_run:
        with TemporaryDirectory(prefix="npmerge-") as folder:
            short = [replace(cell, config=_shortened(cell.config)) for cell in todo]
            begin(short, Records(Path(folder) / "results"), Zoo(Path(folder) / "zoo")).finish()
        return []
    records = Records(results)
    for place in (records.folder, Path(zoo)):
        probe(place / "probe")
    missing = [cell for cell in todo if recompute or not records.finished(cell)]
    places = Zoo(zoo, published=[models])
    left = {cell.label for cell in begin(missing, records, places, again=recompute).finish()}
    if left:
        text = "%d of %d cells are left: they do not fit into the time budget; the same command goes on from there%s"
        log.warning(text, len(left), len(missing), ", without recompute" * recompute)
    return [records.path(cell) for cell in todo if cell.label not in left]


@dataclass(frozen=True)
class Progress:
    """How far an experiment is.

    Attributes:
        experiment: its name.
        cells: how many cells are in each state; see :data:`npmerge.store.records.State`.
        failed: why cells failed, by their names below the profile.
        seconds: that the rest will take; ``None`` if records of this device do not tell.
    """

    experiment: str
    cells: Counter[str]
    failed: dict[str, str]
    seconds: float | None


def status_of(
    experiment: str | Sequence[str] = ALL,
    *,
    profile: str = "digits",
    seeds: Sequence[int] = (0, 1, 2),
    pattern: str | None = None,
    device: str = "auto",
    results: Path | str = "results",
    zoo: Path | str = "zoo",
    models: Path | str = "models",
) -> list[Progress]:
    """How far experiments are, and how long the rest will take on a device.

    Args:
        experiment: its name, several, or ``"ALL"``.
        profile: name of the parameter set.
        seeds: each at most once.
        pattern: only cells whose name below the profile matches this shell pattern.
        device: where the rest is to run.
        results: folder of the record files.
        zoo: folder of the base models.
        models: folder of published ones.

    Raises:
        ValueError: as :func:`run_experiments`.
    """
    todo = matching(cells(experiment, profile, seeds), pattern)
    where, records = pick_device(device), Records(results)
    places = Zoo(zoo, published=[models])
    durations = _durations(records, profile, where)
    found = []
    for name in dict.fromkeys(cell.experiment for cell in todo):
        mine = [cell for cell in todo if cell.experiment == name]
        states = {cell.label: records.state(cell) for cell in mine}
        notes = {c.label: records.failure(c) for c in mine if states[c.label] == "failed"}
        failed = {label: note.reason for label, note in notes.items() if note is not None}
        rest = [cell for cell in mine if states[cell.label] != "done"]
        seconds = _schedule(rest, places, where, durations).expected()
        if seconds is not None:
            seconds /= _workers(None, len(rest), where, load_profile(profile).threads)
        found.append(Progress(name, Counter(states.values()), failed, seconds))
    return found


class _Run:
    """Cells on their way."""

    def __init__(
        self,
        todo: Sequence[Cell],
        records: Records,
        zoo: Zoo,
        *,
        device: torch.device,
        deterministic: bool,
        workers: int | None,
        deadline: float | None,
        progress: bool,
        again: bool = False,
    ) -> None:
        self._todo, self._records = todo, records
        self._failed: dict[str, str] = {}
        self._progress = progress
        if not todo:
            return
        profile = load_profile(todo[0].profile)
        self._workers = _workers(workers, len(todo), device, profile.threads)
        self._plan = _schedule(
            todo, zoo, device, _durations(records, profile.name, device),
            deadline=deadline, records=records,
        )  # fmt: skip
        self._bench = Bench.at(zoo, device, progress=progress and self._workers == 1)
        self._do = partial(
            _do, records=records, bench=self._bench, threads_=profile.threads,
            deterministic=deterministic, source=revision(), again=again,
        )  # fmt: skip

    def finish(self) -> list[Cell]:
        """Do all; returns what did not fit into the time."""
        if not self._todo:
            return []
        _check_data(self._todo)
        with tqdm(total=len(self._todo), unit="cell", disable=not self._progress) as bar:
            self._go(bar)
        if self._failed:
            raise CellsFailedError(self._failed)
        return self._plan.left

    def _go(self, bar: tqdm[Any]) -> None:
        running: dict[Future[float], Task] = {}
        pool = executor(self._workers)
        try:
            while True:
                while len(running) < self._workers and (task := self._plan.next()):
                    running[pool.submit(self._do, task)] = task
                if not running:
                    break
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    bar.update(self._ended(running.pop(future), future))
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
        pool.shutdown()

    def _ended(self, task: Task, future: Future[float]) -> int:
        """Take note of a task that has ended; returns how many cells are over."""
        error = future.exception()
        self._plan.done(task, None if error else future.result())
        if error is None:
            return isinstance(task, Cell)
        if not isinstance(error, Exception):
            raise error
        reason = _reason(error)
        lost = [task] if isinstance(task, Cell) else self._plan.drop(task.base)
        if isinstance(task, Training):
            reason = f"{task.label} could not be trained: {reason}"
        for cell in lost:
            log.warning("%s failed: %s", cell.label, reason)
            self._records.fail(cell, reason)
            self._failed[cell.label] = reason
        return len(lost)


def _do(
    task: Task,
    *,
    records: Records,
    bench: Bench,
    threads_: int,
    deterministic: bool,
    source: str,
    again: bool,
) -> float:
    """Do a task, and return its seconds."""
    with kernels(deterministic=deterministic), threads(threads_):
        free_memory(bench.device)
        start = time.perf_counter()
        log.info("%s on %s", task.label, bench.device)
        if isinstance(task, Training):
            setting = task.cell.config["setting"]
            bench.zoo.ensure(
                task.base, load_images(setting), device=bench.device,
                progress=task.label if bench.progress else None,
            )  # fmt: skip
            return time.perf_counter() - start
        with records.locked(task, wait=True):
            if not again and records.done(task):  # by another command, meanwhile
                return time.perf_counter() - start
            work = EXPERIMENTS[task.experiment].work or do_cell
            outcome = work(task, bench)
            seconds = time.perf_counter() - start
            bases = base_models(task)
            origin = provenance(
                bench.device,
                seconds=seconds,
                source=source,
                precision="bfloat16" if bases[0].in_bfloat16(bench.device) else "float32",
                deterministic=deterministic,
                base_models={
                    base.name: bench.zoo.provenance(base, device=bench.device) for base in bases
                },
            )
            records.write(task, outcome, origin)
        return seconds


def _reason(error: Exception) -> str:
    if isinstance(error, BrokenProcessPool):
        return "its process was killed (for want of memory, or by somebody)"
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0]}" if text else type(error).__name__


def _durations(records: Records, profile: str, device: torch.device) -> Durations:
    whole = (record for name in EXPERIMENTS for record in records.whole(profile, name))
    return Durations(whole, device_label(device))


def _schedule(
    todo: Sequence[Cell],
    zoo: Zoo,
    device: torch.device,
    durations: Durations,
    *,
    deadline: float | None = None,
    records: Records | None = None,
) -> Schedule:
    def busy(task: Task) -> bool:
        if isinstance(task, Training):
            return is_locked(zoo.path(task.base, device=device))
        return records is not None and records.state(task) == "running"

    return Schedule(
        todo,
        bases=base_models,
        there=lambda base: zoo.there(base, device=device),
        alone=lambda cell: EXPERIMENTS[cell.experiment].alone,
        durations=durations,
        deadline=deadline,
        busy=busy,
    )


def _workers(wanted: int | None, count: int, device: torch.device, each: int) -> int:
    """How many cells run side by side."""
    if wanted is None:
        wanted = (os.cpu_count() or 1) // each if device.type == "cpu" else 1
    return max(1, min(count, wanted))


def _check_data(todo: Sequence[Cell]) -> None:
    """Load every data set once, so that one that is not there is known before the first cell, not after hours."""
    settings = [cell.config["setting"] for cell in todo]
    for one in {(s["dataset"], s["image_size"], s.get("images")): s for s in settings}.values():
        load_images(one)


def _shortened(config: dict[str, Any]) -> dict[str, Any]:
    """A configuration that exercises every line of a cell in little time."""
    short = copy.deepcopy(config)
    short["setting"]["recipe"]["epochs"] = 1
    if "trunk" in short["setting"]:
        short["setting"]["trunk"] = min(short["setting"]["trunk"], 1)
    sizes = [short["setting"]["recipe"]["batch_size"], short["data"]["batch_size"]]
    short["setting"]["images"] = 2 * max(sizes)
    if "epochs" in short:
        short["epochs"] = 1
    for step in ("align", "aggregate"):
        options = (short.get(step) or {}).get("options", {})
        for one in [options, *(v["trial"] for v in options.values() if isinstance(v, dict))]:
            if "epochs" in one:
                one["epochs"] = 1
    if "path" in short.get("measures", {}):
        short["measures"]["path"] = 2
    return short
