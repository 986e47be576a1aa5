"""A base model that programs of their own make: ``stored.py train|kill|meet FOLDER [NAME]``."""

from __future__ import annotations

import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from killed import Killing

from npmerge.data import Batches, load
from npmerge.store import zoo
from npmerge.store.zoo import BaseModel, Recipe, Zoo
from npmerge.training import fit

BASE = BaseModel(
    "digits", 4, "resnet20", 0.125, Recipe(4, 200, 0.1, warmup_epochs=1), "same", seed=3, threads=1
)


class Deadly:
    """The digits, whose reader is killed in the middle of the third epoch."""

    def __init__(self) -> None:
        self._data = load("digits", image_size=4)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._data, name)

    def train_batches(self, *sizes: int, **options: Any) -> Batches:
        batches = self._data.train_batches(*sizes, **options)
        batches.__class__ = Killing
        return batches


def meet(folder: Path, name: str, *args: Any, **options: Any) -> list[float]:
    """Train, but not before two programs have asked for the model."""
    (folder / f"{name}.trains").touch()
    while len(list(folder.glob("*.asks"))) < 2:
        time.sleep(0.01)
    return fit(*args, **options)


if __name__ == "__main__":
    kind, folder = sys.argv[1], Path(sys.argv[2])
    torch.set_num_threads(2)
    data: Any = load("digits", image_size=4)
    train: Any = fit
    if kind == "kill":
        data = Deadly()
        train = partial(fit, save_every=0)
    if kind == "meet":
        train = partial(meet, folder, sys.argv[3])
        (folder / f"{sys.argv[3]}.asks").touch()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(zoo, "fit", train)
        Zoo(folder / "zoo").ensure(BASE, data)
