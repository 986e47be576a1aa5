"""The paper's experiments, one module a section; each is a list of independent units."""

from __future__ import annotations

import copy
import logging
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Protocol

import torch
from tqdm import tqdm

from npmerge.device import free_memory, kernels, models_at_once, pick_device
from npmerge.experiments import same_data
from npmerge.experiments.profile import NAMES as PROFILES
from npmerge.experiments.profile import Profile, Setting, load_profile
from npmerge.results import Outcome, Results, Unit, provenance, revision
from npmerge.zoo import BaseModel, Zoo

log = logging.getLogger(__name__)

__all__ = ["EXPERIMENTS", "PROFILES", "Profile", "load_profile", "pick_device", "run", "units"]


class Experiment(Protocol):
    """What a module of this package has."""

    def units(self, profile: Profile, seeds: Sequence[int]) -> list[Unit]:
        """List the units."""

    def base_models(self, unit: Unit) -> list[BaseModel]:
        """The base models that a unit needs."""

    def run(
        self, unit: Unit, *, zoo: Zoo, device: torch.device, at_once: int | None, progress: bool
    ) -> Outcome:
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
    deterministic: bool = False,
    at_once: int | None = None,
    dry_run: bool = False,
    progress: bool = False,
) -> list[Path]:
    """Run the units of an experiment that have no record yet.

    Where several models are trained at once (on CUDA), those that all the units miss are trained first, together. On
    a CPU a profile that fixes the threads of a unit has its units run side by side, as many as the cores allow. The
    numbers are the same but for rounding.

    Args:
        experiment: its name, e.g. ``"same_data"``.
        profile: name of the parameter set.
        seeds: each at most once.
        device: ``"cpu"``, ``"cuda"``, ...; ``"auto"`` takes a GPU if there is one.
        results: folder of the record files.
        zoo: folder of the base models.
        recompute: make every record again; base models are kept.
        deterministic: use deterministic kernels; see :func:`npmerge.device.kernels`.
        at_once: models to train at the same time; by default one on a CPU and 16 on CUDA.
        dry_run: rehearse every unit with the same networks and batches but one epoch of two of them, and keep nothing.
        progress: show progress bars on stderr.

    Returns:
        The record files, one a unit; none of a dry run.

    Raises:
        ValueError: an unknown name, a seed given twice, or a device that is not there.
    """
    todo = units(experiment, profile, seeds)
    work = partial(
        _run_units, device=pick_device(device), threads=load_profile(profile).threads,
        deterministic=deterministic, at_once=at_once, progress=progress,
    )  # fmt: skip
    if dry_run:
        with TemporaryDirectory(prefix="npmerge-") as folder:
            short = [replace(unit, config=_shortened(unit.config)) for unit in todo]
            work(short, results=Results(Path(folder) / "results"), zoo=Zoo(Path(folder) / "zoo"))
        return []
    records = Results(results)
    missing = [unit for unit in todo if recompute or not records.finished(unit)]
    work(missing, results=records, zoo=Zoo(zoo))
    return [records.path(unit) for unit in todo]


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
    progress: bool,
) -> None:
    workers = min(len(units), (os.cpu_count() or 1) // threads) if threads else 1
    one = partial(
        _run_unit, results=results, zoo=zoo, device=device, source=revision(), threads=threads,
        deterministic=deterministic, at_once=at_once,
    )  # fmt: skip
    if (models_at_once(device) if at_once is None else at_once) > 1:
        with kernels(deterministic=deterministic):
            _train_together(units, zoo, device, at_once, progress=progress)
    with tqdm(total=len(units), unit="unit", disable=not progress) as bar:
        if workers < 2 or device.type != "cpu":
            for unit in units:
                one(unit, progress=progress)
                bar.update()
        else:
            _side_by_side(partial(one, progress=False), units, workers, bar.update)


def _train_together(
    units: Sequence[Unit], zoo: Zoo, device: torch.device, at_once: int | None, *, progress: bool
) -> None:
    """Train what base models the units miss, those of all seeds together."""
    alike: dict[Setting, dict[str, BaseModel]] = {}
    for unit in units:
        group = alike.setdefault(Setting(**unit.config["setting"]), {})
        group |= {base.address: base for base in EXPERIMENTS[unit.experiment].base_models(unit)}
    for setting, bases in alike.items():
        label = f"base models of {setting.name}" if progress else None
        zoo.get_all(
            list(bases.values()), setting.load(), device=device, at_once=at_once, progress=label
        )


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
    deterministic: bool,
    at_once: int | None,
    progress: bool,
) -> None:
    log.info("running %s on %s", unit.name, device)
    before = torch.get_num_threads()
    if threads:
        torch.set_num_threads(threads)
    free_memory(device)
    start = time.perf_counter()
    try:
        with kernels(deterministic=deterministic):
            outcome = EXPERIMENTS[unit.experiment].run(
                unit, zoo=zoo, device=device, at_once=at_once, progress=progress
            )
        origin = provenance(device, time.perf_counter() - start, source)
        results.write(unit, outcome, origin | {"deterministic": deterministic})
    finally:
        torch.set_num_threads(before)
