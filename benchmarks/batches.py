"""Device-resident batches beside a standard DataLoader with torchvision transforms.

Both shuffle, crop with padding 4, flip and normalise the same random images, shaped like CIFAR's. First the batches
alone, each moved to the device; then a part of a training epoch of ResNet20 fed by them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
from _common import CLASSES, Setting, interleaved, network, read_setting, show, summary, write
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from npmerge.data.batches import Batches, Data, stream
from npmerge.data.datasets import Images
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


def sources(setting: Setting, count: int) -> dict[str, Data]:
    """The same images behind each kind of loader."""
    generator = torch.Generator().manual_seed(0)
    shape = (count, 3, setting.image_size, setting.image_size)
    images = Images(
        torch.randint(256, shape, dtype=torch.uint8, generator=generator),
        torch.randint(CLASSES, (count,), generator=generator),
    )

    def loader(workers: int) -> DataLoader[tuple[Tensor, Tensor]]:
        return DataLoader(
            Standard(images),
            setting.batch_size,
            shuffle=True,
            num_workers=workers,
            persistent_workers=workers > 0,
            pin_memory=setting.device != "cpu",
        )

    return {
        "npmerge Batches": Batches(
            images,
            setting.batch_size,
            mean=MEAN,
            std=STD,
            device=setting.device,
            shuffle=True,
            padding=4,
            flip=True,
        ),
        "DataLoader, 0 workers": loader(0),
        "DataLoader, 2 workers": loader(2),
    }


def reading(data: Data, setting: Setting) -> Callable[[], object]:
    """One pass over the batches."""
    return lambda: sum(len(labels) for _, labels in stream(data, setting.device))


def training(data: Data, setting: Setting) -> Callable[[], object]:
    """One pass of training over them."""
    model = network(setting, 0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    return lambda: fit(model, data, optimizer, epochs=1)


def main() -> None:
    setting, file = read_setting(__doc__, batch_size=500, repeats=5)
    tables = {}
    for name, run, count, repeats in (
        ("batches alone", reading, IMAGES, setting.repeats),
        ("with training", training, TRAINING_STEPS * setting.batch_size, min(setting.repeats, 3)),
    ):
        variants = {k: run(v, setting) for k, v in sources(setting, count).items()}
        seconds = interleaved(variants, replace(setting, repeats=repeats))
        tables[name] = summary(seconds, "npmerge Batches", count)
        title = f"{count:,} images in batches of {setting.batch_size}, {name}"
        show(title if run is reading else f"{title} ResNet20x{setting.width:g}", tables[name])
    write(file, setting, tables)


if __name__ == "__main__":
    main()
