"""MuDSC: channels are matched by the correlations of their weights and of their activations together."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from npmerge.align.alignment import Alignment
from npmerge.align.correlation import assignment, permute
from npmerge.align.joint_matching import parameters_of
from npmerge.align.moments import Covariances, covariances
from npmerge.align.rebasin import Descent, Tensors, channel_rows
from npmerge.data.streams import Data
from npmerge.methods import method
from npmerge.symmetry import Group

PATIENCE = 5
"""Sweeps that do not raise the mean similarity of matched channels, after which it ends."""
NOISE = 1e-12
"""A channel's weights are all the same where their variance is a smaller share of the mean of their squares."""
CLEAR = 1e-6
"""A group is changed only if that raises its mean similarity by more: products of weights are in float32."""


@method(
    kind="align", label="MuDSC", short="MuDSC", family="alignment", needs=("data",),
    reference="xu2024", place=4,
    use="Where neither weights nor activations alone tell which neurons belong together.",
)  # fmt: skip
def mudsc(
    a: nn.Module,
    b: nn.Module,
    data: Data,
    *,
    groups: Sequence[Group] | None = None,
    statistics: Covariances | None = None,
    seed: int = 0,
    phi: float = 0.5,
    max_sweeps: int = 100,
) -> Alignment:
    r"""Permute B's channels so that ``phi S_weights + (1 - phi) S_activations`` of matched channels is largest.

    Both are Pearson correlations of A's channels with B's: of all weights that a channel has, where the other groups of
    B are permuted as they are by then, and of its activations. It begins with
    :func:`~npmerge.align.correlation.permute`, whose activations stay, and goes on as weight matching does: the groups
    are visited in random order, and each is solved exactly with the others held fixed. No objective is common to all
    groups: if their mean similarity has not risen for five sweeps, though groups still change, the best sweep counts.

    Args:
        a: Model A; its device is used.
        b: Model B, of the same architecture.
        data: Re-iterable of batches; as many passes as Permute makes, and one more for groups that share an activation.
        groups: The symmetry groups, if already known.
        statistics: What :func:`npmerge.align.moments.covariances` has measured, if that is known already.
        seed: Of the order in which the groups are visited.
        phi: The weights' share, from 0, which is Permute, to 1. The authors choose it from 0.1 to 0.9 by the merged
            model's accuracy on training data; the default is the middle.
        max_sweeps: The most sweeps over all groups.

    Returns:
        A permutation per group.

    Raises:
        ValueError: If ``phi`` is not in [0, 1], the models differ in architecture or shape, the data is empty, or a
            parameter or an activation is not finite.
        SymmetryError: If the model's symmetry groups cannot be found.

    Source:
        Xu et al. 2024, "Training-Free Pretrained Model Merging", and its code.
    """
    if not 0 <= phi <= 1:
        raise ValueError(f"phi is {phi}: give the weights' share, from 0 to 1")
    if statistics is None:
        statistics = covariances(a, b, data, groups=groups, variances_only=True)
    start = permute(a, b, data, statistics=statistics)
    moved = start.apply(b)
    pairs = zip(statistics.correlations(), start.maps, strict=True)
    activations = [correlation.cpu()[:, order] for correlation, order in pairs]
    if any(group.tap is not None and group.tap.mixed for group in start.groups):
        again = covariances(a, moved, data, groups=start.groups, variances_only=True)
        activations = [correlation.cpu() for correlation in again.correlations()]
    fixed = parameters_of(a)
    weights = {name: p.to(fixed[name].device) for name, p in parameters_of(moved).items()}
    descent = _DualDescent(fixed, weights, start.groups, activations, phi)
    return Alignment.from_permutations(start.groups, descent.run(seed, max_sweeps)).compose(start)


class _DualDescent(Descent):
    """Coordinate descent whose gains are correlations, of weights and activations."""

    def __init__(
        self,
        fixed: Tensors,
        moved: Tensors,
        groups: Sequence[Group],
        activations: Sequence[Tensor],
        phi: float,
    ) -> None:
        super().__init__(fixed, moved, groups)
        self.activations, self.phi = activations, phi
        # Another order of a channel's weights changes neither their mean nor their variance.
        self.moments = [
            [self._moments(tensors, index) for tensors in (self.x, self.y)]
            for index in range(len(groups))
        ]
        self.values = [-math.inf] * len(groups)

    def run(self, seed: int, max_sweeps: int) -> list[Tensor]:
        """Visit the groups until none changes; if their values stop to rise before, return the best sweep's."""
        generator = torch.Generator().manual_seed(seed)
        best, value, waited = list(self.permutations), -math.inf, 0
        for _ in range(max_sweeps):
            order = torch.randperm(len(self.groups), generator=generator).tolist()
            if not sum([self._improve(index) for index in order]):
                return self.permutations
            waited += 1
            if sum(self.values) > value:
                best, value, waited = list(self.permutations), sum(self.values), 0
            if waited == PATIENCE:
                break
        return best

    def _improve(self, index: int) -> bool:
        similarity = self._similarity(index)
        old, new = self.permutations[index], assignment(similarity, self.groups[index])
        before, after = (float(similarity.gather(1, order[:, None]).mean()) for order in (old, new))
        changed = after > before + CLEAR
        self.values[index] = after if changed else before
        if changed:
            self._move(index, new, self._orders(index, new))
        return changed

    def _similarity(self, index: int) -> Tensor:
        self._update_gains(index)
        (count, mean_a, var_a), (_, mean_b, var_b) = self.moments[index]
        products = self.gains[index].cpu().double() / count - torch.outer(mean_a, mean_b)
        weights = Covariances((self.groups[index],), (var_a,), (var_b,), (products,), (count,))
        return self.phi * weights.correlations()[0] + (1 - self.phi) * self.activations[index]

    def _moments(self, tensors: Tensors, index: int) -> tuple[int, Tensor, Tensor]:
        """How many weights a channel has, their mean and their variance, 0 where that is rounding."""
        size = self.groups[index].size
        rows = [channel_rows(tensors[slot.name], slot, size) for slot in self.slots[index]]
        every = torch.cat([row.cpu().double() for row in rows] or [torch.zeros(size, 1)], dim=1)
        variance = every.var(1, correction=0)
        noise = NOISE * every.square().mean(1)
        return every.shape[1], every.mean(1), torch.where(variance > noise, variance, 0)
