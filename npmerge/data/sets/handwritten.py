"""Handwritten digits, which scikit-learn brings along."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from npmerge.catalogue import dataset
from npmerge.data.images import Images
from npmerge.data.inmemory import ImageSet


@dataset(label="digits", classes=10, image_size=8, channels=1, examples_per_class=130, place=1)
def digits(_folder: Path | str | None = None, *, image_size: int = 8) -> ImageSet:
    """Optical recognition of handwritten digits (UCI), as embedded in scikit-learn: 1,797 images of 8x8 pixels.

    scikit-learn has no official split: 500 stratified images, drawn once with seed 0, are the test set.

    Args:
        image_size: height and width in pixels to average-pool the images to.

    Raises:
        ValueError: a size that does not divide the images'.
    """
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    bunch = load_digits()
    pixels = torch.from_numpy(np.round(bunch.images * (255 / 16)).astype(np.uint8)).unsqueeze(1)
    labels = torch.from_numpy(bunch.target.astype(np.int64))
    train, test = (
        Images(pixels[rows], labels[rows])
        for rows in map(
            np.sort,
            train_test_split(
                np.arange(len(labels)), test_size=500, stratify=bunch.target, random_state=0
            ),
        )
    )
    data = ImageSet("digits", train, test, 10, (0.305,), (0.376,), padding=1, flip=False)
    return data.pooled(image_size)
