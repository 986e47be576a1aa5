"""What alpha learns: how many coefficients it takes, and what those of NP Merge go with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from npmerge.experiments.listing import Experiment, setting_cells
from npmerge.experiments.profile import Methods, Profile, Section
from npmerge.store.records import Cell, Outcome

METHODS = (Methods(align=("permute",), aggregate=("mean", "fisher", "finetune", "np_merge")),)
SOUPS = (Methods(align=("permute",), aggregate=("learned_soup",)),)
VARIANTS: dict[str, dict[str, Any]] = {
    "model": {"level": "model"},
    "layer": {"level": "layer"},
    "tensor": {"level": "tensor"},
    "channel": {"level": "channel"},
    "unbounded": {"level": "parameter", "bounded": False},
    "fisher": {"level": "parameter", "start": "fisher"},
}
"""Soups that differ from NP Merge in one thing each: what shares a coefficient, the sigmoid, the start."""


def list_cells(profile: Profile, section: Section, seeds: Sequence[int]) -> list[Cell]:
    """The references and NP Merge in every setting, and the variants in the first one, with every seed.

    Args:
        profile: its parameters.
        section: those of the experiment; what NP Merge is given, the variants are given too.
        seeds: one pair of base models each.
    """
    optimisation = section.optimisation
    given = optimisation.options.get("np_merge", {})

    def soups(variant: dict[str, Any]) -> Section:
        options = optimisation.options | {"learned_soup": given | variant}
        return section.model_copy(
            update={"optimisation": optimisation.model_copy(update={"options": options})}
        )

    cells = []
    for number, setting in enumerate(section.settings):
        for seed in seeds:
            cells += setting_cells(
                profile, "coefficients", section, setting, seed, methods=METHODS, examples="all",
                classes=setting.split is not None,
            )  # fmt: skip
            for name, variant in VARIANTS.items() if number == 0 else ():
                cells += setting_cells(
                    profile, "coefficients", soups(variant), setting, seed, methods=SOUPS,
                    examples="all", prefix=f"{name}-", references=(),
                )  # fmt: skip
    return cells


def do_cell(cell: Cell, bench: Any) -> Outcome:
    """Merge, score, and say what alpha goes with; see :mod:`npmerge.run.explaining`."""
    from npmerge.run.explaining import explain_cell  # only who merges waits for PyTorch

    return explain_cell(cell, bench)


_DIGITS: dict[str, Any] = {
    "dataset": "digits", "image_size": 8, "model": "resnet20", "width": 0.5,
}  # fmt: skip
_GRID: dict[str, Any] = {
    "dataset": "cifar100", "image_size": 8, "model": "resnet20", "width": 0.5,
    "recipe": {"epochs": 4, "batch_size": 250, "lr": 0.3, "warmup_epochs": 1},
}  # fmt: skip
_SAME = {**_DIGITS, "recipe": {"epochs": 8, "batch_size": 100, "lr": 0.2, "warmup_epochs": 2}}
_80_20 = {
    **_DIGITS, "recipe": {"epochs": 10, "batch_size": 100, "lr": 0.2, "warmup_epochs": 2},
    "split": "80-20",
}  # fmt: skip


def _given(batch_size: int, epochs: int, examples: int) -> dict[str, Any]:
    learning = {"epochs": epochs, "lr": 1e-2}
    return {
        "batch_size": batch_size,
        "options": {"np_merge": learning, "finetune": learning, "fisher": {"examples": examples}},
    }


DEFAULTS = {
    "digits": {"settings": [_SAME, _80_20], "optimisation": _given(25, 3, 250), "seeds": 1},
    "grid": {
        "settings": [_GRID, {**_GRID, "split": "80-20"}],
        "optimisation": _given(100, 2, 1000),
    },
}
"""A demonstration, on the base models of other chapters; and the reference setting of the comparison."""

EXPERIMENT = Experiment(
    "coefficients",
    "What alpha learns",
    "ours",
    list_cells,
    defaults=DEFAULTS,
    work=do_cell,
    place=9,
)
