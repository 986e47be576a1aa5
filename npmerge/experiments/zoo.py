"""The zoo: every method of the registry that needs no common base, on the same pairs and the same data."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

from pydantic import Field

from npmerge.experiments.listing import RESET, Experiment, setting_cells
from npmerge.experiments.profile import Choose, Methods, Profile, Section
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
        lr: learning rates, of which every aggregation that has one chooses on held-out images; its own default if none
            are named.
        trial: passes of a trial.
        without: methods that take too long.
    """

    epochs: int = Field(gt=0)
    lr: tuple[Annotated[float, Field(gt=0)], ...] = ()
    trial: int = Field(2, gt=0)
    without: tuple[str, ...] = ()


def every_method(without: Sequence[str] = ()) -> tuple[Methods, ...]:
    """Each alignment before the mean, each aggregation, each correction of the mean, and :data:`COMBINED`.

    Args:
        without: names that are left out.
    """
    left_out = {*without, *HEADS} - {FIRST}
    aligns = tuple(name for name in of_kind("align") if name not in left_out)
    aggregates = [
        one
        for one in of_kind("aggregate").values()
        if "base" not in one.needs and one.name not in left_out
    ]
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

    A demonstration does not count it.

    Args:
        profile: its parameters.
        section: those of the experiment.
        seeds: one pair of base models each.
    """
    optimisation = section.optimisation
    options = learners(section.epochs, section.lr, section.trial)
    for name, given in optimisation.options.items():
        options[name] = options.get(name, {}) | given
    whole = section.model_copy(
        update={"optimisation": optimisation.model_copy(update={"options": options})}
    )
    return [
        cell
        for setting in section.settings
        for seed in seeds
        for cell in setting_cells(
            profile, "zoo", whole, setting, seed, examples="all",
            methods=every_method(section.without),
            effort=seed == seeds[0] and not profile.demonstration,
        )
    ]  # fmt: skip


def learners(epochs: int, lr: Sequence[float], trial: int) -> dict[str, dict[str, Any]]:
    """The options of every method that learns, alike for all.

    Args:
        epochs: passes over the data.
        lr: learning rates to choose from, of aggregations; their own default if there are none.
        trial: passes of a trial.
    """
    chosen = {"lr": Choose(choose=tuple(lr), trial={"epochs": trial})} if lr else {}
    return {
        name: {"epochs": epochs} | (chosen if one.kind == "aggregate" else {})
        for name, one in METHODS.items()
        if "epochs" in one.options
    }


_DIGITS: dict[str, Any] = {
    "dataset": "digits", "image_size": 8, "model": "resnet20", "width": 0.5, "split": "dirichlet",
    "recipe": {"epochs": 10, "batch_size": 100, "lr": 0.2, "warmup_epochs": 2},
}  # fmt: skip
_VGG: dict[str, Any] = {
    "dataset": "digits", "image_size": 8, "model": "vgg11", "width": 0.125,
    "recipe": {"epochs": 10, "batch_size": 100, "lr": 0.03, "warmup_epochs": 2},
}  # fmt: skip
_CHOSEN: dict[str, Any] = {"cca": {"ridge": 10.0}}
DEFAULTS = {
    "digits": {
        "settings": [_VGG],
        "optimisation": {
            "batch_size": 50,
            "options": {**_CHOSEN, "fisher": {"examples": 250}},
            "path_points": 3,
        },
        "epochs": 2,
        "without": ["auto_neb", "np_from_fisher", "np_from_interpolation", "np_from_pleas"],
        "seeds": 1,
    },
    "grid": {
        "settings": [_VGG, _DIGITS],
        "optimisation": {
            "batch_size": 50,
            "options": {"cca": {"ridge": {"choose": [1e-2, 1e-1, 1.0, 10.0, 1e2, 1e3]}}},
        },
        "epochs": 10,
        "lr": [1e-3, 1e-2, 1e-1],
    },
}
"""A demonstration on the base models of another chapter, and one for a verdict."""

EXPERIMENT = Experiment(
    "zoo", "The zoo", "ours", list_cells, section=Zoo, defaults=DEFAULTS, place=10
)
