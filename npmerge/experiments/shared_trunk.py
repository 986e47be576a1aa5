"""The shared trunk: models that were one for some epochs, and how that decides which methods can merge them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

from pydantic import Field

from npmerge.experiments.listing import Experiment, setting_cells
from npmerge.experiments.profile import Choose, Methods, Profile, Section
from npmerge.experiments.zoo import learners
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
        lr: learning rates that these choose from on held-out images; their own default if none are named.
        scale: what methods with a base multiply the sum of all changes with, chosen in the same way.
    """

    together: tuple[Annotated[int, Field(ge=0)], ...]
    epochs: int = Field(gt=0)
    lr: tuple[Annotated[float, Field(gt=0)], ...] = ()
    scale: tuple[float, ...] = ()


def list_cells(profile: Profile, section: SharedTrunk, seeds: Sequence[int]) -> list[Cell]:
    """Every number of common epochs, with every seed and every method.

    Args:
        profile: its parameters.
        section: those of the experiment.
        seeds: one pair of base models each.
    """
    needing = {name: one for name, one in of_kind("aggregate").items() if "base" in one.needs}
    bases = tuple(needing)
    optimisation = section.optimisation
    options = learners(section.epochs, section.lr, 2)
    if section.scale:
        scale = {"scale": Choose(choose=section.scale)}
        options |= {name: scale for name, one in needing.items() if "scale" in one.options}
    given = section.model_copy(
        update={
            "optimisation": optimisation.model_copy(
                update={"options": options | optimisation.options}
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
DEFAULTS = {
    "digits": {
        "settings": [_DIGITS],
        "optimisation": {"batch_size": 50, "options": {"fisher": {"examples": 250}}},
        "together": [4],
        "epochs": 2,
        "seeds": 1,
    },
    "grid": {
        "settings": [_DIGITS],
        "optimisation": {"batch_size": 50},
        "together": [0, 1, 2, 4, 6, 8],
        "epochs": 10,
        "lr": [1e-3, 1e-2, 1e-1],
        "scale": [0.3, 0.5, 0.8, 1.0, 1.2],
    },
}
"""A demonstration, and one with seeds."""

EXPERIMENT = Experiment(
    "shared_trunk", "A shared trunk", "ours", list_cells,
    section=SharedTrunk, defaults=DEFAULTS, place=11,
)  # fmt: skip
