"""The zoo: every method of the registry that needs no common base, on the same pairs and the same data."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pydantic import Field

from npmerge.experiments.listing import RESET, Experiment, setting_cells
from npmerge.experiments.profile import Methods, Profile, Section
from npmerge.experiments.transformers import HEADS
from npmerge.methods import METHODS, of_kind
from npmerge.store.records import Cell

FIRST = "permute"
"""The alignment before aggregations that have none of their own, and before corrections."""
COMBINED = (
    Methods(align=("cca", "ot"), aggregate=("np_merge",)),
    Methods(align=(FIRST,), aggregate=("np_merge",), correct="repair"),
)
"""What nobody has reported: NP Merge after other alignments, and before another correction."""


class Zoo(Section):
    """All methods.

    Attributes:
        epochs: passes over the optimisation data of every method that learns.
    """

    epochs: int = Field(gt=0)


def every_method() -> tuple[Methods, ...]:
    """Each alignment before the mean, each aggregation, each correction of the mean, and :data:`COMBINED`."""
    aligns = tuple(name for name in of_kind("align") if name == FIRST or name not in HEADS)
    aggregates = [one for one in of_kind("aggregate").values() if "base" not in one.needs]
    return (
        Methods(align=aligns, aggregate=("mean",)),
        *(
            Methods(align=(one.default_alignment,), aggregate=(one.name,))
            for one in aggregates
            if one.name != "mean"
        ),
        *(
            Methods(align=(FIRST,), aggregate=("mean",), correct=name)
            for name in of_kind("correct")
            if name != RESET
        ),
        *COMBINED,
    )


def list_cells(profile: Profile, section: Zoo, seeds: Sequence[int]) -> list[Cell]:
    """Every setting with every seed and every method; what each takes is counted with the first seed.

    Args:
        profile: its parameters.
        section: those of the experiment.
        seeds: one pair of base models each.
    """
    optimisation = section.optimisation
    learning = {
        name: {"epochs": section.epochs} for name, one in METHODS.items() if "epochs" in one.options
    }
    options = {
        name: learning.get(name, {}) | optimisation.options.get(name, {})
        for name in {**learning, **optimisation.options}
    }
    given = section.model_copy(
        update={"optimisation": optimisation.model_copy(update={"options": options})}
    )
    return [
        cell
        for setting in section.settings
        for seed in seeds
        for cell in setting_cells(
            profile, "zoo", given, setting, seed, methods=every_method(), examples="all",
            effort=seed == seeds[0],
        )
    ]  # fmt: skip


_DIGITS: dict[str, Any] = {
    "dataset": "digits", "image_size": 8, "model": "resnet20", "width": 0.5,
    "recipe": {"epochs": 10, "batch_size": 100, "lr": 0.2, "warmup_epochs": 2},
}  # fmt: skip
_VGG: dict[str, Any] = {
    "dataset": "digits", "image_size": 8, "model": "vgg11", "width": 0.125,
    "recipe": {"epochs": 10, "batch_size": 100, "lr": 0.03, "warmup_epochs": 2},
}  # fmt: skip
_GRID: dict[str, Any] = {
    "dataset": "cifar100", "image_size": 8, "model": "resnet20", "width": 0.5,
    "recipe": {"epochs": 4, "batch_size": 250, "lr": 0.3, "warmup_epochs": 1},
}  # fmt: skip
_CHOSEN: dict[str, Any] = {"cca": {"ridge": 10.0}}
_LR = {"lr": {"choose": [1e-3, 3e-3, 1e-2, 3e-2, 1e-1], "trial": {"epochs": 1}}}
DEFAULTS = {
    "digits": {
        "settings": [_VGG],
        "optimisation": {"batch_size": 50, "options": _CHOSEN, "path_points": 3},
        "epochs": 2,
        "seeds": 1,
    },
    "grid": {
        "settings": [_GRID, {**_GRID, "split": "dirichlet"}],
        "optimisation": {
            "batch_size": 100,
            "options": _CHOSEN,
            "tuned": {"np_merge": _LR, "finetune": _LR},
        },
        "epochs": 2,
    },
}
"""A demonstration on the base models of other chapters, and the reference setting of the comparison with seeds."""

EXPERIMENT = Experiment(
    "zoo", "The zoo", "ours", list_cells, section=Zoo, defaults=DEFAULTS, place=10
)
