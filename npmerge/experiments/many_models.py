"""Section IV-E, Figure 1: many models become one, in a tournament of pairs or all to one."""

from __future__ import annotations

from collections.abc import Sequence

from npmerge.experiments.listing import Experiment, setting_cells
from npmerge.experiments.profile import Methods, Profile, Section
from npmerge.store.records import Cell

METHODS = (
    Methods(align=("permute", "weight_matching", "cca"), aggregate=("mean",), many="all_to_one"),
    Methods(align=("weight_matching",), aggregate=("mean",), many="merge_many"),
    Methods(align=("weight_matching",), aggregate=("mean",), many="c2m3"),
    Methods(
        align=("permute", "weight_matching"), aggregate=("mean", "np_merge"), many="tournament"
    ),
    Methods(align=("permute",), aggregate=("finetune",), many="tournament"),
)


class ManyModels(Section):
    """Section IV-E.

    Attributes:
        counts: how many models to merge into one.
    """

    counts: tuple[int, ...]


def list_cells(profile: Profile, section: ManyModels, seeds: Sequence[int]) -> list[Cell]:
    """Every setting with every seed and every number of models.

    Args:
        profile: its parameters.
        section: those of the experiment.
        seeds: of the split, of the models and of the pairings.
    """
    return [
        cell
        for setting in section.settings
        for seed in seeds
        for count in sorted(section.counts, reverse=True)  # side by side, the longest begin first
        for cell in setting_cells(
            profile, "many_models", section, setting, seed,
            methods=METHODS, models=count, prefix=f"{count}-",
        )
    ]  # fmt: skip


EXPERIMENT = Experiment(
    "many_models", "Many models", "Figure 1", list_cells, section=ManyModels, place=5
)
