"""CIFAR-10 and CIFAR-100 as torchvision downloads and checks them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torchvision.datasets import CIFAR10, CIFAR100

from npmerge.catalogue import DATASETS, dataset
from npmerge.data.images import DataError, Images
from npmerge.data.inmemory import ImageSet


@dataset(
    label="CIFAR-10", classes=10, image_size=32, channels=3, variable="NPMERGE_DATA",
    downloads=True, examples_per_class=5000, place=2,
)  # fmt: skip
def cifar10(folder: Path | str | None = None, *, image_size: int = 32) -> ImageSet:
    """CIFAR-10: 50,000 training and 10,000 test images of 32x32 pixels in 10 classes.

    Args:
        folder: where the files are; see :func:`npmerge.data.images.load`.
        image_size: height and width in pixels to average-pool the images to.

    Raises:
        ValueError: a size that does not divide the images'.
        DataError: the files are absent and cannot be downloaded, or are damaged.
    """
    mean, std = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
    return _read("cifar10", CIFAR10, folder, mean, std).pooled(image_size)


@dataset(
    label="CIFAR-100", classes=100, image_size=32, channels=3, variable="NPMERGE_DATA",
    downloads=True, examples_per_class=500, place=3,
)  # fmt: skip
def cifar100(folder: Path | str | None = None, *, image_size: int = 32) -> ImageSet:
    """CIFAR-100: 50,000 training and 10,000 test images of 32x32 pixels in 100 classes; see :func:`cifar10`."""
    mean, std = (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)
    return _read("cifar100", CIFAR100, folder, mean, std).pooled(image_size)


def _read(
    name: str,
    source: Any,
    folder: Path | str | None,
    mean: tuple[float, ...],
    std: tuple[float, ...],
) -> ImageSet:
    variable, named = DATASETS[name].variable, DATASETS[name].folder(folder)
    root = named or Path.home() / ".cache" / "npmerge"
    names = [file for file, _ in source.train_list + source.test_list] + [source.meta["filename"]]
    files = [root / source.base_folder / file for file in names]
    missing = [file for file in files if not file.is_file()]
    ways = f"put {source.base_folder}/ there, or set {variable} to a folder that holds it"
    if missing and named:
        raise DataError(
            f"{name} is not in {root}: {missing[0]} is missing; {ways}, "
            f"or unset {variable} to download it on first use"
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
