"""When is NP Merge better than fine-tuning? A grid around one setting, at equal steps, equal data and equal tuning."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any

from pydantic import Field

from npmerge.experiments.listing import Experiment, setting_cells
from npmerge.experiments.profile import Methods, Profile, Section
from npmerge.methods import METHODS as KNOWN
from npmerge.store.records import Cell

METHODS = (Methods(align=("permute",), aggregate=("mean", "finetune", "np_merge")),)
REFERENCES = ("base_models", "ensemble")

_Count = Annotated[int, Field(gt=0)]


class Comparison(Section):
    """What is varied, one factor at a time; every aggregation that learns is given the same.

    Attributes:
        settings: the first is the reference, where all else is varied; the others differ from it in their width.
        optimisation: of the reference.
        images: by the number of optimisation images a class, the epochs that make as many steps as the reference's.
        epochs: other numbers of epochs, on all images.
        lr: other learning rates.
        seeds: take at most so many of the seeds given.
    """

    images: dict[_Count, _Count] = Field(default_factory=dict)
    epochs: tuple[_Count, ...] = ()
    lr: tuple[Annotated[float, Field(gt=0)], ...] = ()
    seeds: int | None = Field(None, gt=0)


@dataclass(frozen=True)
class Row:
    """A point of the grid: how it differs from the reference.

    Attributes:
        name: before the names of its cells; empty for the reference itself.
        options: of every aggregation that learns.
        examples: optimisation images a class.
    """

    name: str = ""
    options: dict[str, Any] | None = None
    examples: int | str = "all"


def rows(section: Comparison) -> list[Row]:
    """The rows of the reference setting, the reference first.

    Args:
        section: parameters of the experiment.
    """
    return [
        Row(),
        *(Row(f"images{n}-", {"epochs": e}, n) for n, e in section.images.items()),
        *(Row(f"epochs{epochs}-", {"epochs": epochs}) for epochs in section.epochs),
        *(Row(f"lr{lr:g}-", {"lr": lr}) for lr in section.lr),
    ]


def list_cells(profile: Profile, section: Comparison, seeds: Sequence[int]) -> list[Cell]:
    """Every row of the reference setting, and the other settings, with every seed.

    What the optimisation tunes is tuned in the reference alone.

    Args:
        profile: its parameters.
        section: those of the experiment.
        seeds: one pair of base models each.
    """
    reference, *others = section.settings
    plain = _varied(section, Row())
    points = [
        (reference, row, section if row == Row() else _varied(section, row))
        for row in rows(section)
    ]
    points += [(setting, Row(), plain) for setting in others]
    return [
        cell
        for setting, row, given in points
        for seed in seeds[: section.seeds]
        for cell in setting_cells(
            profile, "comparison", given, setting, seed, methods=METHODS, examples=row.examples,
            prefix=row.name, references=() if row.name else REFERENCES,
        )
    ]  # fmt: skip


def _varied(section: Comparison, row: Row) -> Comparison:
    """The section of a row: nothing tuned; without what the row does not change."""
    methods, optimisation = section.methods or METHODS, section.optimisation
    learning = {name for one in methods for name in one.aggregate if "lr" in KNOWN[name].options}
    given = {name: optimisation.options.get(name, {}) | (row.options or {}) for name in learning}
    if row.name and row.examples == "all":
        methods = tuple(
            replace(one, aggregate=tuple(name for name in one.aggregate if name in learning))
            for one in methods
        )
    options = optimisation.options | given
    return section.model_copy(
        update={
            "methods": methods,
            "optimisation": optimisation.model_copy(update={"options": options, "tuned": {}}),
        }
    )


EXPERIMENT = Experiment(
    "comparison", "NP Merge against fine-tuning", "ours", list_cells, section=Comparison, place=7
)
