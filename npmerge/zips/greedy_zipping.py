"""ZipIt!: channels of all models that answer alike are merged, those of one model too."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

import numpy as np
import torch
from torch import Tensor, nn

from npmerge.aggregate.aggregated import Aggregated
from npmerge.align.correlation import permute
from npmerge.align.moments import Covariances, covariances
from npmerge.data.streams import Data, example_of
from npmerge.methods import method
from npmerge.symmetry import Group, check_same_architecture, symmetry_on
from npmerge.zips.zipped import Zip

MIXED = -1
"""The origin of a cluster with channels of several models."""


@method(
    kind="aggregate",
    label="ZipIt!",
    row="ZipIt!",
    family="zip",
    needs=("data",),
    reference="stoica2024",
    aligns=True,
    place=60,
    use="For models that have learned different classes, whose neurons need not have partners.",
)
def zipit(
    models: Sequence[nn.Module],
    data: Data,
    *,
    groups: Sequence[Group] | None = None,
    alpha: float = 0.3,
    beta: float = 0.125,
    share: float = 1.0,
) -> Aggregated:
    r"""Merge the channels of all models in clusters, by the correlation of their activations.

    A merged channel is the mean of its cluster's, :math:`M = \mathrm{diag}(1 / |c|) C`, and whatever reads a channel
    reads its cluster's, :math:`U = C^\top`, with :math:`C` the indicator of the clusters; see :func:`clusters` and
    :class:`~npmerge.zips.zipped.Zip`. There are as many clusters as a model has channels.

    In a partial zip the last groups are kept apart: the merged network is k times as wide there, with k heads, whose
    mean it answers. It computes what the authors' does, whose heads are modules of their own; but the weights between
    two heads, which are zero, cost time here, and a norm over channels, as LayerNorm, sees those of all heads at once.

    A group that allows only permutations, that no activation shows, or whose activation shows others too, is merged
    by :func:`~npmerge.align.correlation.permute`, whatever the share.

    Args:
        models: two or more, of one architecture and width, not aligned. None is changed.
        data: re-iterable of batches; the labels are not used. One pass is made for each pair of models.
        groups: the symmetry groups, if already known.
        alpha: multiplies the similarity of a cluster at every merge; 0: what is merged already comes last. 0.3 is the
            authors'.
        beta: of the merges that a model's share is, how many may be within the model; 0.125 is the authors'.
        share: of the groups, in the order of their activations, those that are zipped; the others are kept apart.

    Returns:
        The merged model, whose batch norm is to be reset; in ``details["zip"]`` how it was made.

    Raises:
        ValueError: fewer than two models, or they differ in architecture or shape; an option is not from 0 to 1, or
            the data is empty.
        SymmetryError: the model's symmetry groups cannot be found.

    Source:
        Stoica et al. 2024, Section 4, for any network: one clustering for each symmetry group. In the authors' code a
        cluster with channels of two models counts as one of the first; here a merge is within a model only if all of
        its channels are.
    """
    if len(models) < 2:
        raise ValueError(f"models has {len(models)}: give at least two")
    for name, value in (("alpha", alpha), ("beta", beta), ("share", share)):
        if not 0 <= value <= 1:
            raise ValueError(f"{name} is {value}: it must be from 0 to 1")
    for model in models[1:]:
        check_same_architecture(models[0], model)
    groups = tuple(symmetry_on(models[0], example_of(data)) if groups is None else groups)
    count = len(models)
    measured = {
        (one, other): covariances(models[one], models[other], data, groups=groups)
        for one, other in combinations(range(count), 2)
    }
    permuted = Zip.of(
        *(permute(models[0], models[m], data, statistics=measured[0, m]) for m in range(1, count))
    )
    merges, unmerges = list(permuted.merges), list(permuted.unmerges)
    for number, group in enumerate(groups):
        if not is_free(group):
            continue
        if number < round(share * len(groups)):
            origins = torch.arange(count).repeat_interleave(group.size)
            labels = clusters(
                _correlation(measured, number, count), origins, group.size, alpha=alpha, beta=beta
            )
        else:
            labels = torch.arange(count * group.size)
        merges[number], unmerges[number] = joined(labels, group.size)
    zipped = Zip((groups,) * count, tuple(merges), tuple(unmerges))
    return Aggregated(zipped.apply(models), details={"zip": zipped})


def is_free(group: Group) -> bool:
    """Whether a group's channels can be merged and kept apart at will, and an activation shows how alike they are.

    Args:
        group: one of a model's.
    """
    return group.tap is not None and not group.tap.mixed and not group.permutations_only


def joined(labels: Tensor, size: int) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """The merge and the unmerge matrices of clusters: their means, and what stands in for each channel.

    Args:
        labels: ``int64 (N,)``, the number of the cluster of each channel, those of the first model first.
        size: how many channels a model has.
    """
    members = nn.functional.one_hot(labels).double()
    return (members / members.sum(0)).T.split(size, dim=1), members.split(size)


def clusters(
    similarity: Tensor, origins: Tensor, count: int, *, alpha: float, beta: float
) -> Tensor:
    """Merge the two clusters that are most alike, from single channels on, until so many are left.

    A merged cluster is as similar to others as the less similar of its two, times ``alpha``. Merges within a model
    are over when it has had ``beta`` of its share in all of them.

    Args:
        similarity: ``(N, N)``, of all models' channels, at most 1.
        origins: ``int64 (N,)``, the number of each channel's model.
        count: of clusters at the end; no model has more channels.
        alpha: from 0 to 1.
        beta: likewise.

    Returns:
        ``int64 (N,)``, the number of each channel's cluster; clusters are numbered by their first channels.
    """
    similar = similarity.double().numpy(force=True).copy()
    np.fill_diagonal(similar, -np.inf)
    total = len(similar)
    origin, labels = origins.numpy(force=True).copy(), np.arange(total)
    share = (total - count) / (origin.max() + 1)
    budget = np.full(origin.max() + 1, int(beta * share + 1e-9))
    best, partner = np.empty(total), np.empty(total, dtype=np.int64)
    stale = np.ones(total, dtype=bool)
    for _ in range(total - count):
        for row in stale.nonzero()[0]:
            own = origin[row]
            within = own != MIXED and not budget[own]
            values = np.where(origin == own, -np.inf, similar[row]) if within else similar[row]
            partner[row] = values.argmax()
            best[row] = values[partner[row]]
        first, second = sorted((best.argmax(), partner[best.argmax()]))
        merged = np.minimum(similar[first], similar[second])
        merged = alpha * merged if alpha else merged - 2  # below all that are not merged
        merged[[first, second]] = -np.inf
        similar[first] = similar[:, first] = merged
        similar[second] = similar[:, second] = -np.inf
        labels[labels == second] = first
        stale = (partner == first) | (partner == second) | (merged > best)
        stale[[first, second]] = True
        own = origin[first]
        if own != origin[second]:
            origin[first] = MIXED
        elif own != MIXED:
            budget[own] -= 1
            stale |= (origin == own) & (not budget[own])
    return torch.from_numpy(np.unique(labels, return_inverse=True)[1])


def _correlation(measured: dict[tuple[int, int], Covariances], number: int, count: int) -> Tensor:
    """Pearson correlations of all models' channels of one group; 0 for a channel that is constant."""
    blocks: list[list[Tensor]] = [[torch.empty(0)] * count for _ in range(count)]
    for (one, other), found in measured.items():
        blocks[one][one], blocks[other][other] = found.xx[number], found.yy[number]
        blocks[one][other], blocks[other][one] = found.xy[number], found.xy[number].T
    whole = torch.cat([torch.cat(row, 1) for row in blocks])
    scale = torch.where(whole.diagonal() > 0, whole.diagonal().rsqrt(), 0)
    return (scale[:, None] * whole * scale).clamp(-1, 1)
