"""ImageNet-200: a local ImageNet folder's first 200 classes, decoded by worker processes while the model runs."""

from __future__ import annotations

import copy
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from npmerge.data.batches import Batches, _mix
from npmerge.data.datasets import DataError

IMAGENET_VARIABLE = "NPMERGE_IMAGENET"
"""Environment variable that names the ImageNet folder, the one with ``train`` and ``val``."""

_SYNSET = re.compile(r"n\d{8}")
_SUFFIXES = (".jpeg", ".jpg", ".png")
_LAYOUT = (
    f"give the folder, or set {IMAGENET_VARIABLE} to it, that holds train/n01440764/*.JPEG and val/n01440764/*.JPEG, "
    "one folder a class, as torchvision.datasets.ImageNet unpacks the archives (npmerge cannot download them)"
)


@dataclass(frozen=True)
class ImageFiles:
    """Image files with their labels; nothing is decoded.

    Attributes:
        paths: of the files.
        labels: ``int64 (N,)``.
    """

    paths: Sequence[str]
    labels: Tensor


class ImageNet200:
    """The first 200 synsets of a local ImageNet folder, in sorted order: labels 0 to 199.

    The files are listed once and decoded as they are needed, by worker processes that every pass shares and that end
    with this object.

    Args:
        folder: holds ``train/<synset>/*.JPEG`` and ``val/<synset>/*.JPEG``; by default the folder named by
            ``NPMERGE_IMAGENET``. It is only read.
        image_size: height and width of the images in pixels; the test images are shrunk to 256/224 of it and cropped.
        synsets: how many synsets to use.
        classes: how many outputs a network for these images has; 1000, as in the authors' earlier code.
        workers: processes that decode, for each pass that runs at the same time; by default as many as there are
            CPU cores. With 0 this process does.

    Attributes:
        name: ``"imagenet200"``.
        synsets: the names of the classes; their places are the labels.
        train, test: the files and labels of ``train`` and ``val``.
        classes, channels, image_size: what a network for these images is built for.
        mean, std: per channel, in units of pixel value / 255.

    Raises:
        DataError: the folder is not named, absent or not laid out like that, or has too few synsets.
        ValueError: ``image_size`` or ``synsets`` is not positive, ``workers`` is negative, or there are more synsets
            than classes.

    Source:
        Section IV-A and the protocol page.
    """

    def __init__(
        self,
        folder: Path | str | None = None,
        *,
        image_size: int = 224,
        synsets: int = 200,
        classes: int = 1000,
        workers: int | None = None,
    ) -> None:
        workers = (os.cpu_count() or 1) if workers is None else workers
        if image_size < 1:
            raise ValueError(f"image_size is {image_size}: it must be positive")
        if workers < 0:
            raise ValueError(f"workers is {workers}: it cannot be negative")
        if not 1 <= synsets <= classes:
            raise ValueError(f"synsets is {synsets}: it must lie between 1 and classes ({classes})")
        named = folder or os.environ.get(IMAGENET_VARIABLE)
        if not named:
            raise DataError(f"imagenet200 has no folder: {_LAYOUT}")
        root = Path(named).expanduser()
        for part in (root / "train", root / "val"):
            if not part.is_dir():
                raise DataError(f"imagenet200 is not in {root}: {part} is missing; {_LAYOUT}")
        self.name = "imagenet200"
        self.classes, self.channels, self.image_size = classes, 3, image_size
        self.mean, self.std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
        self.synsets = _first_synsets(root / "train", synsets)
        self.train = _files(root / "train", self.synsets)
        self.test = _files(root / "val", self.synsets)
        self._decoders = _Decoders(image_size, workers)

    def first(self, count: int) -> ImageNet200:
        """The set cut to a few images, spread evenly over the classes, for trying something out.

        Args:
            count: how many images to leave in each half, at most.
        """
        other = copy.copy(self)
        other.train, other.test = (_thinned(half, count) for half in (self.train, self.test))
        return other

    def example(self) -> Tensor:
        """One zero image ``(1, C, H, W)``, float32: what a model of this set takes."""
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

        Args:
            batch_size: images per batch; a last batch that is smaller is left out.
            device: where the batches are made.
            indices: which training images to use; all by default.
            seed: of the order and the augmentation.
        """
        count = len(self.train.labels) if indices is None else len(indices)
        return FileBatches(
            self, self.train, batch_size, device=device, indices=indices, augment=True,
            drop_last=count > batch_size, seed=seed,
        )  # fmt: skip

    def plain_batches(
        self,
        split: str,
        batch_size: int,
        *,
        device: torch.device | str = "cpu",
        indices: Tensor | None = None,
    ) -> FileBatches:
        """Images of ``split`` ("train" or "test") in order, every one once: resized, and the centre cropped.

        Args:
            split: which half of the set; ``"test"`` is ImageNet's ``val``.
            batch_size: images per batch.
            device: where the batches are made.
            indices: which images of the split to use; all by default.
        """
        files = {"train": self.train, "test": self.test}[split]
        return FileBatches(self, files, batch_size, device=device, indices=indices)


class FileBatches(Batches):
    """Batches of images that are decoded from files on the way; in everything else a :class:`Batches`.

    Workers decode, crop and resize to ``uint8``; the batch is normalised on the device. An epoch's order is drawn from
    ``(seed, epoch)`` and each image's crop and flip from ``(seed, epoch, index)``, so a pass is the same whatever ran
    in between and however many workers there are. Made by :meth:`ImageNet200.train_batches` and
    :meth:`ImageNet200.plain_batches`.

    Args:
        data: whose workers decode, and whose mean and deviation normalise.
        files: the half of ``data`` to read.
        batch_size: images per batch.
        device: where the batches are made.
        indices: which of the files to use; all by default.
        augment: draw a new order, and of every image a new crop and flip, every epoch.
        drop_last: leave out a last batch that is smaller than the others.
        seed: of the order and the augmentation.

    Raises:
        ValueError: no image is left to make a batch of, or ``batch_size`` is not positive.
    """

    def __init__(  # not the parent's, which takes pixels
        self,
        data: ImageNet200,
        files: ImageFiles,
        batch_size: int,
        *,
        device: torch.device | str = "cpu",
        indices: Tensor | None = None,
        augment: bool = False,
        drop_last: bool = False,
        seed: int = 0,
    ) -> None:
        rows = torch.arange(len(files.labels))
        rows = rows if indices is None else rows[indices]
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}: it must be at least 1")
        if not len(rows):
            raise ValueError("the data is empty: no image is left to make a batch of")
        self.batch_size = min(batch_size, len(rows))
        self.shuffle, self.drop_last = augment, drop_last
        self.seed, self.epoch, self.device = seed, 0, torch.device(device)
        self._rows, self._paths = rows, files.paths
        self._labels = files.labels[rows]
        self.label_range = tuple(int(v) for v in torch.aminmax(self._labels))
        self._decoders = data._decoders
        shape = (1, 1, 1, len(data.mean))
        self._scale = (1 / (255 * torch.tensor(data.std))).view(shape).to(self.device)
        self._shift = (-torch.tensor(data.mean) / torch.tensor(data.std)).view(shape)
        self._shift = self._shift.to(self.device)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """One pass; raises :class:`DataError` at a file that cannot be decoded."""
        mixed = _mix(self.seed, self.epoch)
        self.epoch += 1
        order = torch.arange(len(self._rows))
        if self.shuffle:
            order = torch.randperm(len(order), generator=torch.Generator().manual_seed(mixed))
        parts = torch.split(order, self.batch_size)[: len(self)]
        jobs = [
            [
                (self._paths[row], _mix(mixed, row) if self.shuffle else None)
                for row in self._rows[part].tolist()
            ]
            for part in parts
        ]
        decoded = self._decoders.read(jobs, pinned=self.device.type == "cuda")
        for part, pixels in zip(parts, decoded, strict=True):
            moved = pixels.to(self.device, non_blocking=True)
            normalised = torch.addcmul(self._shift, moved, self._scale)
            labels = self._labels[part].to(self.device, non_blocking=True)
            yield normalised.permute(0, 3, 1, 2), labels


_Job = tuple[str, int | None]
"""A file, and the seed of its crop and flip; None for the centre."""


class _Decoders:
    """Worker processes that stay for the next pass. Passes at the same time have workers of their own."""

    def __init__(self, image_size: int, workers: int) -> None:
        self._decoder, self._workers = _Decoder(image_size), workers
        self._idle: dict[bool, list[tuple[_Plan, DataLoader[Any]]]] = {False: [], True: []}

    def read(self, jobs: list[list[_Job]], *, pinned: bool) -> Iterator[Tensor]:
        """Batches of ``uint8 (N, H, W, C)``."""
        idle = self._idle[pinned]
        plan, loader = idle.pop() if idle else self._start(pinned)
        plan.jobs = jobs
        for batch in loader:
            if isinstance(batch, DataError):
                raise batch
            yield batch
        idle.append((plan, loader))  # a pass that broke off does not get here, and its workers end

    def _start(self, pinned: bool) -> tuple[_Plan, DataLoader[Any]]:
        plan = _Plan()
        loader = DataLoader(
            self._decoder,
            batch_sampler=plan,  # of jobs instead of indices
            num_workers=self._workers,
            collate_fn=_collate,
            pin_memory=pinned,
            persistent_workers=self._workers > 0,
            generator=torch.Generator(),  # else every pass draws from the global one
        )
        return plan, loader


class _Plan:
    """What a loader reads in its next pass."""

    jobs: list[list[_Job]]

    def __iter__(self) -> Iterator[list[_Job]]:
        return iter(self.jobs)

    def __len__(self) -> int:
        return len(self.jobs)


class _Decoder(Dataset[Tensor | str]):
    """One image, as it runs in a worker: a function of the job only."""

    def __init__(self, size: int) -> None:
        self._size, self._resized = size, round(size * 256 / 224)

    def __getitem__(self, job: _Job) -> Tensor | str:
        """``uint8 (H, W, C)``, or why there is none: an error that crosses processes drags its traceback along."""
        path, seed = job
        try:
            with Image.open(path) as file:
                image = file.convert("RGB")
        except (OSError, SyntaxError, ValueError) as error:
            return f"{path} cannot be decoded ({error}): copy it again from the ImageNet archive"
        image = self._centre(image) if seed is None else self._random(image, seed)
        return torch.from_numpy(np.array(image))

    def _centre(self, image: Image.Image) -> Image.Image:
        from torchvision.transforms import functional

        resized = functional.resize(image, self._resized)
        cropped: Image.Image = functional.center_crop(resized, [self._size] * 2)
        return cropped

    def _random(self, image: Image.Image, seed: int) -> Image.Image:
        from torchvision.transforms import RandomResizedCrop, functional

        with torch.random.fork_rng(devices=[]):  # the crop is drawn from the global generator
            torch.default_generator.manual_seed(seed)
            box = RandomResizedCrop.get_params(image, [0.08, 1.0], [3 / 4, 4 / 3])
            flip = bool(torch.rand(()) < 0.5)
        cropped: Image.Image = functional.resized_crop(image, *box, [self._size] * 2)
        return functional.hflip(cropped) if flip else cropped


def _collate(images: list[Tensor | str]) -> Tensor | DataError:
    failed = [image for image in images if isinstance(image, str)]
    if failed:
        return DataError(failed[0])
    return torch.stack([image for image in images if isinstance(image, Tensor)])


def _first_synsets(folder: Path, count: int) -> tuple[str, ...]:
    names = sorted(
        entry.name
        for entry in os.scandir(folder)
        if _SYNSET.fullmatch(entry.name) and entry.is_dir()
    )
    if len(names) < count:
        raise DataError(f"{folder} has {len(names)} synset folders, {count} are needed; {_LAYOUT}")
    return tuple(names[:count])


def _files(folder: Path, synsets: Sequence[str]) -> ImageFiles:
    paths: list[str] = []
    counts = []
    for synset in synsets:
        place = folder / synset
        if not place.is_dir():
            raise DataError(f"{place} is missing, but there are training images of it; {_LAYOUT}")
        names = sorted(
            entry.name
            for entry in os.scandir(place)
            if entry.name.lower().endswith(_SUFFIXES) and not entry.name.startswith(".")
        )
        if not names:
            raise DataError(f"{place} holds no image; {_LAYOUT}")
        paths += [str(place / name) for name in names]
        counts.append(len(names))
    labels = torch.arange(len(synsets)).repeat_interleave(torch.tensor(counts))
    return ImageFiles(paths, labels)


def _thinned(files: ImageFiles, count: int) -> ImageFiles:
    total = len(files.labels)
    count = min(count, total)
    rows = torch.arange(count) * total // max(count, 1)
    return ImageFiles([files.paths[row] for row in rows.tolist()], files.labels[rows])
