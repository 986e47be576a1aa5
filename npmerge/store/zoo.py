"""Trained base models on disk, each addressed by all that made it."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from npmerge._version import __version__
from npmerge.catalogue import SAMPLING
from npmerge.data.images import ImageData
from npmerge.data.partition import Partition
from npmerge.device import gains_from_bfloat16, kernels_label, threads
from npmerge.models import build
from npmerge.store.checkpoints import State, kept, not_finite, read_checked
from npmerge.store.files import DamagedError, config_hash
from npmerge.store.origins import device_label
from npmerge.training import TrainingError, fit, piecewise_linear, warmup_cosine

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

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        """SGD of a model's parameters.

        Args:
            model: what it is to train.
        """
        return torch.optim.SGD(
            model.parameters(), lr=self.lr, momentum=self.momentum, weight_decay=self.weight_decay,
            fused=True,
        )  # fmt: skip

    def rate(self) -> Callable[[float], float]:
        """What multiplies the peak learning rate, as a function of the epoch."""
        shape = warmup_cosine if self.schedule == "cosine" else piecewise_linear
        return shape(self.epochs, self.warmup_epochs)


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
        threads: of the CPU while it is trained: sums are taken in another order with another number. By default as many
            as are set.
        precision: of its training; ``"auto"`` is bfloat16 autocast where the device gains from it.
        until: the epoch of the recipe that its training ends with; by default the last.
        trunk: a model that it goes on from where that one's training ended, instead of from its own initial weights.
    """

    dataset: str
    image_size: int
    model: str
    width: float
    recipe: Recipe
    partition: Partition | Literal["same"]
    seed: int
    threads: int | None = None
    precision: Literal["float32", "auto"] = "float32"
    until: int | None = None
    trunk: BaseModel | None = None

    @property
    def name(self) -> str:
        """What its files are called but for the kernels that made them."""
        start = f"{self.dataset}-{self.model}x{self.width:g}-seed{self.seed}"
        return f"{start}-{config_hash(self.made_of)}"

    @property
    def made_of(self) -> dict[str, Any]:
        """All of it, JSON-serialisable; an option that is not used has no say in it."""
        recipe = {name: value for name, value in asdict(self.recipe).items() if value is not None}
        made_of = {**asdict(self), "recipe": recipe, "sampling": SAMPLING}
        if isinstance(self.partition, Partition):
            made_of["partition"] = self.partition.made_of
        for name in ("until", "trunk"):
            if made_of[name] is None:
                del made_of[name]
        return made_of

    def in_bfloat16(self, device: torch.device) -> bool:
        """Whether it is trained in bfloat16 on a device.

        Args:
            device: where it is trained.
        """
        return self.precision == "auto" and gains_from_bfloat16(device)


class Zoo:
    """A folder of trained base models.

    A model is a function of its description and, in its last bits, of what computes: both are in its address. So it is
    trained under exactly its conditions whatever the caller's are, by one process while the others wait, and a training
    that was cut off goes on from the last epoch that was saved.

    Args:
        folder: where the checkpoints are; made when the first one is written.
        published: folders that are looked into first and only read. A model there is taken whatever kernels made it.
    """

    def __init__(self, folder: Path | str, published: Sequence[Path | str] = ()) -> None:
        self.folder = Path(folder)
        self.published = tuple(map(Path, published))

    def path(self, base: BaseModel, *, device: torch.device | str = "cpu") -> Path:
        """Where a model that is trained on a device is, or would be.

        Args:
            base: what it is a function of.
            device: where it is trained.
        """
        return self.folder / f"{base.name}-{_kernels(base, torch.device(device))}.safetensors"

    def places(self, base: BaseModel, own: Path) -> list[Path]:
        """Where a model may be: the published files, those of its own name first, and its own place.

        Args:
            base: what it is a function of.
            own: where it is once it is trained, see :meth:`path`.
        """
        published = [path for folder in self.published for path in _files(folder, base)]
        return [*sorted(published, key=lambda path: path.name != own.name), own]

    def there(self, base: BaseModel, *, device: torch.device | str = "cpu") -> bool:
        """Whether a model has a file; nobody looks into it.

        Args:
            base: what it is a function of.
            device: where it would be trained.
        """
        return any(path.exists() for path in self.places(base, self.path(base, device=device)))

    def ensure(
        self,
        base: BaseModel,
        data: ImageData,
        *,
        device: torch.device | str = "cpu",
        progress: str | None = None,
    ) -> Path:
        """Train a model if it is missing or its file is damaged.

        Args:
            base: what it is a function of.
            data: the image set it names.
            device: where to train it.
            progress: label of the progress bar; none by default.

        Returns:
            Its file.

        Raises:
            TrainingError: it diverged.
            OSError: its file cannot be written; said before it is trained.
        """
        return self._found(base, data, torch.device(device), progress)[0]

    def load(
        self,
        base: BaseModel,
        data: ImageData,
        *,
        device: torch.device | str = "cpu",
        progress: str | None = None,
    ) -> nn.Module:
        """Load a model, which is trained first if need be; always from its file.

        Args:
            base: what it is a function of.
            data: the image set it names.
            device: where to train it and to put it.
            progress: label of the progress bar; none by default.

        Returns:
            The model in evaluation mode.

        Raises:
            TrainingError: it diverged.
            OSError: its file cannot be written; said before it is trained.
        """
        _, state = self._found(base, data, torch.device(device), progress)
        model = _build(base, data)
        model.load_state_dict(state)
        return model.to(device).eval()

    def loaders(
        self,
        bases: Sequence[BaseModel],
        data: ImageData,
        *,
        device: torch.device | str = "cpu",
        progress: str | None = None,
    ) -> list[Callable[[], nn.Module]]:
        """Make sure of models, and load them later, one at a time.

        Args:
            bases: what each is a function of.
            data: the image set they name.
            device: where to train them and to put them.
            progress: label of the progress bar; none by default.

        Returns:
            For each a function that loads it in evaluation mode.

        Raises:
            TrainingError: one diverged.
            OSError: a file cannot be written; said before its model is trained.
        """
        for base in bases:
            self.ensure(base, data, device=device, progress=progress)
        return [partial(self.load, base, data, device=device) for base in bases]

    def provenance(self, base: BaseModel, *, device: torch.device | str = "cpu") -> dict[str, Any]:
        """Where a model comes from, for records.

        Args:
            base: what it is a function of.
            device: where it was trained, if here.

        Returns:
            The name of its file and what that says: its digest, and what made it and how long that took.

        Raises:
            FileNotFoundError: no file of it is whole.
        """
        for path, _, about in _whole(base, self.places(base, self.path(base, device=device))):
            return {
                "file": path.name,
                "digest": about["digest"],
                "kernels": about["made_of"]["kernels"],
                **{name: about[name] for name in ("versions", "device", "seconds")},
            }
        raise FileNotFoundError(f"{self.path(base, device=device)} is missing: train it first")

    def copies(self, base: BaseModel) -> dict[Path, dict[str, Any]]:
        """The whole files of a model in the zoo's own folder, whatever kernels made them, and what they say.

        Args:
            base: what it is a function of.
        """
        return {path: about for path, _, about in _whole(base, _files(self.folder, base))}

    def _found(
        self, base: BaseModel, data: ImageData, device: torch.device, progress: str | None
    ) -> tuple[Path, State]:
        *published, own = self.places(base, self.path(base, device=device))
        for path, state, _ in _whole(base, published):
            return path, state
        partly = own.with_name(f".{own.stem}.training")

        trunk = None if base.trunk is None else self.load(base.trunk, data, device=device)

        def make() -> tuple[State, dict[str, Any]]:
            start = time.perf_counter()
            state = _trained(base, data, device, partly, progress, trunk)
            return state, {
                "versions": {"npmerge": __version__, "torch": torch.__version__},
                "device": device_label(device),
                "seconds": round(time.perf_counter() - start, 1),
            }

        state, _ = kept(own, _made_of(base, own), make)
        if partly.exists():
            partly.unlink(missing_ok=True)
        return own, state


