"""Section IV-C, Table III: two models trained on disjoint shares of ImageNet-200."""

from __future__ import annotations

from collections.abc import Sequence

from npmerge.experiments.listing import Experiment, setting_cells
from npmerge.experiments.profile import Profile, Section
from npmerge.store.records import Cell


def list_cells(profile: Profile, section: Section, seeds: Sequence[int]) -> list[Cell]:
    """Every setting with every seed, merged by every method of Table III.

    No paths are followed: each of their points would be a pass over ImageNet.

    Args:
        profile: its parameters.
        section: those of the experiment.
        seeds: of the split and of the pair of base models.
    """
    return [
        cell
        for setting in section.settings
        for seed in seeds
        for cell in setting_cells(profile, "imagenet", section, setting, seed)
    ]


EXPERIMENT = Experiment("imagenet", "ImageNet-200", "III", list_cells, place=3)
