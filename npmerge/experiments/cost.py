"""Section IV-F: what NP Merge costs beside averaging and fine-tuning, and what it buys."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

from pydantic import Field

from npmerge.catalogue import SAMPLING
from npmerge.experiments.listing import Experiment
from npmerge.experiments.profile import Profile, Section, Setting
from npmerge.store.records import Cell, Outcome


class Cost(Section):
    """Section IV-F; the settings differ in their width.

    Attributes:
        epochs: of learning.
        lr: of Adam.
        counts: how many models are merged in tournaments, in the narrowest setting; each at least 2.
    """

    epochs: int = Field(10, gt=0)
    lr: float = Field(1e-2, gt=0)
    counts: tuple[Annotated[int, Field(ge=2)], ...]


def list_cells(profile: Profile, section: Cost, seeds: Sequence[int]) -> list[Cell]:
    """Every width with every seed, and tournaments of so many models of the narrowest.

    Args:
        profile: its parameters.
        section: those of the experiment.
        seeds: one pair of base models each.
    """
    narrowest = min(setting.width for setting in section.settings)

    def cell(setting: Setting, seed: int, name: str, **more: Any) -> Cell:
        config = {
            "setting": setting.config,
            "seed": seed,
            "models": 2,
            "threads": profile.threads,
            "precision": profile.precision,
            "data": {
                "batch_size": section.optimisation.batch_size,
                "held_out": section.optimisation.held_out,
                "examples_per_class": None,
                "sampling": SAMPLING,
                "correct_on": "augmented",
            },
            "align": {"method": "permute", "options": {}},
            "correct": "reset_batchnorm",
            "lr": section.lr,
            **more,
        }
        return Cell(profile.name, "cost", setting.name, seed, name, config)

    return [
        one
        for setting in section.settings
        for seed in seeds
        for one in [
            cell(setting, seed, "pair", epochs=section.epochs),
            *(
                cell(setting, seed, f"{count}-tournament", many="tournament", copies=count)
                for count in (section.counts if setting.width == narrowest else ())
            ),
        ]
    ]


def measure_costs(cell: Cell, bench: Any) -> Outcome:
    """Measure; see :mod:`npmerge.run.costs`."""
    from npmerge.run.costs import measure  # only who measures waits for PyTorch

    return measure(cell, bench)


EXPERIMENT = Experiment(
    "cost", "Cost", "cost", list_cells, section=Cost, work=measure_costs, alone=True, place=6
)
