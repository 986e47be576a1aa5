"""An image set in files: a folder a class, decoded by worker processes while the model runs."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms
from torchvision.datasets.folder import ImageFolder, default_loader, is_image_file

from npmerge.data.batches import Batches, child_seed
from npmerge.data.images import DataError

View = tuple[int, int | None, int]
"""What a worker decodes: the place of an image, the seed of its random crop (``None`` for the centre), the epoch."""


def decoded(path: str) -> Any:
    """The image of a file, in RGB.

    Args:
        path: the file.

    Raises:
        DataError: it cannot be decoded.
    """
    try:
        return default_loader(path)
    except (OSError, SyntaxError, ValueError) as error:
        raise DataError(
            f"{path} cannot be decoded ({error}): copy it again from its archive"
        ) from error


class ImageFiles(Dataset[np.ndarray]):
    """Half of an image set in files, listed as torchvision's ``ImageFolder`` does; nothing is decoded.

    Args:
        folder: holds a folder for each class.
        names: of these folders; their places are the labels.
        image_size: height and width of the decoded images in pixels.

    Attributes:
        samples: path and label of each image.
        labels: ``int64 (N,)``.

    Raises:
        DataError: a class has no image.
    """

    def __init__(self, folder: Path, names: Sequence[str], image_size: int) -> None:
        labels = {name: label for label, name in enumerate(names)}
        self.samples: list[tuple[str, int]] = ImageFolder.make_dataset(
            str(folder), labels, is_valid_file=_is_image, allow_empty=True
        )
        self.labels = torch.tensor([label for _, label in self.samples], dtype=torch.int64)
        empty = sorted(set(labels.values()).difference(self.labels.tolist()))
        if empty:
            raise DataError(f"{folder / names[empty[0]]} holds no image")
        self._random = transforms.Compose(
            [transforms.RandomResizedCrop(image_size), transforms.RandomHorizontalFlip(), np.array]
        )
        resize = transforms.Resize(round(image_size * 256 / 224))
        self._centre = transforms.Compose([resize, transforms.CenterCrop(image_size), np.array])

    def __getitem__(self, view: View) -> np.ndarray:
        """``uint8 (H, W, C)``: a function of the view only."""
        row, seed, epoch = view
        path, _ = self.samples[row]
        image = decoded(path)
        with torch.random.fork_rng(devices=[]):  # torchvision draws from the global generator
            if seed is not None:
                torch.default_generator.manual_seed(child_seed(seed, epoch, row))
            pixels: np.ndarray = (self._centre if seed is None else self._random)(image)
        return pixels

    def thinned(self, count: int) -> ImageFiles:
        """The same files without most of them, spread evenly over the classes.

        Args:
            count: how many to leave, at most.
        """
        count, total = min(count, len(self.samples)), len(self.samples)
        other = copy.copy(self)
        other.samples = [self.samples[place * total // count] for place in range(count)]
        other.labels = torch.tensor([label for _, label in other.samples], dtype=torch.int64)
        return other


class FolderSet:
    """An image set with a folder a class; an :class:`~npmerge.data.images.ImageData`.

    The files are listed once and decoded as they are needed, by worker processes that stay for the next pass over the
    same half and end with this object.

    Args:
        name: as in the tables.
        train, test: the halves' folders.
        names: of the classes' folders in each half; their places are the labels.
        classes: how many outputs a network for these images has.
        image_size: height and width of the images in pixels; those that are not augmented are shrunk to 256/224 of it
            and cropped.
        mean, std: per channel, in units of pixel value / 255.
        workers: processes that decode, for each pass that runs at the same time; by default as many as there are
            CPU cores. With 0 this process does.

    Attributes:
        train, test: the files of each half, with their labels.

    Raises:
        DataError: a class has no image.
        ValueError: ``image_size`` is not positive, or ``workers`` is negative.
    """

    def __init__(
        self,
        name: str,
        train: Path,
        test: Path,
        names: Sequence[str],
        *,
        classes: int,
        image_size: int,
        mean: tuple[float, float, float],
        std: tuple[float, float, float],
        workers: int | None = None,
    ) -> None:
        workers = (os.cpu_count() or 1) if workers is None else workers
        if image_size < 1:
            raise ValueError(f"image_size is {image_size}: it must be positive")
        if workers < 0:
            raise ValueError(f"workers is {workers}: it cannot be negative")
        self.name, self.names, self.workers = name, tuple(names), workers
        self.classes, self.channels, self.image_size = classes, 3, image_size
        self.mean, self.std = mean, std
        self._use(*(ImageFiles(half, names, image_size) for half in (train, test)))

    def _use(self, train: ImageFiles, test: ImageFiles) -> None:
        self.train, self.test = train, test
        self._readers = {
            "train": _Readers(train, self.workers),
            "test": _Readers(test, self.workers),
        }

    def first(self, count: int) -> FolderSet:
        """The set cut to a few images, spread evenly over the classes.

        Args:
            count: how many images to leave in each half, at most.
        """
        other = copy.copy(self)
        other._use(self.train.thinned(count), self.test.thinned(count))
        return other

    def example(self) -> Tensor:
        """One zero image ``(1, C, H, W)``, float32."""
        return torch.zeros(1, self.channels, self.image_size, self.image_size)

    def train_batches(
        self,
        batch_size: int,
        *,
        device: torch.device | str = "cpu",
        indices: Tensor | None = None,
        seed: int = 0,
    ) -> FileBatches:
        """Shuffled training images: a random crop of 8 to 100% of the area, resized, and a random flip.

        See :meth:`npmerge.data.images.ImageData.train_batches`.
        """
        return FileBatches(
            self, "train", batch_size, device=device, indices=indices, augment=True, seed=seed
        )

    def plain_batches(
        self,
        split: str,
        batch_size: int,
        *,
        device: torch.device | str = "cpu",
        indices: Tensor | None = None,
    ) -> FileBatches:
        """Images in order, shrunk and cropped; see :meth:`npmerge.data.images.ImageData.plain_batches`."""
        return FileBatches(self, split, batch_size, device=device, indices=indices)


class FileBatches(Batches):
    """Batches of images that are decoded from files on the way; in everything else a :class:`Batches`.

    Workers decode, crop and resize to ``uint8``; the batch is normalised on the device. Each image's crop and flip is
    drawn from ``(seed, epoch, index)``, so a pass is the same whatever ran in between and however many workers there
    are. Made by :meth:`FolderSet.train_batches` and :meth:`FolderSet.plain_batches`.

    Args:
        data: the image set.
        split: which half of it, "train" or "test".
        batch_size: images per batch.
        device: where the batches are made.
        indices: which of the files to use; all by default.
        augment: draw a new order, and of every image a new crop and flip, every epoch; a last batch that is smaller
            than the others is left out.
        seed: of the order and the augmentation.

    Raises:
        ValueError: no image is left to make a batch of, or ``batch_size`` is not positive.
    """

    def __init__(
        self,
        data: FolderSet,
        split: str,
        batch_size: int,
        *,
        device: torch.device | str = "cpu",
        indices: Tensor | None = None,
        augment: bool = False,
        seed: int = 0,
    ) -> None:
        labels = {"train": data.train, "test": data.test}[split].labels
        rows = torch.arange(len(labels))
        self._rows = rows if indices is None else rows[indices]
        self._readers = data._readers[split]
        self._set_up(
            labels[self._rows], batch_size, mean=data.mean, std=data.std, device=device,
            shuffle=augment, drop_last=augment and len(self._rows) > batch_size, seed=seed,
        )  # fmt: skip

    def _read(self, order: Tensor, epoch: int, _generator: torch.Generator) -> Iterator[Tensor]:
        seed = self.seed if self.shuffle else None
        views = [
            [(row, seed, epoch) for row in self._rows[part].tolist()]
            for part in torch.split(order, self.batch_size)
        ]
        for pixels in self._readers.read(views, pinned=self.device.type == "cuda"):
            yield pixels.to(self.device, non_blocking=True)


_Reader = tuple[list[list[View]], DataLoader[Any]]
"""A loader, and the list that it takes the views of its next pass from."""


class _Readers:
    """Loaders of some files, whose workers stay for the next pass. Passes at the same time have a loader each."""

    def __init__(self, files: ImageFiles, workers: int) -> None:
        self._files, self._workers = files, workers
        self._idle: dict[bool, list[_Reader]] = {False: [], True: []}

    def read(self, views: list[list[View]], *, pinned: bool) -> Iterator[Tensor]:
        """Batches of ``uint8 (N, H, W, C)``; raises :class:`DataError` at a file that cannot be decoded."""
        idle = self._idle[pinned]
        plan, loader = idle.pop() if idle else self._start(pinned)
        plan[:] = views
        try:
            yield from loader
        except DataError as error:  # a worker's has the worker's traceback in its message
            last = str(error).splitlines()[-1]
            name = f"{DataError.__module__}.{DataError.__qualname__}: "
            raise DataError(last.removeprefix(name)) from None
        idle.append((plan, loader))  # a pass that broke off does not get here, and its workers end

    def _start(self, pinned: bool) -> _Reader:
        plan: list[list[View]] = []
        loader = DataLoader(
            self._files,
            batch_sampler=plan,  # of views instead of indices
            num_workers=self._workers,
            pin_memory=pinned,
            persistent_workers=self._workers > 0,
            generator=torch.Generator(),  # else every pass draws from the global one
        )
        return plan, loader


def _is_image(path: str) -> bool:
    return bool(is_image_file(path)) and not Path(path).name.startswith(".")
