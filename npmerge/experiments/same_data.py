"""Section IV-B, Table I: two models trained on the same data from different initial weights."""

from __future__ import annotations

from collections.abc import Sequence

from npmerge.experiments.listing import PATHS, Experiment, setting_cells
from npmerge.experiments.profile import Profile, Section
from npmerge.store.records import Cell


def list_cells(profile: Profile, section: Section, seeds: Sequence[int]) -> list[Cell]:
    """Every setting with every seed, merged by every method of Table I.

    Args:
        profile: its parameters.
        section: those of the experiment.
        seeds: one pair of base models each.
    """
    return [
        cell
        for setting in section.settings
        for seed in seeds
        for cell in setting_cells(profile, "same_data", section, setting, seed, paths=PATHS)
    ]


EXPERIMENT = Experiment("same_data", "Same data", "I", list_cells, place=1)
