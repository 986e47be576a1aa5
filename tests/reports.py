"""Records that were never run: what tables, plots and verdicts are made of."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from npmerge.methods import Combination
from npmerge.store.files import config_hash
from npmerge.store.records import Record

ALIGNED = ("permute", "weight_matching")
BASE, ENSEMBLE = Combination("base_models"), Combination("ensemble")
AS_TRAINED = Combination("base_models", correct=None)
MEANS = tuple(Combination("mean", align) for align in ("identity", *ALIGNED, "cca"))
LEARNED = tuple(
    Combination(aggregate, align, tuned=tuned)
    for aggregate in ("np_merge", "finetune")
    for tuned in (False, True)
    for align in ALIGNED
)
TABLE = (BASE, ENSEMBLE, *MEANS, *LEARNED)
"""What the paper's tables compare, with the tuned rows."""
ORIGIN = {
    "revision": "0123456789abcdef+",
    "device": "CPU (x86_64)",
    "kernels": "cpu-AVX2",
    "threads": 2,
    "precision": "float32",
    "python": "3.11.7",
    "versions": {"torch": "2.15.0"},
    "finished": "2026-01-31T10:00:00+00:00",
    "seconds": 600.0,
    "peak_memory_mib": 1500,
    "base_models": {},
    "deterministic": False,
}


def record(
    method: Combination,
    value: float | Mapping[str, float],
    seed: int = 0,
    *,
    profile: str = "short",
    experiment: str = "disjoint_splits",
    dataset: str = "cifar100",
    model: str = "resnet20",
    width: float = 1.0,
    split: str | None = "dirichlet",
    models: int = 2,
    examples: int | str | None = None,
    details: Mapping[str, Any] | None = None,
    origin: Mapping[str, Any] | None = None,
) -> Record:
    """The record of one number's work."""
    setting = "-".join(filter(None, (dataset, f"{model}x{width:g}", split)))
    words = (models if models != 2 else None, examples, method.many, method.align, method.aggregate)
    name = "-".join(str(word) for word in words if word is not None) + "-tuned" * method.tuned
    name += "-raw" * (method.correct is None)
    cell = {"profile": profile, "experiment": experiment, "setting": setting, "seed": seed}
    row = {
        "dataset": dataset, "image_size": 16, "model": model, "width": width, "split": split,
        "models": models, "many": method.many, "align": method.align, "tuned": method.tuned,
        "aggregate": method.aggregate, "correct": method.correct, "examples_per_class": examples,
    }  # fmt: skip
    values = value if isinstance(value, Mapping) else {"top1": value, "loss": 1.0}
    return Record.model_validate(
        {
            "cell": cell | {"name": name},
            "config": {},
            "config_hash": config_hash({}),
            "rows": [row | {"metric": m, "value": float(found)} for m, found in values.items()],
            "details": dict(details or {}),
            "seconds": {},
            "provenance": ORIGIN | dict(origin or {}),
            "digest": "00",
        }
    )


def records(values: Mapping[Combination, list[float]], **where: Any) -> list[Record]:
    """The records of several methods, a value a seed."""
    return [
        record(method, value, seed, **where)
        for method, each in values.items()
        for seed, value in enumerate(each)
    ]
