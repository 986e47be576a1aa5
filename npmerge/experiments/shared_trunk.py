"""The shared trunk: models that were one for some epochs, and how that decides which methods can merge them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

from pydantic import Field

from npmerge.experiments.listing import Experiment, setting_cells
from npmerge.experiments.profile import Methods, Profile, Section
from npmerge.methods import of_kind
from npmerge.store.records import Cell

METHODS = (
    Methods(align=("identity", "permute"), aggregate=("mean", "np_merge")),
    Methods(align=("identity",), aggregate=("fisher", "regmean", "finetune", "ot_fusion", "zipit")),
)
"""What needs no base."""


class SharedTrunk(Section):
    """Models that are trained together, then each on its share.

    Attributes:
        together: for how many epochs, 0 and above; models with initial weights of their own come first.
        epochs: passes over the optimisation data of every method that learns.
    """

    together: tuple[Annotated[int, Field(ge=0)], ...]
    epochs: int = Field(gt=0)


def list_cells(profile: Profile, section: SharedTrunk, seeds: Sequence[int]) -> list[Cell]:
    """Every number of common epochs, with every seed and every method.

    Args:
        profile: its parameters.
        section: those of the experiment.
        seeds: one pair of base models each.
    """
    bases = tuple(name for name, one in of_kind("aggregate").items() if "base" in one.needs)
    optimisation = section.optimisation
    learning = {name: {"epochs": section.epochs} for name in ("np_merge", "finetune")}
    given = section.model_copy(
        update={
            "optimisation": optimisation.model_copy(
                update={"options": optimisation.options | learning}
            )
        }
    )
    return [
        cell
        for setting in section.settings
        for seed in seeds
        for trunk in (None, *section.together)
        for cell in setting_cells(
            profile, "shared_trunk", given, setting.model_copy(update={"trunk": trunk}), seed,
            methods=METHODS + (Methods(align=("identity",), aggregate=bases),) * (trunk is not None),
        )
    ]  # fmt: skip


_DIGITS: dict[str, Any] = {
    "dataset": "digits", "image_size": 8, "model": "resnet20", "width": 0.5, "split": "dirichlet",
    "recipe": {"epochs": 10, "batch_size": 100, "lr": 0.2, "warmup_epochs": 2},
}  # fmt: skip
_GRID: dict[str, Any] = {
    "dataset": "cifar100", "image_size": 8, "model": "resnet20", "width": 0.5, "split": "dirichlet",
    "recipe": {"epochs": 8, "batch_size": 250, "lr": 0.3, "warmup_epochs": 1},
}  # fmt: skip
DEFAULTS = {
    "digits": {
        "settings": [_DIGITS],
        "optimisation": {"batch_size": 50},
        "together": [2, 8],
        "epochs": 2,
        "seeds": 1,
    },
    "grid": {
        "settings": [_GRID],
        "optimisation": {"batch_size": 100},
        "together": [0, 1, 2, 4, 7],
        "epochs": 1,
    },
}
"""A demonstration, and one with seeds."""

EXPERIMENT = Experiment(
    "shared_trunk", "A shared trunk", "ours", list_cells,
    section=SharedTrunk, defaults=DEFAULTS, place=11,
)  # fmt: skip
