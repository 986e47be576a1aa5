"""Section IV-D, Table IV: how many labelled images the merging needs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from npmerge.experiments.listing import Experiment, setting_cells
from npmerge.experiments.profile import Methods, Profile, Section
from npmerge.store.records import Cell

METHODS = (
    Methods(align=("permute", "weight_matching"), aggregate=("mean", "finetune", "np_merge")),
)


class DataSize(Section):
    """Section IV-D.

    Attributes:
        examples_per_class: how many optimisation images a class; ``"all"`` for the whole training set.
    """

    examples_per_class: tuple[int | Literal["all"], ...]


def list_cells(profile: Profile, section: DataSize, seeds: Sequence[int]) -> list[Cell]:
    """Every setting with every seed and every number of images a class; the merging sees no others.

    Args:
        profile: its parameters.
        section: those of the experiment.
        seeds: of the split and of the pair of base models, which are those of the disjoint splits.
    """
    return [
        cell
        for setting in section.settings
        for seed in seeds
        for examples in section.examples_per_class
        for cell in setting_cells(
            profile, "data_size", section, setting, seed,
            methods=METHODS, examples=examples, prefix=f"{examples}-",
        )
    ]  # fmt: skip


EXPERIMENT = Experiment("data_size", "Data size", "IV", list_cells, section=DataSize, place=4)
