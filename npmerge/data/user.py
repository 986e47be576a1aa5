"""The data of a merge by name: an image set, a folder of images, or a function of the user's own."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Subset

from npmerge.catalogue import DATASETS
from npmerge.checks import IMAGE_SIZE, check_finite, check_whole
from npmerge.data.images import DataError, load
from npmerge.data.streams import Data
from npmerge.named import attribute, called, user_code

log = logging.getLogger(__name__)

IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Mean and standard deviation of ImageNet's pixels, in units of pixel value / 255."""

HALVES = {"train": ("train",), "validation": ("validation", "valid", "val"), "test": ("test",)}
"""What the parts of a folder of images may be called."""

MANY = 2000
"""From so many images on, processes decode them."""


@dataclass(frozen=True)
class Parts:
    """What a merge learns from, and what it is judged on.

    Attributes:
        train: for the alignment.
        learn: for learning and the correction: shuffled, augmented; a function of the seed.
        validation: what the best epoch is chosen on; ``None`` for nothing.
        test: what is scored on; ``None`` if there is nothing but training data.
        classes: how many there are; ``None`` if that is not known.
    """

    train: Data
    learn: Callable[[int], Data]
    validation: Data | None
    test: Data | None
    classes: int | None

    @property
    def judged(self) -> tuple[str, Data]:
        """What models are scored on, and its name: test data, else validation data, else training data."""
        if self.test is not None:
            return "test", self.test
        return ("train", self.train) if self.validation is None else ("validation", self.validation)


@dataclass(frozen=True)
class Preprocessing:
    """What is done to images before a network sees them.

    Attributes:
        image_size: height and width in pixels.
        mean, std: per channel, in units of pixel value / 255; one channel stands for grey images.
        transform: ``"package.module:function"``, from a PIL image to a tensor, in the place of all that.
    """

    image_size: int | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    transform: str | None = None


