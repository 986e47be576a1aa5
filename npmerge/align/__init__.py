"""Align: two models in, an :class:`Alignment` of B to A out. One method a file."""

from npmerge.align.alignment import Alignment
from npmerge.align.canonical_correlation import cca
from npmerge.align.correlation import permute
from npmerge.align.heads import permute_by_fixed_head, permute_by_head, permute_fixed_heads
from npmerge.align.moments import Covariances, covariances
from npmerge.align.rebasin import weight_matching
from npmerge.align.unaligned import identity

__all__ = [
    "Alignment",
    "Covariances",
    "cca",
    "covariances",
    "identity",
    "permute",
    "permute_by_fixed_head",
    "permute_by_head",
    "permute_fixed_heads",
    "weight_matching",
]
