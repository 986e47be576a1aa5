"""Section IV-C, Tables II and III: two models trained on disjoint shares of the data."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from npmerge.evaluate import Ensemble, class_accuracy
from npmerge.experiments import merging
from npmerge.experiments.merging import Machine, Merging, base_models
from npmerge.experiments.profile import Profile
from npmerge.results import Outcome, Unit
from npmerge.zoo import Zoo

__all__ = ["NAME", "base_models", "run", "units"]

NAME = "disjoint_splits"
TABLE = "II"


def units(profile: Profile, seeds: Sequence[int]) -> list[Unit]:
    """The units of the experiment: every setting with every seed.

    Args:
        profile: its parameters.
        seeds: of the split and of the pair of base models.
    """
    return merging.units(profile.name, NAME, profile.disjoint_splits, seeds)


def run(unit: Unit, *, zoo: Zoo, machine: Machine) -> Outcome:
    """Run one unit: the methods of Table II, and for each class who saw how much of it and who knows it.

    Args:
        unit: from :func:`units`.
        zoo: where the base models are.
        machine: where to run.
    """
    pair = Merging.of(unit, zoo, machine, table=TABLE)
    merged = pair.every_method()
    labels, classes = pair.data.train.labels, pair.data.classes
    models = {"A": pair.a, "B": pair.b, "ensemble": Ensemble([pair.a, pair.b])} | {
        method: merged[method] for method in ("permute", "np_permute", "finetune_permute")
    }
    pair.details["classes"] = {
        "seen": [
            torch.bincount(labels[base.partition.indices(labels)], minlength=classes).tolist()
            for base in base_models(unit)
            if base.partition != "same"
        ],
        "accuracy": {
            name: class_accuracy(model, pair.test, classes).tolist()
            for name, model in models.items()
        },
    }
    return pair.outcome()
