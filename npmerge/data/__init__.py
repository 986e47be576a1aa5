"""Images in, batches out."""

from npmerge.data.batches import Batches, Data, plain_batches, train_batches
from npmerge.data.datasets import DATASETS, DataError, Images, ImageSet, load

__all__ = [
    "DATASETS",
    "Batches",
    "Data",
    "DataError",
    "ImageSet",
    "Images",
    "load",
    "plain_batches",
    "train_batches",
]
