"""Section IV-C, Table II: two models trained on disjoint shares of the data."""

from __future__ import annotations

from collections.abc import Sequence

from npmerge.experiments.listing import PATHS, Experiment, setting_cells
from npmerge.experiments.profile import Profile, Section
from npmerge.store.records import Cell


def list_cells(profile: Profile, section: Section, seeds: Sequence[int]) -> list[Cell]:
    """Every split with every seed, merged by every method of Table II; with the accuracy on each class.

    Args:
        profile: its parameters.
        section: those of the experiment.
        seeds: of the split and of the pair of base models.
    """
    return [
        cell
        for setting in section.settings
        for seed in seeds
        for cell in setting_cells(
            profile, "disjoint_splits", section, setting, seed, paths=PATHS, classes=True
        )
    ]


EXPERIMENT = Experiment("disjoint_splits", "Disjoint splits", "II", list_cells, place=2)
