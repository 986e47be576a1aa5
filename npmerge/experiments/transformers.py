"""A second domain: small transformers, of images and of texts, and what their heads bring."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from npmerge.experiments.listing import PATHS, Experiment, setting_cells
from npmerge.experiments.profile import Methods, Profile, Section
from npmerge.store.records import Cell

HEADS = ("permute_fixed_heads", "permute", "permute_by_fixed_head", "permute_by_head")
"""Heads held and matched: first with one permutation of dimensions for all of them, then with one for each."""
METHODS = (
    Methods(
        align=("identity", "weight_matching", "cca", *HEADS),
        aggregate=("mean",),
    ),
    Methods(
        align=("identity", "permute", "weight_matching", "cca"),
        aggregate=("finetune", "np_merge"),
    ),
    Methods(align=tuple(name for name in HEADS if name != "permute"), aggregate=("np_merge",)),
)
"""Those of the paper's tables; nothing aligned, and CCA, before learning too; and the four ways to treat heads."""


def list_cells(profile: Profile, section: Section, seeds: Sequence[int]) -> list[Cell]:
    """Every setting with every seed, merged by every method.

    Args:
        profile: its parameters.
        section: those of the experiment.
        seeds: one pair of base models each.
    """
    return [
        cell
        for setting in section.settings
        for seed in seeds
        for cell in setting_cells(
            profile, "transformers", section, setting, seed, methods=METHODS, paths=PATHS
        )
    ]


_IMAGES: dict[str, Any] = {
    "dataset": "digits", "image_size": 8, "model": "vit", "width": 0.5,
    "recipe": {"epochs": 20, "batch_size": 50, "lr": 0.1, "warmup_epochs": 3},
}  # fmt: skip
_TEXTS: dict[str, Any] = {
    "dataset": "character_names", "image_size": 32, "model": "text_encoder", "width": 0.5,
    "recipe": {"epochs": 6, "batch_size": 50, "lr": 0.1, "warmup_epochs": 2},
}  # fmt: skip
_FEW_LR = {"choose": [1e-3, 1e-2, 1e-1], "trial": {"epochs": 1}}
_LR = {**_FEW_LR, "choose": [1e-4, 1e-3, 1e-2, 1e-1, 1.0]}
_FEW = [
    {
        "align": ["identity", "weight_matching", "cca", *HEADS],
        "aggregate": "mean",
    },
    {"align": ["permute", "weight_matching", "cca"], "aggregate": ["finetune", "np_merge"]},
]
DEFAULTS = {
    "digits": {
        "settings": [_TEXTS, _IMAGES],
        "optimisation": {
            "batch_size": 50,
            "options": {
                "np_merge": {"epochs": 2, "lr": _FEW_LR},
                "finetune": {"epochs": 2, "lr": _FEW_LR},
                "cca": {"ridge": 1.0},
            },
            "path_points": 3,
        },
        "methods": _FEW,
        "seeds": 1,
    },
    "grid": {
        "settings": [
            {**_TEXTS, "recipe": {**_TEXTS["recipe"], "epochs": 15}},
            {**_IMAGES, "recipe": {**_IMAGES["recipe"], "epochs": 40}},
        ],
        "optimisation": {
            "batch_size": 50,
            "options": {
                "np_merge": {"epochs": 8, "lr": _LR},
                "finetune": {"epochs": 8, "lr": _LR},
                "cca": {"ridge": {"choose": [1e-2, 1e-1, 1.0, 10.0, 1e2, 1e3, 1e4]}},
            },
            "path_points": 11,
        },
    },
}
"""A demonstration, and one for a verdict."""

EXPERIMENT = Experiment(
    "transformers", "Small transformers", "ours", list_cells, defaults=DEFAULTS, place=8
)
