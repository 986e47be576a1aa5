"""What an image set is, whether its images live in memory or in files."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import torch
from torch import Tensor

from npmerge.catalogue import DATASETS

if TYPE_CHECKING:
    from npmerge.data.batches import Batches  # which are made of Images


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


class Labelled(Protocol):
    """Half of an image set."""

    @property
    def labels(self) -> Tensor:
        """Of its images, ``int64 (N,)``."""


@runtime_checkable
class ImageData(Protocol):
    """A classification data set."""

    @property
    def name(self) -> str:
        """As in the tables, e.g. ``"cifar100"``."""

    @property
    def classes(self) -> int:
        """How many outputs a network for it has."""

    @property
    def channels(self) -> int:
        """Colour channels of an image; of texts, how many different tokens there are."""

    @property
    def image_size(self) -> int:
        """Height (= width) of an image in pixels; of texts, the tokens of one."""

    @property
    def train(self) -> Labelled:
        """The half to learn from."""

    @property
    def test(self) -> Labelled:
        """The half to score on."""

    def example(self) -> Tensor:
        """What a model of this set takes: one zero image ``(1, C, H, W)``, float32, or one text ``(1, T)``, int64."""

    def first(self, count: int) -> ImageData:
        """The set cut down, for trying something out.

        Args:
            count: how many images to leave in each half, at most.
        """

    def train_batches(
        self,
        batch_size: int,
        *,
        device: torch.device | str = "cpu",
        indices: Tensor | None = None,
        seed: int = 0,
    ) -> Batches:
        """Shuffled training images, augmented as the set's own recipe does.

        Args:
            batch_size: images per batch; a last batch that is smaller is left out.
            device: where the batches are made.
            indices: which training images to use; all by default.
            seed: of the order and the augmentation.
        """

    def plain_batches(
        self,
        split: str,
        batch_size: int,
        *,
        device: torch.device | str = "cpu",
        indices: Tensor | None = None,
    ) -> Batches:
        """Images of ``split`` ("train" or "test") in order, without augmentation, every one once.

        Args:
            split: which half of the set.
            batch_size: images per batch.
            device: where the batches are made.
            indices: which images of the split to use; all by default.
        """


def load(
    name: str, *, folder: Path | str | None = None, image_size: int | None = None
) -> ImageData:
    """Load an image set.

    Args:
        name: one of :data:`npmerge.catalogue.DATASETS`.
        folder: where it lives; by default the folder that its environment variable names. A folder that was named is
            only read. A set that can be downloaded is otherwise, on first use, into ``~/.cache/npmerge``.
        image_size: height and width of the images in pixels; as the set has them by default. Images in memory are
            average-pooled to it, files are cut to it when they are decoded.

    Raises:
        ValueError: no such data set, or a size that it does not have.
        DataError: the files are absent and cannot be downloaded, or are damaged.
    """
    entry = DATASETS[name]
    size = entry.image_size if image_size is None else image_size
    data: ImageData = entry.function(folder, image_size=size)
    return data