def open_data(
    name: str,
    preprocessing: Preprocessing,
    *,
    batch_size: int,
    validation: float = 0,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> Parts:
    """The data of a name.

    Args:
        name: an image set of :data:`npmerge.catalogue.DATASETS`; a folder of images, with a folder a class, all in
            ``train`` and possibly ``validation`` and ``test``, or without these; or ``"package.module:function"``,
            which returns a re-iterable of batches, or several: a dictionary of ``"train"``, ``"validation"`` and
            ``"test"``, or a tuple of them in this order. It gets ``batch_size``, ``seed`` and ``image_size`` where it
            takes them.
        preprocessing: of images.
        batch_size: images a step.
        validation: share of the training images to hold out, where there are none for validation.
        seed: of the share, and what a function gets.
        device: where batches are made.

    Raises:
        ValueError: there is no such data, or it cannot be had so.
        DataError: images are absent or damaged.
    """
    if name in DATASETS:
        return _named(name, preprocessing, batch_size, validation, seed, device)
    if Path(name).is_dir():
        return _folder(Path(name), preprocessing, batch_size, validation, seed)
    if ":" not in name:
        known = ", ".join(DATASETS)
        raise ValueError(
            f"unknown data set {name!r}: choose one of {known}, or give a folder of images or package.module:function"
        )
    if validation:
        raise ValueError(f"validation is {validation:g}: {name} gives its own parts")
    found = called(
        name, "data", batch_size=batch_size, seed=seed, image_size=preprocessing.image_size
    )
    return _parts(found, name)


def _parts(found: Any, name: str) -> Parts:
    parts = {"train": found, "validation": None, "test": None}
    if isinstance(found, tuple):
        parts |= dict(zip(parts, found, strict=False))
        wrong = len(found) > len(HALVES)
    else:
        wrong = isinstance(found, Mapping) and ("train" not in found or found.keys() > parts.keys())
        parts |= found if isinstance(found, Mapping) else {}
    if wrong or parts["train"] is None:
        raise ValueError(
            f"data {name!r} gave other parts than train, validation and test: "
            "give batches, a dictionary of these parts, or a tuple in this order"
        )
    train = parts["train"]
    return Parts(train, lambda _: train, parts["validation"], parts["test"], None)


def _held_out(count: int, share: float, seed: int) -> tuple[Tensor, Tensor]:
    """The rows that stay, and those that are held out."""
    if not 0 < share < 1:
        raise ValueError(f"validation is {share:g}: give a share between 0 and 1")
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    aside = max(1, round(share * count))
    return order[aside:].sort().values, order[:aside].sort().values


def _named(
    name: str,
    preprocessing: Preprocessing,
    batch_size: int,
    validation: float,
    seed: int,
    device: torch.device | str,
) -> Parts:
    if preprocessing.mean or preprocessing.std or preprocessing.transform:
        raise ValueError(f"{name} has its own mean, std and transform: give image_size alone")
    data = load(name, image_size=preprocessing.image_size)
    kept, aside = None, None
    if validation:
        kept, aside = _held_out(len(data.train.labels), validation, seed)

    def plain(split: str, indices: Tensor | None) -> Data:
        return data.plain_batches(split, batch_size, device=device, indices=indices)

    return Parts(
        plain("train", kept),
        lambda seed: data.train_batches(batch_size, device=device, indices=kept, seed=seed),
        None if aside is None else plain("train", aside),
        plain("test", None),
        data.classes,
    )


def _folder(
    folder: Path, preprocessing: Preprocessing, batch_size: int, validation: float, seed: int
) -> Parts:
    from torchvision.datasets import ImageFolder

    from npmerge.data.folders import decoded

    found = {
        part: next((folder / name for name in names if (folder / name).is_dir()), None)
        for part, names in HALVES.items()
    }
    if found["train"] is None:  # the classes themselves
        found = {"train": folder, "validation": None, "test": None}
    transform = _transform(preprocessing)
    sets: dict[str, Any] = {}
    for part, place in found.items():
        if place is not None:
            try:
                sets[part] = ImageFolder(place, transform, loader=decoded)
            except FileNotFoundError as error:
                raise DataError(str(error).splitlines()[0]) from error
            if sets[part].classes != sets["train"].classes:
                raise DataError(f"{place} has other classes than {found['train']}")
    classes = len(sets["train"].classes)
    if validation:
        if "validation" in sets:
            raise ValueError(f"validation is {validation:g}: {folder} has validation images")
        kept, aside = _held_out(len(sets["train"]), validation, seed)
        sets["validation"] = Subset(sets["train"], aside.tolist())
        sets["train"] = Subset(sets["train"], kept.tolist())

    def batches(part: str, order: int | None = None) -> Data:
        workers = min(4, os.cpu_count() or 1) if len(sets[part]) >= MANY else 0
        generator = torch.Generator().manual_seed(0 if order is None else order)
        return DataLoader(
            sets[part], batch_size, shuffle=order is not None, generator=generator,
            num_workers=workers, persistent_workers=workers > 0,
        )  # fmt: skip

    return Parts(
        batches("train"),
        lambda seed: batches("train", seed),
        batches("validation") if "validation" in sets else None,
        batches("test") if "test" in sets else None,
        classes,
    )


def _transform(preprocessing: Preprocessing) -> Callable[[Any], Tensor]:
    from torchvision import transforms

    if preprocessing.transform is not None:
        given: Callable[[Any], Tensor] = attribute(preprocessing.transform, "transform")
        return partial(_transformed, given, preprocessing.transform)
    size = preprocessing.image_size
    if size is None:
        raise ValueError("the size of the images is not known: give image_size, or a transform")
    check_whole("image_size", size, 1, IMAGE_SIZE)
    mean, std = preprocessing.mean, preprocessing.std
    if mean is None or std is None:
        mean, std = mean or IMAGENET[0], std or IMAGENET[1]
        log.info(
            "images are normalised with ImageNet's mean and std: give --mean and --std for others"
        )
    for value in (*mean, *std):
        check_finite("mean or std", value)
    if len(mean) != len(std) or len(mean) not in (1, 3) or min(std) <= 0:
        raise ValueError(f"mean is {mean} and std {std}: give one or three of each, std positive")
    steps: Sequence[Any] = [
        transforms.Resize(round(size * 256 / 224)),
        transforms.CenterCrop(size),
        *[transforms.Grayscale()] * (len(mean) == 1),
        transforms.ToTensor(),
        transforms.Normalize(mean, std),
    ]
    composed: Callable[[Any], Tensor] = transforms.Compose(steps)
    return composed


def _transformed(transform: Callable[[Any], Tensor], name: str, image: Any) -> Tensor:
    with user_code(f"transform {name!r}"):
        found = transform(image)
    if not isinstance(found, Tensor):
        raise ValueError(
            f"transform {name!r} gave a {type(found).__name__}: give a tensor (C, H, W)"
        )
    return found
