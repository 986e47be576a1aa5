"""The paper's experiments, one module a section; each is a list of independent cells."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path

from npmerge.catalogue import chosen_experiments
from npmerge.checks import check_seeds
from npmerge.experiments.listing import Experiment
from npmerge.experiments.profile import Profile, Setting, load_profile, load_profiles
from npmerge.store.records import Cell

__all__ = [
    "EXPERIMENTS",
    "Experiment",
    "Profile",
    "cells",
    "load_profile",
    "load_profiles",
    "setting_of",
]


def _written() -> dict[str, Experiment]:
    files = sorted(Path(__file__).parent.glob("[!_]*.py"))
    modules = [importlib.import_module(f"{__name__}.{file.stem}") for file in files]
    found = [module.EXPERIMENT for module in modules if hasattr(module, "EXPERIMENT")]
    return {one.name: one for one in sorted(found, key=lambda one: one.place)}


EXPERIMENTS = _written()
"""The experiments by name, in the paper's order: one for every module of this package that has an ``EXPERIMENT``."""


def cells(experiment: str | Sequence[str], profile: str, seeds: Sequence[int]) -> list[Cell]:
    """The cells of an experiment, or of several, one experiment after the other.

    Args:
        experiment: its name, e.g. ``"same_data"``; see :func:`npmerge.catalogue.chosen_experiments`.
        profile: name of the parameter set.
        seeds: each at most once.

    Raises:
        ValueError: an unknown experiment or profile, no seed, a negative seed, or one given twice.
    """
    chosen = chosen_experiments(experiment)
    check_seeds(seeds)
    parameters = load_profile(profile)
    unknown = [name for name in parameters.sections if name not in EXPERIMENTS]
    if unknown:
        raise ValueError(
            f"profile {profile!r}, {unknown[0]}: there is no such experiment; choose from {', '.join(EXPERIMENTS)}"
        )
    return [cell for name in chosen for cell in EXPERIMENTS[name].list(parameters, seeds)]


def setting_of(profile: str, experiment: str, setting: str) -> Setting:
    """The setting that a record names, with what is only for presentation.

    Args:
        profile: name of the parameter set.
        experiment: the experiment's name.
        setting: the setting's, e.g. ``"cifar100-resnet20x1"``.

    Raises:
        ValueError: the profile has no such setting today.
    """
    section = EXPERIMENTS[experiment].parameters(load_profile(profile))
    for one in section.settings if section else ():
        if one.name == setting:
            return one
    raise ValueError(f"profile {profile!r} has no setting {setting!r} in {experiment}")
