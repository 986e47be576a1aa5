"""The image sets: ``digits`` (embedded), ``cifar10`` and ``cifar100`` (torchvision)."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d

DATA_VARIABLE = "NPMERGE_DATA"
"""Environment variable that names the folder with the downloaded data sets."""


class DataError(RuntimeError):
    """A data set is absent or damaged; the message says where it was looked for and what to do."""


@dataclass(frozen=True)
class Images:
    """Images with their labels.

    Attributes:
        pixels: ``uint8 (N, C, H, W)``.
        labels: ``int64 (N,)``.
    """

    pixels: Tensor
    labels: Tensor

    def __post_init__(self) -> None:
        if (
            self.pixels.dtype != torch.uint8
            or self.pixels.ndim != 4
            or len(self.pixels) != len(self.labels)
        ):
            raise ValueError(
                f"need uint8 pixels (N, C, H, W) and N labels, got {self.pixels.dtype} "
                f"{tuple(self.pixels.shape)} and {len(self.labels)} labels"
            )


@dataclass(frozen=True)
class ImageSet:
    """A classification data set and how it is normalised and augmented.

    Attributes:
        name: as in the tables, e.g. ``"cifar100"``.
        train, test: the two halves.
        classes: how many classes there are.
        mean, std: per channel, in units of pixel value / 255.
        padding: pixels a side for the random crop of the training recipe.
        flip: whether the training recipe flips horizontally.
    """

    name: str
    train: Images
    test: Images
    classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    padding: int
    flip: bool

    @property
    def channels(self) -> int:
        """Colour channels of an image."""
        return self.train.pixels.shape[1]

    @property
    def image_size(self) -> int:
        """Height (= width) of an image in pixels."""
        return self.train.pixels.shape[2]

    def first(self, count: int) -> ImageSet:
        """The set cut to its first images, for trying something out.

        Args:
            count: how many images to leave in each half, at most.
        """
        train, test = (
            Images(half.pixels[:count], half.labels[:count]) for half in (self.train, self.test)
        )
        return replace(self, train=train, test=test)

    def example(self) -> Tensor:
        """One zero image ``(1, C, H, W)``, float32: what a model of this set takes."""
        return torch.zeros(1, *self.train.pixels.shape[1:])


def load(name: str, *, folder: Path | str | None = None, image_size: int | None = None) -> ImageSet:
    """Load an image set.

    Args:
        name: ``"digits"``, ``"cifar10"`` or ``"cifar100"``.
        folder: where downloaded sets live; by default the folder named by ``NPMERGE_DATA``, else ``~/.cache/npmerge``,
            into which torchvision downloads on first use and checks the MD5. A folder that was named is only read.
        image_size: average-pool the images to this height and width in pixels; as they are by default.

    Raises:
        ValueError: no such data set, or a size that does not divide the image's.
        DataError: the files are absent and cannot be downloaded, or are damaged.
    """
    if name not in DATASETS:
        raise ValueError(f"unknown data set {name!r}: choose one of {', '.join(DATASETS)}")
    data = DATASETS[name](folder)
    return data if image_size is None else _pooled(data, image_size)


def _digits(_folder: Path | str | None) -> ImageSet:
    """Optical recognition of handwritten digits (UCI), as embedded in scikit-learn: 1,797 images of 8x8 pixels.

    scikit-learn has no official split: 500 stratified images, drawn once with seed 0, are the test set.
    """
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    bunch = load_digits()
    pixels = torch.from_numpy(np.round(bunch.images * (255 / 16)).astype(np.uint8)).unsqueeze(1)
    labels = torch.from_numpy(bunch.target.astype(np.int64))
    train, test = train_test_split(
        np.arange(len(labels)), test_size=500, stratify=bunch.target, random_state=0
    )
    part = {
        name: Images(pixels[np.sort(rows)], labels[np.sort(rows)])
        for name, rows in (("train", train), ("test", test))
    }
    return ImageSet(
        "digits", part["train"], part["test"], 10, (0.305,), (0.376,), padding=1, flip=False
    )


def _cifar10(folder: Path | str | None) -> ImageSet:
    from torchvision.datasets import CIFAR10  # only who reads CIFAR waits for torchvision

    return _cifar("cifar10", CIFAR10, folder, (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))


def _cifar100(folder: Path | str | None) -> ImageSet:
    from torchvision.datasets import CIFAR100

    return _cifar("cifar100", CIFAR100, folder, (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761))


def _cifar(
    name: str,
    source: Any,
    folder: Path | str | None,
    mean: tuple[float, ...],
    std: tuple[float, ...],
) -> ImageSet:
    named = folder or os.environ.get(DATA_VARIABLE)
    root = Path(named).expanduser() if named else Path.home() / ".cache" / "npmerge"
    names = [file for file, _ in source.train_list + source.test_list] + [source.meta["filename"]]
    files = [root / source.base_folder / file for file in names]
    missing = [file for file in files if not file.is_file()]
    ways = f"put {source.base_folder}/ there, or set {DATA_VARIABLE} to a folder that holds it"
    if missing and named:
        raise DataError(
            f"{name} is not in {root}: {missing[0]} is missing; {ways}, "
            f"or unset {DATA_VARIABLE} to download it on first use"
        )
    try:
        halves = [source(str(root), train=train, download=bool(missing)) for train in (True, False)]
    except RuntimeError as error:  # torchvision: the MD5 of a file that is there differs
        raise DataError(
            f"{name} in {root / source.base_folder} is damaged (MD5 differs): delete that folder and try again"
        ) from error
    except OSError as error:
        if not missing:
            raise
        raise DataError(
            f"{name} is not in {root} ({missing[0]} is missing) and could not be downloaded ({error}): {ways}"
        ) from error
    train, test = (
        Images(
            torch.from_numpy(half.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(half.targets)
        )
        for half in halves
    )
    return ImageSet(name, train, test, len(halves[0].classes), mean, std, padding=4, flip=True)


DATASETS: dict[str, Callable[[Path | str | None], ImageSet]] = {
    "digits": _digits,
    "cifar10": _cifar10,
    "cifar100": _cifar100,
}


def _pooled(data: ImageSet, size: int) -> ImageSet:
    if size == data.image_size:
        return data
    if size < 1 or data.image_size % size:
        raise ValueError(
            f"image_size is {size}: it must divide the {data.image_size} pixels of {data.name}"
        )
    factor = data.image_size // size

    def pool(images: Images) -> Images:
        pooled = avg_pool2d(images.pixels.float(), factor).round().to(torch.uint8)
        return Images(pooled, images.labels)

    return replace(
        data, train=pool(data.train), test=pool(data.test), padding=data.padding // factor
    )
