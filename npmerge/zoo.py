"""Trained base models on disk, each addressed by what made it."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from npmerge.checkpoints import save_state
from npmerge.data.batches import Batches, train_batches
from npmerge.data.datasets import ImageSet
from npmerge.data.imagenet import ImageNet200
from npmerge.data.partition import Partition
from npmerge.device import models_at_once
from npmerge.models import build
from npmerge.training import Run, TrainingError, fit_together, piecewise_linear, warmup_cosine

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Recipe:
    """How a base model is trained: SGD with a piecewise-linear learning rate.

    Attributes:
        epochs: passes over the training data.
        batch_size: images a step.
        lr: peak learning rate.
        momentum: of SGD.
        weight_decay: of SGD, on every parameter.
        warmup_epochs: passes until the peak.
        schedule: how the learning rate falls after it: ``"cosine"``, or by default linearly.

    Source:
        The protocol page (the authors' earlier code).
    """

    epochs: int
    batch_size: int
    lr: float
    momentum: float = 0.9
    weight_decay: float = 5e-4
    warmup_epochs: float = 5
    schedule: Literal["cosine"] | None = None


@dataclass(frozen=True)
class BaseModel:
    """Everything a base model is a function of.

    Attributes:
        dataset: name of the image set.
        image_size: height and width of its images in pixels.
        model: name of the architecture.
        width: its width.
        recipe: how it is trained.
        partition: its share of the training images; ``"same"`` for all of them.
        seed: of the initial weights, the order and the augmentation.
    """

    dataset: str
    image_size: int
    model: str
    width: float
    recipe: Recipe
    partition: Partition | Literal["same"]
    seed: int

    @property
    def address(self) -> str:
        """File name of the checkpoint."""
        recipe = {name: value for name, value in asdict(self.recipe).items() if value is not None}
        made_of = config_hash(asdict(self) | {"recipe": recipe})
        return f"{self.dataset}-{self.model}x{self.width:g}-seed{self.seed}-{made_of}.safetensors"


def config_hash(config: object) -> str:
    """Twelve hexadecimal digits that stand for a JSON-serialisable configuration."""
    text = json.dumps(config, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:12]


class Zoo:
    """A folder of trained base models.

    Args:
        folder: where the checkpoints are; made when the first one is written.
    """

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)

    def get_all(
        self,
        bases: Sequence[BaseModel],
        data: ImageSet | ImageNet200,
        *,
        device: torch.device | str = "cpu",
        at_once: int | None = None,
        progress: str | None = None,
    ) -> list[nn.Module]:
        """Load base models; see :meth:`loaders`.

        Args:
            bases: what each model is a function of.
            data: the image set they name.
            device: where to train them and put them.
            at_once: models to train at the same time; by default one on a CPU and 16 on CUDA.
            progress: label of the progress bar; none by default.

        Returns:
            The models in evaluation mode.

        Raises:
            TrainingError: a model diverged.
        """
        loaders = self.loaders(bases, data, device=device, at_once=at_once, progress=progress)
        return [load() for load in loaders]

    def loaders(
        self,
        bases: Sequence[BaseModel],
        data: ImageSet | ImageNet200,
        *,
        device: torch.device | str = "cpu",
        at_once: int | None = None,
        progress: str | None = None,
    ) -> list[Callable[[], nn.Module]]:
        """Make sure of base models: those that are missing are trained, together where they differ in seeds only.

        A model is always read back from its file, so that a run that finds it there and the run that trained it work
        with the same bytes. A damaged checkpoint is named in a warning and made again.

        Args:
            bases: what each model is a function of.
            data: the image set they name.
            device: where to train them and put them.
            at_once: models to train at the same time; by default one on a CPU and 16 on CUDA.
            progress: label of the progress bar; none by default.

        Returns:
            For each a function that loads it in evaluation mode.

        Raises:
            TrainingError: a model diverged.
        """
        where = torch.device(device)
        missing: dict[object, list[tuple[BaseModel, Batches]]] = {}
        whole: Batches | None = None
        for base in bases:
            if self._is_whole(base, data):
                continue
            if base.partition == "same":  # one copy of the images serves all seeds
                whole = whole or _batches(base, data, where)
                batches = whole.reseeded(base.seed)
            else:
                batches = _batches(base, data, where)
            alike = replace(base, seed=0, partition="same"), len(batches)
            missing.setdefault(alike, []).append((base, batches))
        size = models_at_once(where) if at_once is None else at_once
        for group in missing.values():
            for start in range(0, len(group), size):
                self._train(group[start : start + size], data, where, progress)
        return [partial(self._load, base, data, device) for base in bases]

    def _is_whole(self, base: BaseModel, data: ImageSet | ImageNet200) -> bool:
        path = self.folder / base.address
        if not path.exists():
            return False
        try:
            self._load(base, data, "cpu")
        except SafetensorError as error:
            log.warning("%s is damaged (%s): training it again", path, error)
            return False
        return True

    def _load(
        self, base: BaseModel, data: ImageSet | ImageNet200, device: torch.device | str
    ) -> nn.Module:
        model = _build(base, data)
        with safe_open(self.folder / base.address, framework="pt") as file:
            model.load_state_dict({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
        return model.to(device).eval()

    def _train(
        self,
        group: Sequence[tuple[BaseModel, Batches]],
        data: ImageSet | ImageNet200,
        device: torch.device,
        progress: str | None,
    ) -> None:
        recipe = group[0][0].recipe
        runs = []
        for base, batches in group:
            model = _build(base, data).to(device)
            optimizer = torch.optim.SGD(
                model.parameters(),
                lr=recipe.lr,
                momentum=recipe.momentum,
                weight_decay=recipe.weight_decay,
                fused=True,
            )
            runs.append(Run(model, batches, optimizer))
        schedule = warmup_cosine if recipe.schedule == "cosine" else piecewise_linear
        histories = fit_together(
            runs,
            epochs=recipe.epochs,
            schedule=schedule(recipe.epochs, recipe.warmup_epochs),
            at_once=len(runs),
            progress=progress,
        )
        for (base, _), run, history in zip(group, runs, histories, strict=True):
            if isinstance(history, TrainingError):
                raise history
            save = partial(
                save_state, state=run.model.state_dict(), metadata={"base_model": asdict(base)}
            )
            write_atomically(self.folder / base.address, save)


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file so that another process sees either nothing, the old one or the whole new one.

    Args:
        path: the file; its folder is made.
        write: writes to the path it is given, a temporary one in the same folder.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    os.close(handle)
    part = Path(name)
    try:
        write(part)
        part.chmod(0o644)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def _build(base: BaseModel, data: ImageSet | ImageNet200) -> nn.Module:
    model = build(
        base.model,
        data.classes,
        width=base.width,
        in_channels=data.channels,
        image_size=data.image_size,
        seed=base.seed,
    )
    return model.to(memory_format=torch.channels_last)


def _batches(base: BaseModel, data: ImageSet | ImageNet200, device: torch.device) -> Batches:
    labels = data.train.labels
    indices = None if base.partition == "same" else base.partition.indices(labels)
    size = base.recipe.batch_size
    return train_batches(data, size, device=device, indices=indices, seed=base.seed)
