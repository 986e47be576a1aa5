"""Device-resident batches beside a standard DataLoader with torchvision transforms.

Both shuffle, crop with padding 4, flip and normalise the same random images, shaped like CIFAR's. First the batches
alone, each moved to the device; then a part of a training epoch fed by them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from _common import CLASSES, Setting, begin, command_line, interleaved, network, summary
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from npmerge.data import Batches, Data, Images, stream
from npmerge.data.streams import size_of
from npmerge.training import fit

IMAGES = 10_000
TRAINING_STEPS = 2
MEAN, STD = (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)


class Standard(Dataset[tuple[Tensor, int]]):
    """Images in memory, one at a time through the transforms, as torchvision's CIFAR100 does it."""

    def __init__(self, images: Images) -> None:
        self.pixels = np.ascontiguousarray(images.pixels.permute(0, 2, 3, 1).numpy())
        self.labels = images.labels.tolist()
        self.transform = transforms.Compose(
            [
                transforms.RandomCrop(images.pixels.shape[-1], padding=4),
                transforms.RandomHorizontalFlip(),
                transforms.ToTensor(),
                transforms.Normalize(MEAN, STD),
            ]
        )

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(Image.fromarray(self.pixels[index])), self.labels[index]


def random_images(setting: Setting, count: int) -> Images:
    """Noise in the shape of CIFAR."""
    generator = torch.Generator().manual_seed(0)
    shape = (count, 3, setting.image_size, setting.image_size)
    return Images(
        torch.randint(256, shape, dtype=torch.uint8, generator=generator),
        torch.randint(CLASSES, (count,), generator=generator),
    )


def loader(setting: Setting, images: Images, workers: int) -> DataLoader[tuple[Tensor, Tensor]]:
    """What one would write without npmerge."""
    return DataLoader(
        Standard(images),
        setting.batch_size,
        shuffle=True,
        num_workers=workers,
        persistent_workers=workers > 0,
        pin_memory=setting.device != "cpu",
    )


def augmented(setting: Setting) -> dict[str, Any]:
    """The options of ``Batches`` that do the same."""
    return {
        "batch_size": setting.batch_size, "mean": MEAN, "std": STD, "device": setting.device,
        "shuffle": True, "padding": 4, "flip": True,
    }  # fmt: skip


def sources(setting: Setting, count: int) -> dict[str, Data]:
    """The same images behind each kind of loader."""
    images = random_images(setting, count)
    return {
        "npmerge Batches": Batches(images, **augmented(setting)),
        "DataLoader, 0 workers": loader(setting, images, 0),
        "DataLoader, 2 workers": loader(setting, images, 2),
    }


def reading(data: Data, setting: Setting) -> Callable[[], object]:
    """One pass over the batches."""
    return lambda: sum(map(size_of, stream(data, setting.device)))


def training(data: Data, setting: Setting) -> Callable[[], object]:
    """One pass of training over them."""
    model = network(setting, 0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    return lambda: fit(model, data, optimizer, epochs=1)


def main() -> None:
    setting, report = begin(command_line(__doc__, batch_size=500, repeats=5), Setting)
    few = TRAINING_STEPS * setting.batch_size
    for name, run, count, repeats in (
        ("batches alone", reading, IMAGES, setting.repeats),
        (f"with training {setting.network}", training, few, min(setting.repeats, 3)),
    ):
        variants = {k: run(v, setting) for k, v in sources(setting, count).items()}
        seconds = interleaved(variants, replace(setting, repeats=repeats))
        title = f"{count:,} images in batches of {setting.batch_size}, {name}"
        report.table(title, summary(seconds, "npmerge Batches", count))
    report.write()


if __name__ == "__main__":
    main()
