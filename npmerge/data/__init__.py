"""Images in, batches out."""

from npmerge.catalogue import DATASETS
from npmerge.data.batches import Batches
from npmerge.data.images import DataError, ImageData, Images, load
from npmerge.data.inmemory import ImageSet
from npmerge.data.streams import Batch, Data, stream

__all__ = [
    "DATASETS",
    "Batch",
    "Batches",
    "Data",
    "DataError",
    "ImageData",
    "ImageSet",
    "Images",
    "load",
    "stream",
]
