"""Agg one model after the other: what a new one adds in the directions of those before it is left out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean

import torch
from torch import Tensor, nn

from npmerge.methods import method
from npmerge.tasks.singular import decomposed
from npmerge.tasks.vectors import added, check_share, task_vectors


@method(
    kind="aggregate",
    label="OPCM",
    row="OPCM-{align}",
    family="task",
    needs=("base",),
    reference="tang2025",
    place=62,
    use="Where models arrive one after the other and none can be kept.",
)
@torch.no_grad()
def opcm(
    models: Sequence[nn.Module], *, base: nn.Module | None, threshold: float = 0.5
) -> nn.Module:
    """Add one task vector after the other, each without what it has in the singular directions of the sum so far.

    Of a new matrix, seen in the singular directions of the sum, the diagonal is left out, and the block of the
    strongest ones. Vectors are added as they are. After each step the
    sum is scaled, as one vector, to the mean norm of the task vectors so far. The order of the models matters, and a
    model with a copy of itself is not that model: its vectors count twice, its matrices once.

    Args:
        models: in the order in which they are added; of one architecture, aligned to the first.
        base: the model that they were trained from.
        threshold: the block is that of the fewest directions that have more than this share of the sum of the singular
            values; 0.5 is the authors'.

    Returns:
        The merged model.

    Raises:
        ValueError: ``threshold`` is not in [0, 1), there is no base, the base is the mean of the models, or an
            architecture differs.

    Source:
        Tang et al. 2025.
    """
    check_share("threshold", threshold, zero=True, one=False)
    vectors = task_vectors(models, base)
    total = {name: tau[0] for name, tau in vectors.items()}
    norms, factor = [_norm(total)], 1.0
    for number in range(1, len(models)):
        new = {name: tau[number] for name, tau in vectors.items()}
        norms.append(_norm(new))
        total = {
            name: factor * old + _beside(old, new[name], threshold) for name, old in total.items()
        }
        size = _norm(total)
        if size:
            factor = size / fmean(norms)
            total = {name: tau / factor for name, tau in total.items()}
    return added(models, base, total)


def _beside(total: Tensor, new: Tensor, threshold: float) -> Tensor:
    """What a tensor adds to a sum, without what it has in the sum's own directions."""
    if new.ndim < 2:
        return new
    u, s, v = decomposed(total.flatten(1).double())
    matrix = new.flatten(1).double()
    inside = u.T @ matrix @ v.T
    block = int((s.cumsum(0) <= threshold * s.sum()).sum()) + 1
    left_out = torch.diag(inside.diagonal())
    left_out[:block, :block] = inside[:block, :block]
    return (matrix - u @ left_out @ v).view(new.shape).to(new)


def _norm(vector: Mapping[str, Tensor]) -> float:
    return float(torch.stack([tau.double().norm().cpu() for tau in vector.values()]).norm())
