"""The notebooks' parameters, validated: an unknown name or a wrong value is an error in the first cell."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from types import ModuleType
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from npmerge.catalogue import profile_names
from npmerge.checks import check_seeds

PUBLISHED = "../results"
"""Folder of the records that come with the project, seen from the notebooks."""

_IPYTHON = {"In", "Out", "exit", "quit", "get_ipython", "open"}


class Parameters(BaseModel):
    """What papermill may set in a notebook.

    Attributes:
        profile: which parameter set to run.
        seeds: one pair of base models each; no seed twice, none below 0.
        device: ``"auto"``, ``"cpu"``, ``"cuda"``, ...
        recompute: make every record again.
        results: folder of the records that are made; by default that named by ``NPMERGE_RESULTS``, else the project's.
        zoo: folder of the base models; by default that named by ``NPMERGE_ZOO``, else the project's.
        models: folder of the published ones; by default that named by ``NPMERGE_MODELS``, else the project's.
        live: repeat a published merge at true size; only for the chapter that shows it, so no part of a dump.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, defer_build=True)

    profile: str = "digits"
    seeds: tuple[int, ...] = Field((0, 1, 2), min_length=1)
    device: str = "auto"
    recompute: bool = False
    results: str = Field(default_factory=lambda: os.environ.get("NPMERGE_RESULTS", PUBLISHED))
    zoo: str = Field(default_factory=lambda: os.environ.get("NPMERGE_ZOO", "../zoo"))
    models: str = Field(default_factory=lambda: os.environ.get("NPMERGE_MODELS", "../models"))
    live: bool = Field(default=False, exclude=True)

    @field_validator("profile")
    @classmethod
    def _known(cls, profile: str) -> str:
        if profile not in profile_names():
            raise ValueError(
                f"there is no such profile: choose one of {', '.join(profile_names())}"
            )
        return profile

    @field_validator("seeds")
    @classmethod
    def _each_once(cls, seeds: tuple[int, ...]) -> tuple[int, ...]:
        check_seeds(seeds)
        return seeds

    def profile_of(self, experiment: str) -> str:
        """The profile that an experiment is run at: its own, or the demonstration's where that has none of it."""
        from npmerge.experiments import EXPERIMENTS, load_profile

        has = EXPERIMENTS[experiment].parameters(load_profile(self.profile)) is not None
        return self.profile if has else Parameters().profile


def from_notebook(names: Mapping[str, Any], *experiments: str) -> Parameters:
    """Validate what a notebook's parameter cell, and papermill's behind it, have set.

    Args:
        names: the notebook's ``globals()``; a parameter that is None takes its default.
        experiments: those that the notebook runs. Where the profile has none of one, it runs the demonstration instead,
            with a warning: so a whole book can be made at any profile.

    Raises:
        ValueError: an unknown name or a wrong value; the message says which, and what is known.
    """
    found = {
        name: value
        for name, value in names.items()
        if not (
            name.startswith("_")
            or name in _IPYTHON
            or isinstance(value, ModuleType)
            or callable(value)
        )
    }
    unknown = sorted(found.keys() - Parameters.model_fields.keys())
    if unknown:
        raise ValueError(
            f"unknown parameter {unknown[0]!r}: choose from {', '.join(Parameters.model_fields)}"
        )
    given = validated({name: value for name, value in found.items() if value is not None})
    for name in experiments:
        profile = given.profile_of(name)
        if profile != given.profile:
            warnings.warn(
                f"profile {given.profile!r} has no {name!r}: {profile!r} is run instead",
                stacklevel=2,
            )
            return given.model_copy(update={"profile": profile})
    return given


def validated(values: Mapping[str, Any]) -> Parameters:
    """Parameters from their values.

    Args:
        values: by name.

    Raises:
        ValueError: a wrong value, in one line.
    """
    try:
        return Parameters(**values)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise ValueError(f"parameter {where} is {first['input']!r}: {first['msg']}") from None