def _files(folder: Path, base: BaseModel) -> list[Path]:
    return sorted(folder.glob(f"{base.name}-*.safetensors"))


def _whole(base: BaseModel, paths: Iterable[Path]) -> Iterator[tuple[Path, State, dict[str, Any]]]:
    for path in paths:
        try:
            yield path, *read_checked(path, _made_of(base, path))
        except FileNotFoundError:
            continue
        except DamagedError as error:
            log.warning("%s: it is not used", error)


def _made_of(base: BaseModel, path: Path) -> dict[str, Any]:
    return {"base_model": base.made_of, "kernels": path.stem.removeprefix(f"{base.name}-")}


def _kernels(base: BaseModel, device: torch.device) -> str:
    """What decides a model's last bits beside its description."""
    label = kernels_label(device)
    if device.type == "cpu" and base.threads is None:
        label += f"-{torch.get_num_threads()}threads"
    return label + "-bfloat16" * base.in_bfloat16(device)


def _trained(
    base: BaseModel,
    data: ImageData,
    device: torch.device,
    partly: Path,
    progress: str | None,
    trunk: nn.Module | None,
) -> State:
    log.info("training %s on %s", base.name, device)
    recipe = base.recipe
    indices = None if base.partition == "same" else base.partition.indices(data.train.labels)
    schedule = recipe.rate()
    first = base.trunk.until if base.trunk is not None and base.trunk.until is not None else 0
    last = recipe.epochs if base.until is None else base.until
    mine = [device] if device.type == "cuda" else []
    with threads(base.threads), torch.random.fork_rng(mine):
        torch.manual_seed(base.seed)  # of dropout, where a model has it
        model = _build(base, data).to(device)
        if trunk is not None:
            model.load_state_dict(trunk.state_dict())
        batches = data.train_batches(
            recipe.batch_size, device=device, indices=indices, seed=base.seed
        )
        try:
            fit(
                model, batches, recipe.optimizer(model), epochs=last - first,
                schedule=lambda epoch: schedule(first + epoch),
                mixed_precision=base.in_bfloat16(device), saved=partly, progress=progress,
            )  # fmt: skip
        except TrainingError as error:
            raise TrainingError(f"base model {base.name}: {error}") from error
    state = model.state_dict()
    broken = not_finite(state)
    if broken:
        raise TrainingError(
            f"base model {base.name}: {broken!r} is not finite after training at learning rate {recipe.lr:g}: "
            "try a lower one"
        )
    return state


def _build(base: BaseModel, data: ImageData) -> nn.Module:
    model = build(
        base.model, data.classes, width=base.width, in_channels=data.channels,
        image_size=data.image_size, seed=base.seed,
    )  # fmt: skip
    return model.to(memory_format=torch.channels_last)
