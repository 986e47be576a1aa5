"""Section IV-D, Table IV: how many labelled images the merging needs."""

from __future__ import annotations

from collections.abc import Sequence

from npmerge.experiments import merging
from npmerge.experiments.merging import LEARNED, Machine, Merging, base_models
from npmerge.experiments.profile import Profile
from npmerge.results import Outcome, Unit
from npmerge.zoo import Zoo

__all__ = ["NAME", "base_models", "run", "units"]

NAME = "data_size"
TABLE = "IV"
ALL = "all"
"""What a record says for the whole training set, as the paper's table does."""


def units(profile: Profile, seeds: Sequence[int]) -> list[Unit]:
    """The units of the experiment: every setting with every seed and every number of images a class.

    Args:
        profile: its parameters.
        seeds: of the split and of the pair of base models, which are those of the disjoint splits.
    """
    section = profile.data_size
    return [
        merging.unit(
            profile.name, NAME, setting, section.optimisation, seed,
            suffix=f"-{examples}", examples_per_class=examples,
        )
        for setting in section.settings
        for seed in seeds
        for examples in section.examples_per_class
    ]  # fmt: skip


def run(unit: Unit, *, zoo: Zoo, machine: Machine) -> Outcome:
    """Run one unit: align, reset batch norm, learn and tune with so many images a class and no others.

    Args:
        unit: from :func:`units`.
        zoo: where the base models are.
        machine: where to run.
    """
    examples = unit.config["examples_per_class"]
    pair = Merging.of(unit, zoo, machine, table=TABLE, examples=examples)
    pair.score_parents()
    aligned = pair.align(LEARNED)
    pair.average(aligned)
    pair.learn(aligned)
    pair.tune(aligned)
    return pair.outcome()
