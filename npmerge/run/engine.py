"""Runs the cells that have no record yet: in order, in the time there is, side by side."""

from __future__ import annotations

import copy
import logging
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, Executor, Future, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

import torch
from tqdm import tqdm

from npmerge.catalogue import ALL, DATASETS
from npmerge.device import free_memory, kernels, pick_device, threads
from npmerge.experiments import EXPERIMENTS, Profile, cells, load_profile
from npmerge.experiments.listing import in_order, matching
from npmerge.run.cluster import POLL, Cluster, ClusterError, check_cluster
from npmerge.run.schedule import Durations, Schedule, Task, Training
from npmerge.run.sites import do_apart, do_there, look, marked, needed, packed, unpack
from npmerge.run.work import Bench, base_models, do_cell, load_images
from npmerge.run.workers import Here, Processes, executor
from npmerge.store.files import is_locked, locked, probe
from npmerge.store.origins import device_label, provenance
from npmerge.store.records import Cell, Records
from npmerge.store.zoo import BaseModel, Zoo

log = logging.getLogger(__name__)

P = TypeVar("P", bound=Executor)


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
    cluster: str | None = None,
    scheduler: str | None = None,
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
        device: ``"cpu"``, ``"cuda"``, ...; ``"auto"`` takes a GPU if there is one where the cells are done.
        results: folder of the record files.
        zoo: folder of the base models and of what cells share.
        models: folder of published base models, which are looked for first and only read; it need not exist.
        recompute: make every record again; base models are kept.
        deterministic: use deterministic kernels; see :func:`npmerge.device.kernels`.
        workers: processes that do cells side by side; by default as many as the cores allow with the profile's threads
            on a CPU, and one on a GPU; a cluster has as many as it has.
        cluster: do the cells on a Dask cluster of our own, see :class:`npmerge.run.cluster.Cluster`.
        scheduler: do them on the Dask cluster of the scheduler with this address, e.g. ``"tcp://10.0.0.1:8786"``. Its
            workers need not see the folders.
        dry_run: rehearse every cell with the same networks and batches but one epoch of two of them, and keep nothing.
        time_budget: seconds; begin nothing that, as far as records tell, would not end before they are over.
        progress: show progress bars on stderr.

    Returns:
        The record files, one a cell that has been run, seed by seed; none of a dry run.

    Raises:
        ValueError: an unknown name, a seed given twice, a pattern that matches nothing, a number that is not above 0,
            or a device or a kind of cluster that is not there.
        DataError: a data set that a cell needs is not there.
        OSError: a folder cannot be written.
        CellsFailedError: some cells failed.
        ClusterError: the cluster is gone, or not fit for this.
    """
    check_cluster(cluster, scheduler, workers)
    for name, value in (("time_budget", time_budget), ("workers", workers)):
        if value is not None and not value > 0:
            raise ValueError(f"{name} is {value:g}: give more than 0")
    deadline = None if time_budget is None else time.monotonic() + time_budget
    todo = in_order(
        matching(cells(experiment, profile, seeds), pattern), seeds, load_profile(profile).first
    )
    connect = None
    if cluster is None and scheduler is None:
        pick_device(device)
    else:
        connect = partial(Cluster, cluster, scheduler, on_gpu=device != "cpu")
    begin = partial(
        _Run, device=device, deterministic=deterministic, workers=workers, deadline=deadline,
        progress=progress, connect=connect,
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
    durations = _durations(records, profile, device_label(where))
    own = partial(places.path, device=where)
    found = []
    for name in dict.fromkeys(cell.experiment for cell in todo):
        mine = [cell for cell in todo if cell.experiment == name]
        states = {cell.label: records.state(cell) for cell in mine}
        notes = {c.label: records.failure(c) for c in mine if states[c.label] == "failed"}
        failed = {label: note.reason for label, note in notes.items() if note is not None}
        rest = [cell for cell in mine if states[cell.label] != "done"]
        seconds = _schedule(rest, places, own, durations).expected()
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
        device: str,
        deterministic: bool,
        workers: int | None,
        deadline: float | None,
        progress: bool,
        connect: Callable[[], Cluster] | None,
        again: bool = False,
    ) -> None:
        self._todo, self._records, self._zoo, self._again = todo, records, zoo, again
        self._device, self._deterministic, self._workers = device, deterministic, workers
        self._deadline, self._progress, self._connect = deadline, progress, connect
        self._pool: Here | Processes | Cluster
        self._job: Callable[..., Any]
        self._failed: dict[str, str] = {}
        self._locks: dict[str, ExitStack] = {}

    def finish(self) -> list[Cell]:
        """Do all; returns what did not fit into the time."""
        if not self._todo:
            return []
        with ExitStack() as stack:
            self._prepare(stack)
            with tqdm(total=len(self._todo), unit="cell", disable=not self._progress) as bar:
                self._go(bar)
        if self._failed:
            raise CellsFailedError(self._failed)
        return self._plan.left

    def _prepare(self, stack: ExitStack) -> None:
        """Look around where the cells will be done, and plan."""
        profile = load_profile(self._todo[0].profile)
        settings = [cell.config["setting"] for cell in self._todo]
        bases = list(dict.fromkeys(base for cell in self._todo for base in needed(cell)))
        look_around = partial(look, self._device, settings, bases)
        if self._connect is None:
            self._site = look_around()
            where = pick_device(self._device)
            count = _workers(self._workers, len(self._todo), where, profile.threads)
            self._pool = stack.enter_context(_ending(executor(count)))
            alone = self._progress and count == 1
            self._job = self._doing(profile, self._records, self._zoo, progress=alone)
        else:
            self._pool = cluster = stack.enter_context(_ending(self._connect()))
            marks = marked(stack, [self._records.folder, self._zoo.folder])
            self._site = cluster.result(look_around, marks)
            self._site.check_source()
            published = [folder.absolute() for folder in self._zoo.published]
            zoo = Zoo(self._zoo.folder.absolute(), published)
            do = self._doing(profile, Records(self._records.folder.absolute()), zoo)
            self._job = (
                partial(do_there, do, self._device, self._site, marks)
                if self._site.shared
                else partial(do_apart, do, self._device, self._site)
            )
        self._plan = _schedule(
            self._todo, self._zoo, self._own,
            _durations(self._records, profile.name, self._site.device),
            deadline=self._deadline, records=self._records,
        )  # fmt: skip

    def _doing(
        self, profile: Profile, records: Records, zoo: Zoo, *, progress: bool = False
    ) -> Callable[[Task], float]:
        return partial(
            _do, records=records, zoo=zoo, device=self._device, threads_=profile.threads,
            deterministic=self._deterministic, source=self._site.revision, again=self._again,
            progress=progress,
        )  # fmt: skip

    def _go(self, bar: tqdm[Any]) -> None:
        running: dict[Future[Any], Task] = {}
        while True:
            while len(running) < self._pool.slots and (task := self._plan.next()):
                running[self._begun(task)] = task
            if not running:
                break
            for future in wait(running, POLL, return_when=FIRST_COMPLETED).done:
                bar.update(self._ended(running.pop(future), future))

    def _own(self, base: BaseModel) -> Path:
        """The file of a base model that is trained where the cells are done."""
        return self._zoo.folder / self._site.names[base]

    def _begun(self, task: Task) -> Future[Any]:
        if self._site.shared:
            return self._pool.submit(self._job, task)
        place = self._own(task.base) if isinstance(task, Training) else self._records.path(task)
        lock = self._locks[task.label] = ExitStack()
        lock.enter_context(locked(place, wait=False))  # the worker's own says nothing here
        files = packed(task, self._site, self._records, self._zoo)
        return self._pool.submit(self._job, task, files)

    def _ended(self, task: Task, future: Future[Any]) -> int:
        """Take note of a task that has ended; returns how many cells are over."""
        with self._locks.pop(task.label, ExitStack()):
            error = future.exception()
            if error is None:
                self._plan.done(task, self._received(future.result()))
                return isinstance(task, Cell)
            if not isinstance(error, Exception) or isinstance(error, ClusterError):
                raise error
            self._plan.done(task, None)
            reason = _reason(error)
            lost = [task] if isinstance(task, Cell) else self._plan.drop(task.base)
            if isinstance(task, Training):
                reason = f"{task.label} could not be trained: {reason}"
            for cell in lost:
                log.warning("%s failed: %s", cell.label, reason)
                self._records.fail(cell, reason)
                self._failed[cell.label] = reason
            return len(lost)

    def _received(self, result: Any) -> float:
        """The seconds of a task, whose files are put where they belong if they came with them."""
        if self._site.shared:
            seconds: float = result
            return seconds
        seconds, made = result
        unpack(made, {"results": self._records.folder, "zoo": self._zoo.folder})
        return seconds


@contextmanager
def _ending(pool: P) -> Iterator[P]:
    """A pool that ends what it is at when all went well, and gives it up otherwise."""
    try:
        yield pool
    except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        raise
    pool.shutdown()


def _do(
    task: Task,
    *,
    records: Records,
    zoo: Zoo,
    device: str,
    progress: bool,
    threads_: int,
    deterministic: bool,
    source: str,
    again: bool,
) -> float:
    """Do a task, and return its seconds."""
    bench = Bench.at(zoo, pick_device(device), progress=progress)
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
    if isinstance(error, BrokenExecutor):
        return str(error)
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0]}" if text else type(error).__name__


def _durations(records: Records, profile: str, device: str) -> Durations:
    whole = (record for name in EXPERIMENTS for record in records.whole(profile, name))
    return Durations(whole, device)


def _schedule(
    todo: Sequence[Cell],
    zoo: Zoo,
    own: Callable[[BaseModel], Path],
    durations: Durations,
    *,
    deadline: float | None = None,
    records: Records | None = None,
) -> Schedule:
    def busy(task: Task) -> bool:
        if isinstance(task, Training):
            return is_locked(own(task.base))
        return records is not None and records.state(task) == "running"

    return Schedule(
        todo,
        bases=base_models,
        there=lambda base: any(path.exists() for path in zoo.places(base, own(base))),
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


def _shortened(config: dict[str, Any]) -> dict[str, Any]:
    """A configuration that exercises every line of a cell in little time."""
    short = copy.deepcopy(config)
    short["setting"]["recipe"]["epochs"] = 1
    if "trunk" in short["setting"]:
        short["setting"]["trunk"] = min(short["setting"]["trunk"], 1)
    sizes = [short["setting"]["recipe"]["batch_size"], short["data"]["batch_size"]]
    classes = DATASETS[short["setting"]["dataset"]].classes  # of each, some must be there
    enough = 3 * classes * short["setting"].get("apart", 0)
    short["setting"]["images"] = max(2 * max(sizes), enough)
    for one in (short, short.get("rounds", {})):
        if "epochs" in one:
            one["epochs"] = 1
    for step in ("align", "aggregate"):
        options = (short.get(step) or {}).get("options", {})
        for one in [options, *(v["trial"] for v in options.values() if isinstance(v, dict))]:
            if "epochs" in one:
                one["epochs"] = 1
    if "path" in short.get("measures", {}):
        short["measures"]["path"] = 2
    return short
