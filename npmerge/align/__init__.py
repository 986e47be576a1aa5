"""Align: two models in, an :class:`Alignment` of B to A out. One method a file."""

from npmerge.align.alignment import Alignment
from npmerge.align.canonical_correlation import cca
from npmerge.align.correlation import permute
from npmerge.align.dual_space import mudsc
from npmerge.align.heads import permute_by_fixed_head, permute_by_head, permute_fixed_heads
from npmerge.align.joint_matching import frank_wolfe
from npmerge.align.moments import Covariances, covariances
from npmerge.align.rebasin import weight_matching
from npmerge.align.sinkhorn_rebasin import sinkhorn, sinkhorn_loss
from npmerge.align.straight_through import ste
from npmerge.align.transport import ot
from npmerge.align.unaligned import identity

__all__ = [
    "Alignment",
    "Covariances",
    "cca",
    "covariances",
    "frank_wolfe",
    "identity",
    "mudsc",
    "ot",
    "permute",
    "permute_by_fixed_head",
    "permute_by_head",
    "permute_fixed_heads",
    "sinkhorn",
    "sinkhorn_loss",
    "ste",
    "weight_matching",
]
