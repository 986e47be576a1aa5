"""Section IV-C, Table III: two models trained on disjoint shares of ImageNet-200."""

from __future__ import annotations

from collections.abc import Sequence

from npmerge.experiments import merging
from npmerge.experiments.merging import Machine, Merging, base_models
from npmerge.experiments.profile import Profile
from npmerge.results import Outcome, Unit
from npmerge.zoo import Zoo

__all__ = ["NAME", "base_models", "run", "units"]

NAME = "imagenet"
TABLE = "III"


def units(profile: Profile, seeds: Sequence[int]) -> list[Unit]:
    """The units of the experiment: every setting with every seed; none where the profile has no such section.

    Args:
        profile: its parameters.
        seeds: of the split and of the pair of base models.
    """
    section = profile.imagenet
    return [] if section is None else merging.units(profile.name, NAME, section, seeds)


def run(unit: Unit, *, zoo: Zoo, machine: Machine) -> Outcome:
    """Run one unit: the methods of Table III with top-1 and top-5 accuracy.

    Args:
        unit: from :func:`units`.
        zoo: where the base models are.
        machine: where to run.
    """
    pair = Merging.of(unit, zoo, machine, table=TABLE)
    pair.every_method(paths=False)  # each of their points would be a pass over ImageNet
    return pair.outcome()
