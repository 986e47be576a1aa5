"""Images in, batches out: shuffled, augmented and normalised on the device they live on."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from npmerge.checks import check_finite, check_seed, check_whole
from npmerge.data.images import Images


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
        ValueError: no image is left to make a batch of, or a number is out of bounds.
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
        check_whole("padding", padding)
        pixels, labels = images.pixels, images.labels
        if not len(mean) == len(std) == pixels.shape[1]:
            raise ValueError(
                f"mean is {mean} and std {std}: give one of each for {pixels.shape[1]} channels"
            )
        if indices is not None:
            pixels, labels = pixels[indices], labels[indices]
        self._set_up(
            labels, batch_size, mean=mean, std=std, device=device, shuffle=shuffle,
            drop_last=drop_last, seed=seed,
        )  # fmt: skip
        self.padding, self.flip = padding, flip
        # channels-last from the start: the gather below then moves whole pixels, and convolutions want it.
        pixels = torch.nn.functional.pad(pixels, [padding] * 4).permute(0, 2, 3, 1).contiguous()
        self._pixels = pixels.to(self.device)

    def _set_up(
        self,
        labels: Tensor,
        batch_size: int,
        *,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        device: torch.device | str,
        shuffle: bool,
        drop_last: bool,
        seed: int,
    ) -> None:
        """All but the pixels."""
        check_whole("batch_size", batch_size, 1)
        check_seed(seed)
        for value in (*mean, *std):
            check_finite("mean or std", value)
        if min(std) <= 0:
            raise ValueError(f"std is {std}: it must be positive")
        if not len(labels):
            raise ValueError("the data is empty: no image is left to make a batch of")
        self.batch_size = min(batch_size, len(labels))
        self.shuffle, self.drop_last = shuffle, drop_last
        self.seed, self.epoch, self.device = seed, 0, torch.device(device)
        self.label_range = tuple(int(v) for v in torch.aminmax(labels))
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
        """One pass, the one of :attr:`epoch`, which counts on."""
        epoch, n = self.epoch, len(self._labels)
        self.epoch += 1
        generator = torch.Generator().manual_seed(child_seed(self.seed, epoch))
        order = torch.randperm(n, generator=generator) if self.shuffle else torch.arange(n)
        order = order[: len(self) * self.batch_size]
        labels = torch.split(self._labels[order.to(self.device)], self.batch_size)
        for pixels, of in zip(self._read(order, epoch, generator), labels, strict=True):
            normalised = torch.addcmul(self._shift, pixels, self._scale)
            yield normalised.permute(0, 3, 1, 2), of

    def _read(self, order: Tensor, _epoch: int, generator: torch.Generator) -> Iterator[Tensor]:
        """The batches' bytes ``(N, H, W, C)``, augmented, on the device."""
        n, p = len(self._labels), self.padding
        corners = torch.randint(0, 2 * p + 1, (2, n), generator=generator) if p else None
        flips = torch.rand(n, generator=generator) < 0.5 if self.flip else None
        order = order.to(self.device)
        corners = corners.to(self.device) if corners is not None else None
        flips = flips.to(self.device) if flips is not None else None
        for start in range(0, len(order), self.batch_size):
            part = slice(start, start + self.batch_size)
            yield self._batch(
                order[part],
                corners[:, part] if corners is not None else None,
                flips[part] if flips is not None else None,
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
        return batch


def child_seed(seed: int, *key: int) -> int:
    """A seed made of a seed and a place, such as an epoch: neighbours share no stream.

    Args:
        seed: at least 0.
        key: the place, one number or several, each at least 0.
    """
    return int(np.random.SeedSequence(seed, spawn_key=key).generate_state(1, np.uint64)[0])
