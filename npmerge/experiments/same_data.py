"""Section IV-B, Table I: two models trained on the same data from different initial weights."""

from __future__ import annotations

from collections.abc import Sequence

from npmerge.experiments import merging
from npmerge.experiments.merging import Machine, Merging, base_models
from npmerge.experiments.profile import Profile
from npmerge.results import Outcome, Unit
from npmerge.zoo import Zoo

__all__ = ["NAME", "base_models", "run", "units"]

NAME = "same_data"
TABLE = "I"


def units(profile: Profile, seeds: Sequence[int]) -> list[Unit]:
    """The units of the experiment: every setting with every seed.

    Args:
        profile: its parameters.
        seeds: one pair of base models each.
    """
    return merging.units(profile.name, NAME, profile.same_data, seeds)


def run(unit: Unit, *, zoo: Zoo, machine: Machine) -> Outcome:
    """Run one unit: train or load the pair, merge it by every method of Table I, score on the full test set.

    Args:
        unit: from :func:`units`.
        zoo: where the base models are.
        machine: where to run.
    """
    pair = Merging.of(unit, zoo, machine, table=TABLE)
    pair.every_method()
    return pair.outcome()
