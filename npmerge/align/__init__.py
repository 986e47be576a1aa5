"""Align: two models and data in, an :class:`Alignment` of B to A out. One method a file, one line in ``METHODS``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from npmerge.align.activations import Covariances, activations, covariances
from npmerge.align.alignment import Alignment
from npmerge.align.cca import cca, cca_from_covariances
from npmerge.align.identity import identity
from npmerge.align.permute import permute, permute_from_covariances
from npmerge.align.weight_matching import weight_matching
from npmerge.data.batches import Data, stream

Method = Callable[..., Alignment]
"""``method(a, b, data, **options)``."""


def _from_example(method: Method) -> Method:
    """Give a method that needs only the shape of its input the signature of one that takes data."""

    def from_data(a: nn.Module, b: nn.Module, data: Data, **options: Any) -> Alignment:
        images, _ = next(stream(data, "cpu"))
        return method(a, b, images, **options)

    return from_data


METHODS: dict[str, Method] = {
    "identity": _from_example(identity),
    "permute": permute,
    "weight_matching": _from_example(weight_matching),
    "cca": cca,
}
"""Every alignment method as ``method(a, b, data, **options)``."""

__all__ = [
    "METHODS",
    "Alignment",
    "Covariances",
    "activations",
    "cca",
    "cca_from_covariances",
    "covariances",
    "identity",
    "permute",
    "permute_from_covariances",
    "weight_matching",
]
