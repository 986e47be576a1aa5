"""An image set whose images live in memory."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d

from npmerge.data.batches import Batches
from npmerge.data.images import Images


@dataclass(frozen=True)
class ImageSet:
    """An image set in memory and how it is normalised and augmented; an :class:`~npmerge.data.images.ImageData`.

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

    def example(self) -> Tensor:
        """One zero image ``(1, C, H, W)``, float32."""
        return torch.zeros(1, *self.train.pixels.shape[1:])

    def first(self, count: int) -> ImageSet:
        """The set cut to its first images.

        Args:
            count: how many images to leave in each half, at most.
        """
        train, test = (
            Images(half.pixels[:count], half.labels[:count]) for half in (self.train, self.test)
        )
        return replace(self, train=train, test=test)

    def pooled(self, size: int) -> ImageSet:
        """The set with its images average-pooled.

        Args:
            size: their height and width in pixels.

        Raises:
            ValueError: ``size`` does not divide the images'.
        """
        if size == self.image_size:
            return self
        if size < 1 or self.image_size % size:
            raise ValueError(
                f"image_size is {size}: it must divide the {self.image_size} pixels of {self.name}"
            )
        factor = self.image_size // size
        train, test = (
            Images(avg_pool2d(half.pixels.float(), factor).round().to(torch.uint8), half.labels)
            for half in (self.train, self.test)
        )
        return replace(self, train=train, test=test, padding=self.padding // factor)

    def train_batches(
        self,
        batch_size: int,
        *,
        device: torch.device | str = "cpu",
        indices: Tensor | None = None,
        seed: int = 0,
    ) -> Batches:
        """Shuffled, augmented training images; see :meth:`npmerge.data.images.ImageData.train_batches`."""
        count = len(self.train.labels) if indices is None else len(indices)
        return Batches(
            self.train, batch_size, mean=self.mean, std=self.std, device=device, indices=indices,
            shuffle=True, padding=self.padding, flip=self.flip, drop_last=count > batch_size,
            seed=seed,
        )  # fmt: skip

    def plain_batches(
        self,
        split: str,
        batch_size: int,
        *,
        device: torch.device | str = "cpu",
        indices: Tensor | None = None,
    ) -> Batches:
        """Images in order as they are; see :meth:`npmerge.data.images.ImageData.plain_batches`."""
        images = {"train": self.train, "test": self.test}[split]
        return Batches(
            images, batch_size, mean=self.mean, std=self.std, device=device, indices=indices
        )
