"""Images in, batches out."""

from npmerge.data.batches import Batches, Data, plain_batches, train_batches
from npmerge.data.datasets import DATASETS, DataError, Images, ImageSet, load
from npmerge.data.imagenet import ImageNet200

__all__ = [
    "DATASETS",
    "Batches",
    "Data",
    "DataError",
    "ImageNet200",
    "ImageSet",
    "Images",
    "load",
    "plain_batches",
    "train_batches",
]
