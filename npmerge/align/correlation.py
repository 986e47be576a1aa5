"""Permute: match channels by the correlation of their activations."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from npmerge.align.alignment import Alignment
from npmerge.align.moments import Covariances, covariances
from npmerge.data.streams import Data
from npmerge.methods import method
from npmerge.symmetry import Group


@method(
    kind="align", label="Permute", short="P", family="alignment", needs=("data",),
    reference="li2015", place=2,
)  # fmt: skip
def permute(
    a: nn.Module,
    b: nn.Module,
    data: Data,
    *,
    groups: Sequence[Group] | None = None,
    statistics: Covariances | None = None,
) -> Alignment:
    """Permute B's channels so that their activations correlate best with A's.

    Args:
        a: Model A; its device is used.
        b: Model B, of the same architecture.
        data: Re-iterable of batches (images (N, C, H, W), labels (N,)); one pass is made.
        groups: The symmetry groups, if already known.
        statistics: What :func:`npmerge.align.moments.covariances` has measured, if that is known already.

    Returns:
        A permutation per group, which maximises the sum of Pearson correlations over all samples and positions. A
        channel that is constant on the data correlates with nothing.

    Raises:
        ValueError: If the models differ in architecture or shape, the data is empty, or activations are not finite.
        SymmetryError: If the model's symmetry groups cannot be found.

    Source:
        The paper's "Permute"; Li et al. 2015, "Convergent Learning"; Jordan et al. 2023, "REPAIR".
    """
    if statistics is None:
        statistics = covariances(a, b, data, groups=groups, variances_only=True)
    pairs = zip(statistics.groups, statistics.correlations(), strict=True)
    return Alignment.from_permutations(
        statistics.groups, [assignment(correlation, group) for group, correlation in pairs]
    )


def assignment(gain: Tensor, group: Group) -> Tensor:
    """Solve the linear assignment problem of one group.

    Args:
        gain: (size, size), what is gained where A's channel (row) meets B's (column).
        group: The group, to be named in an error.

    Returns:
        The permutation with the largest total gain, int64 (size,): B's channel for each of A's.

    Raises:
        ValueError: If a gain is not finite.
    """
    if not gain.sum().isfinite():
        raise ValueError(
            f"group {group.name!r} has values that are not finite: check both models' parameters and the data"
        )
    _, columns = linear_sum_assignment(gain.cpu().numpy(), maximize=True)
    return torch.from_numpy(columns).long()
