"""The paper's experiments, one module a section; each is a list of independent units."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import torch
from tqdm.auto import tqdm

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
    where = pick_device(device)
    records, models, source = Results(results), Zoo(zoo), revision()
    for unit in tqdm(todo, desc=experiment, unit="unit", disable=not progress):
        if not recompute and records.finished(unit):
            continue
        log.info("running %s on %s", unit.name, where)
        if where.type == "cuda":
            torch.cuda.reset_peak_memory_stats(where)
        start = time.perf_counter()
        outcome = EXPERIMENTS[experiment].run(unit, zoo=models, device=where, progress=progress)
        records.write(unit, outcome, provenance(where, time.perf_counter() - start, source))
    return [records.path(unit) for unit in todo]


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
