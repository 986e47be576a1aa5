"""Images in, batches out: shuffled, augmented and normalised on the device they live on."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from npmerge.data.datasets import Images, ImageSet

if TYPE_CHECKING:
    from npmerge.data.imagenet import ImageNet200  # which makes Batches

Data = Iterable[tuple[Tensor, Tensor]]
"""Any re-iterable of ``(images (N, C, H, W), labels (N,))`` batches; a ``DataLoader`` is one."""


class Batches:
    """Batches of a set of images that live on one device.

    The ``uint8`` images are moved once. Every epoch's order, crops and flips are drawn from a generator made of
    ``(seed, epoch)``, so the n-th pass over two equal instances is the same whatever ran in between; each batch is
    then three batched tensor operations (gather with crop, flip, normalise) on the device.

    Args:
        images: the images, ``uint8 (N, C, H, W)``, and their labels, ``int64 (N,)``.
        batch_size: images per batch.
        mean, std: one value per channel, in units of pixel value / 255.
        device: where the images are kept and the batches are made.
        indices: which of the images to use; all by default.
        shuffle: draw a new order every epoch.
        padding: random crop after padding by this many black pixels a side; 0 for none.
        flip: random horizontal flip.
        drop_last: leave out a last batch that is smaller than the others.
        seed: of the order and the augmentation.

    Raises:
        ValueError: no image is left to make a batch of, or ``batch_size`` is not positive.
    """

    def __init__(
        self,
        images: Images,
        batch_size: int,
        *,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        device: torch.device | str = "cpu",
        indices: Tensor | None = None,
        shuffle: bool = False,
        padding: int = 0,
        flip: bool = False,
        drop_last: bool = False,
        seed: int = 0,
    ) -> None:
        pixels, labels = images.pixels, images.labels
        if indices is not None:
            pixels, labels = pixels[indices], labels[indices]
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}: it must be at least 1")
        if not len(pixels):
            raise ValueError("the data is empty: no image is left to make a batch of")
        self.batch_size = min(batch_size, len(pixels))
        self.shuffle, self.padding, self.flip, self.drop_last = shuffle, padding, flip, drop_last
        self.seed, self.epoch, self.device = seed, 0, torch.device(device)
        self.label_range = tuple(int(v) for v in torch.aminmax(labels))
        # channels-last from the start: the gather below then moves whole pixels, and convolutions want it.
        pixels = torch.nn.functional.pad(pixels, [padding] * 4).permute(0, 2, 3, 1).contiguous()
        self._pixels = pixels.to(self.device)
        self._labels = labels.to(self.device)
        shape = (1, 1, 1, len(mean))
        self._scale = (1 / (255 * torch.tensor(std))).view(shape).to(self.device)
        self._shift = (-torch.tensor(mean) / torch.tensor(std)).view(shape).to(self.device)

    def reseeded(self, seed: int) -> Batches:
        """The same images in another order and with other augmentation, from the first epoch on; shares their memory.

        Args:
            seed: of the order and the augmentation.
        """
        other = copy.copy(self)
        other.seed, other.epoch = seed, 0
        return other

    @property
    def images(self) -> int:
        """How many images one pass covers."""
        return len(self) * self.batch_size if self.drop_last else len(self._labels)

    def __len__(self) -> int:
        n = len(self._labels)
        return n // self.batch_size if self.drop_last else -(-n // self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        generator = torch.Generator().manual_seed(_mix(self.seed, self.epoch))
        self.epoch += 1
        n, p = len(self._labels), self.padding
        order = torch.randperm(n, generator=generator) if self.shuffle else torch.arange(n)
        corners = torch.randint(0, 2 * p + 1, (2, n), generator=generator) if p else None
        flips = torch.rand(n, generator=generator) < 0.5 if self.flip else None
        order = order.to(self.device)
        corners = corners.to(self.device) if corners is not None else None
        flips = flips.to(self.device) if flips is not None else None
        for start in range(0, len(self) * self.batch_size, self.batch_size):
            part = slice(start, start + self.batch_size)
            yield (
                self._batch(
                    order[part],
                    corners[:, part] if corners is not None else None,
                    flips[part] if flips is not None else None,
                ),
                self._labels[order[part]],
            )

    def _batch(self, rows: Tensor, corners: Tensor | None, flips: Tensor | None) -> Tensor:
        pixels = self._pixels
        height, width = (s - 2 * self.padding for s in pixels.shape[1:3])
        if corners is None:
            batch = pixels[rows]
        else:  # every crop of every image, as a view; one gather takes the wanted one of each
            windows = pixels.unfold(1, height, 1).unfold(2, width, 1)
            batch = windows[rows, corners[0], corners[1]].permute(0, 2, 3, 1)
        if flips is not None:
            batch = torch.where(flips.view(-1, 1, 1, 1), batch.flip(2), batch)
        normalised = torch.addcmul(self._shift, batch, self._scale)
        return normalised.permute(0, 3, 1, 2)


def train_batches(
    data: ImageSet | ImageNet200,
    batch_size: int,
    *,
    device: torch.device | str = "cpu",
    indices: Tensor | None = None,
    seed: int = 0,
) -> Batches:
    """Shuffled, augmented batches of a training set, as the set's own recipe augments.

    Args:
        data: the image set.
        batch_size: images per batch.
        device: where the batches are made.
        indices: which training images to use; all by default.
        seed: of the order and the augmentation.
    """
    if not isinstance(data, ImageSet):
        return data.train_batches(batch_size, device=device, indices=indices, seed=seed)
    count = len(data.train.labels) if indices is None else len(indices)
    return Batches(
        data.train, batch_size, mean=data.mean, std=data.std, device=device, indices=indices,
        shuffle=True, padding=data.padding, flip=data.flip, drop_last=count > batch_size, seed=seed,
    )  # fmt: skip


def plain_batches(
    data: ImageSet | ImageNet200,
    split: str,
    batch_size: int,
    *,
    device: torch.device | str = "cpu",
    indices: Tensor | None = None,
) -> Batches:
    """Batches of ``split`` ("train" or "test") in order, without augmentation, every image once.

    Args:
        data: the image set.
        split: which half of the set.
        batch_size: images per batch.
        device: where the batches are made.
        indices: which images of the split to use; all by default.
    """
    if not isinstance(data, ImageSet):
        return data.plain_batches(split, batch_size, device=device, indices=indices)
    images = {"train": data.train, "test": data.test}[split]
    return Batches(images, batch_size, mean=data.mean, std=data.std, device=device, indices=indices)


def stream(data: Data, device: torch.device | str) -> Iterator[tuple[Tensor, Tensor]]:
    """The batches of ``data`` on ``device``, checked on the way.

    Args:
        data: any re-iterable of ``(images (N, ...), labels (N,))``.
        device: where to move each batch.

    Yields:
        ``(images, labels)`` on ``device``; labels as ``int64``.

    Raises:
        ValueError: ``data`` is empty, a one-shot iterator, or yields something else than image-label pairs.
    """
    if isinstance(data, Iterator):
        raise ValueError(
            f"data is a one-shot {type(data).__name__}: give something that can be iterated again, "
            "such as a DataLoader or a list"
        )
    empty = True
    for batch in data:
        if not (
            isinstance(batch, tuple | list)
            and len(batch) == 2
            and all(isinstance(t, Tensor) for t in batch)
        ):
            raise ValueError(
                f"data must yield (images, labels) tensor pairs, got {type(batch).__name__}"
            )
        images, labels = batch
        if labels.ndim != 1 or len(labels) != len(images) or labels.is_floating_point():
            raise ValueError(
                f"labels must be one integer per image: got {labels.dtype} {tuple(labels.shape)} "
                f"for {len(images)} images"
            )
        if not len(labels):
            continue
        empty = False
        yield (
            images.to(device, non_blocking=True),
            labels.to(device, torch.int64, non_blocking=True),
        )
    if empty:
        raise ValueError(
            "the data is empty: it yields no image; check the loader or the index set it was made from"
        )


def check_labels(data: Data, labels: Tensor, classes: int) -> None:
    """Raise if a label is not a class of the model.

    Args:
        data: where the batch comes from; :class:`Batches` were looked through once, so that no step waits for the
            device.
        labels: the batch's labels, ``int64 (N,)``.
        classes: how many outputs the model has.

    Raises:
        ValueError: a label is below 0 or not below ``classes``.
    """
    low, high = (
        data.label_range if isinstance(data, Batches) else (int(v) for v in torch.aminmax(labels))
    )
    if low < 0 or high >= classes:
        wrong = low if low < 0 else high
        raise ValueError(
            f"label {wrong} is out of range: the model has {classes} outputs, so labels go from 0 to {classes - 1}"
        )


def _mix(seed: int, epoch: int) -> int:
    """One 63-bit seed from two numbers (splitmix64's finaliser), so that neighbouring seeds share no stream."""
    z = (seed * 0x9E3779B97F4A7C15 + epoch + 1) & 0xFFFFFFFFFFFFFFFF
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
    return (z ^ (z >> 31)) >> 1
