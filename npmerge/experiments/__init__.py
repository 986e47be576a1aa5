"""The paper's experiments, one module a section; each is a list of independent units."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Protocol

import torch
from tqdm import tqdm

from npmerge.experiments import same_data
from npmerge.experiments.profile import NAMES as PROFILES
from npmerge.experiments.profile import Profile, load_profile
from npmerge.results import Outcome, Results, Unit, provenance, revision
from npmerge.zoo import Zoo

log = logging.getLogger(__name__)

__all__ = ["EXPERIMENTS", "PROFILES", "Profile", "load_profile", "pick_device", "run", "units"]


class Experiment(Protocol):
    """What a module of this package has."""

    def units(self, profile: Profile, seeds: Sequence[int]) -> list[Unit]:
        """List the units."""

    def run(self, unit: Unit, *, zoo: Zoo, device: torch.device, progress: bool) -> Outcome:
        """Run one unit."""


EXPERIMENTS: dict[str, Experiment] = {same_data.NAME: same_data}


def units(experiment: str, profile: str, seeds: Sequence[int]) -> list[Unit]:
    """The units of an experiment.

    Args:
        experiment: its name, e.g. ``"same_data"``.
        profile: name of the parameter set.
        seeds: each at most once.

    Raises:
        ValueError: an unknown experiment or profile, no seed, a negative seed, or one given twice.
    """
    if experiment not in EXPERIMENTS:
        raise ValueError(
            f"unknown experiment {experiment!r}: choose one of {', '.join(EXPERIMENTS)}"
        )
    twice = sorted({seed for seed in seeds if list(seeds).count(seed) > 1})
    if twice:
        raise ValueError(f"seed {twice[0]} is given twice: give each seed once")
    if not seeds or min(seeds) < 0:
        raise ValueError(f"seeds are {list(seeds)}: give at least one, none below 0")
    return EXPERIMENTS[experiment].units(load_profile(profile), seeds)


def run(
    experiment: str,
    *,
    profile: str = "digits",
    seeds: Sequence[int] = (0, 1, 2),
    device: str = "auto",
    results: Path | str = "results",
    zoo: Path | str = "zoo",
    recompute: bool = False,
    progress: bool = False,
) -> list[Path]:
    """Run the units of an experiment that have no record yet.

    A profile that fixes the CPU threads of a unit has its units run side by side, as many as the cores allow; the
    numbers are the same.

    Args:
        experiment: its name, e.g. ``"same_data"``.
        profile: name of the parameter set.
        seeds: each at most once.
        device: ``"cpu"``, ``"cuda"``, ...; ``"auto"`` takes a GPU if there is one.
        results: folder of the record files.
        zoo: folder of the base models.
        recompute: make every record again; base models are kept.
        progress: show progress bars on stderr.

    Returns:
        The record files, one a unit.

    Raises:
        ValueError: an unknown name, a seed given twice, or a device that is not there.
    """
    todo = units(experiment, profile, seeds)
    where, source, threads = pick_device(device), revision(), load_profile(profile).threads
    records = Results(results)
    missing = [unit for unit in todo if recompute or not records.finished(unit)]
    workers = min(len(missing), (os.cpu_count() or 1) // threads) if threads else 1
    one = partial(
        _run_unit, results=records, zoo=Zoo(zoo), device=where, source=source, threads=threads
    )
    with tqdm(
        total=len(todo),
        initial=len(todo) - len(missing),
        desc=experiment,
        unit="unit",
        disable=not progress,
    ) as bar:
        if workers < 2 or where.type != "cpu":
            for unit in missing:
                one(unit, progress=progress)
                bar.update()
        else:
            _side_by_side(partial(one, progress=False), missing, workers, bar.update)
    return [records.path(unit) for unit in todo]


def _side_by_side(
    one: Callable[[Unit], None], todo: Sequence[Unit], workers: int, done: Callable[[], object]
) -> None:
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        waiting = [pool.submit(one, unit) for unit in todo]
        try:
            for unit in as_completed(waiting):
                unit.result()
                done()
        except BaseException:  # what is running ends, what has not begun does not begin
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _run_unit(
    unit: Unit,
    *,
    results: Results,
    zoo: Zoo,
    device: torch.device,
    source: str,
    threads: int | None,
    progress: bool,
) -> None:
    log.info("running %s on %s", unit.name, device)
    before = torch.get_num_threads()
    if threads:
        torch.set_num_threads(threads)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    start = time.perf_counter()
    try:
        outcome = EXPERIMENTS[unit.experiment].run(unit, zoo=zoo, device=device, progress=progress)
        results.write(unit, outcome, provenance(device, time.perf_counter() - start, source))
    finally:
        torch.set_num_threads(before)


def pick_device(name: str) -> torch.device:
    """The device of a name.

    Args:
        name: ``"auto"`` takes CUDA if it is there, else the CPU.

    Raises:
        ValueError: no such device here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(
            f"device {name!r} is not here ({str(error).splitlines()[0]}): use 'auto' or 'cpu'"
        ) from error
    return device
