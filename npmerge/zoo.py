"""Trained base models on disk, each addressed by what made it."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from npmerge.checkpoints import save_state
from npmerge.data.batches import train_batches
from npmerge.data.datasets import ImageSet
from npmerge.models import build
from npmerge.training import fit, piecewise_linear

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

    Source:
        The protocol page (the authors' earlier code).
    """

    epochs: int
    batch_size: int
    lr: float
    momentum: float = 0.9
    weight_decay: float = 5e-4
    warmup_epochs: float = 5


@dataclass(frozen=True)
class BaseModel:
    """Everything a base model is a function of.

    Attributes:
        dataset: name of the image set.
        image_size: height and width of its images in pixels.
        model: name of the architecture.
        width: its width.
        recipe: how it is trained.
        partition: name of the split and the model's place in it; ``"same"`` for the whole training set.
        seed: of the initial weights, the order and the augmentation.
    """

    dataset: str
    image_size: int
    model: str
    width: float
    recipe: Recipe
    partition: str
    seed: int

    @property
    def address(self) -> str:
        """File name of the checkpoint."""
        return f"{self.dataset}-{self.model}x{self.width:g}-seed{self.seed}-{config_hash(asdict(self))}.safetensors"


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

    def get(
        self,
        base: BaseModel,
        data: ImageSet,
        *,
        indices: Tensor | None = None,
        device: torch.device | str = "cpu",
        progress: str | None = None,
    ) -> nn.Module:
        """Load a base model, or train it and keep it.

        A model is always read back from its file, so that a run that finds it there and the run that trained it work
        with the same bytes. A damaged checkpoint is named in a warning and made again.

        Args:
            base: what the model is a function of.
            data: the image set it names.
            indices: the training images of its partition; all by default.
            device: where to train it and put it.
            progress: label of the progress bar; none by default.

        Returns:
            The model in evaluation mode.
        """
        path = self.folder / base.address
        if path.exists():
            try:
                return self._load(path, base, data, device)
            except SafetensorError as error:
                log.warning("%s is damaged (%s): training it again", path, error)
        model = _build(base, data).to(device)
        _train(model, base, data, indices, device, progress)
        made_by = {"base_model": asdict(base)}
        write_atomically(path, lambda part: save_state(part, model.state_dict(), made_by))
        return self._load(path, base, data, device)

    def _load(
        self, path: Path, base: BaseModel, data: ImageSet, device: torch.device | str
    ) -> nn.Module:
        model = _build(base, data)
        with safe_open(path, framework="pt") as file:
            model.load_state_dict({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
        return model.to(device).eval()


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


def _build(base: BaseModel, data: ImageSet) -> nn.Module:
    model = build(
        base.model,
        data.classes,
        width=base.width,
        in_channels=data.channels,
        image_size=data.image_size,
        seed=base.seed,
    )
    return model.to(memory_format=torch.channels_last)


def _train(
    model: nn.Module,
    base: BaseModel,
    data: ImageSet,
    indices: Tensor | None,
    device: torch.device | str,
    progress: str | None,
) -> None:
    recipe = base.recipe
    batches = train_batches(data, recipe.batch_size, device=device, indices=indices, seed=base.seed)
    optimizer = torch.optim.SGD(
        model.parameters(),
        lr=recipe.lr,
        momentum=recipe.momentum,
        weight_decay=recipe.weight_decay,
        fused=True,
    )
    schedule = piecewise_linear(recipe.epochs, recipe.warmup_epochs)
    fit(model, batches, optimizer, epochs=recipe.epochs, schedule=schedule, progress=progress)
