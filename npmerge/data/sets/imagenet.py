"""ImageNet-200: the first 200 classes of a local ImageNet folder."""

from __future__ import annotations

import re
from pathlib import Path

from npmerge.catalogue import DATASETS, dataset
from npmerge.data.folders import FolderSet
from npmerge.data.images import DataError

_SYNSET = re.compile(r"n\d{8}")


@dataset(
    label="ImageNet-200", classes=1000, image_size=224, channels=3, variable="NPMERGE_IMAGENET",
    topk=(1, 5), place=4,
)  # fmt: skip
def imagenet200(
    folder: Path | str | None = None,
    *,
    image_size: int = 224,
    synsets: int = 200,
    classes: int = 1000,
    workers: int | None = None,
) -> FolderSet:
    """The first 200 synsets of a local ImageNet folder, in sorted order: labels 0 to 199.

    Args:
        folder: holds ``train/<synset>/*.JPEG`` and ``val/<synset>/*.JPEG``; by default the folder named by
            ``NPMERGE_IMAGENET``. It is only read.
        image_size: height and width of the images in pixels; the test images are shrunk to 256/224 of it and cropped.
        synsets: how many synsets to use.
        classes: how many outputs a network for these images has; 1000, as in the authors' earlier code.
        workers: processes that decode; see :class:`~npmerge.data.folders.FolderSet`.

    Raises:
        DataError: the folder is not named, absent or not laid out like that, or has too few synsets.
        ValueError: ``image_size`` or ``synsets`` is not positive, ``workers`` is negative, or there are more synsets
            than classes.

    Source:
        Section IV-A and the protocol page.
    """
    entry = DATASETS["imagenet200"]
    layout = (
        f"give the folder, or set {entry.variable} to it, that holds train/n01440764/*.JPEG and val/n01440764/*.JPEG, "
        "one folder a class, as torchvision.datasets.ImageNet unpacks the archives (npmerge cannot download them)"
    )
    if not 1 <= synsets <= classes:
        raise ValueError(f"synsets is {synsets}: it must lie between 1 and classes ({classes})")
    root = entry.folder(folder)
    if root is None:
        raise DataError(f"imagenet200 has no folder: {layout}")
    train, test = root / "train", root / "val"
    for half in (train, test):
        if not half.is_dir():
            raise DataError(f"imagenet200 is not in {root}: {half} is missing; {layout}")
    names = sorted(
        place.name for place in train.iterdir() if _SYNSET.fullmatch(place.name) and place.is_dir()
    )
    if len(names) < synsets:
        raise DataError(f"{train} has {len(names)} synset folders, {synsets} are needed; {layout}")
    try:
        return FolderSet(
            "imagenet200", train, test, names[:synsets], classes=classes, image_size=image_size,
            mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225), workers=workers,
        )  # fmt: skip
    except DataError as error:
        raise DataError(f"{error}; {layout}") from None
