"""Agg of task matrices with one singular value for all directions: no task drowns another."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from npmerge.methods import method
from npmerge.tasks.singular import Singular, by_matrix, decomposed, joined, product, strongest
from npmerge.tasks.vectors import by_tensor, check_share


@method(
    kind="aggregate",
    label="Iso-C",
    row="Iso-C-{align}",
    family="task",
    needs=("base",),
    reference="marczak2025",
    place=62,
    use="Where a few directions of the summed changes outweigh all others.",
)
@torch.no_grad()
def iso_c(models: Sequence[nn.Module], *, base: nn.Module | None, scale: float = 1.0) -> nn.Module:
    """Add up the task matrices, and give all singular directions of the sum their mean singular value.

    Directions without a singular value are left out: they are arbitrary. What is no matrix, see
    :func:`~npmerge.tasks.singular.by_matrix`, is averaged.

    Args:
        models: of one architecture, aligned to the first.
        base: the model that they were trained from.
        scale: multiplies what is added to the base; to be chosen on held-out data.

    Returns:
        The merged model.

    Raises:
        ValueError: there is no base, the base is the mean of the models, or an architecture differs.

    Source:
        Marczak et al. 2025, Iso-C; convolutions as matrices are ours.
    """
    return by_tensor(models, base, lambda tau: scale * by_matrix(tau, _common))


@method(
    kind="aggregate",
    label="Iso-CTS",
    row="Iso-CTS-{align}",
    family="task",
    needs=("base",),
    reference="marczak2025",
    place=62,
    use="As Iso-C, for so many tasks that each needs directions of its own.",
)
@torch.no_grad()
def iso_cts(
    models: Sequence[nn.Module],
    *,
    base: nn.Module | None,
    common: float = 0.8,
    scale: float = 1.0,
) -> nn.Module:
    """Iso-C whose weakest directions make room for what each task has beside the common ones.

    Of the r directions of the sum the strongest stay; the others are replaced by as many for each task, the strongest
    of what is left of its matrix without the common outputs. All are made orthonormal and get their mean singular
    value.

    Args:
        models: of one architecture, aligned to the first.
        base: the model that they were trained from.
        common: the share of the directions that are common, rounded up so that all tasks have equally many of the rest.
        scale: multiplies what is added to the base; to be chosen on held-out data.

    Returns:
        The merged model.

    Raises:
        ValueError: ``common`` is no share, there is no base, the base is the mean of the models, or an architecture
            differs.

    Source:
        Marczak et al. 2025, Iso-CTS; convolutions as matrices are ours.
    """
    check_share("common", common, zero=True)

    def change(tau: Tensor) -> Tensor:
        rank = min(tau.shape[1:])
        own = (rank - int(common * rank)) // len(tau)
        shared = strongest(decomposed(tau.sum(0)), rank - own * len(tau))
        outputs = shared[0]
        left = [decomposed(matrix - outputs @ (outputs.T @ matrix)) for matrix in tau]
        return _isotropic(joined([shared, *(strongest(one, own) for one in left)]))

    return by_tensor(models, base, lambda tau: scale * by_matrix(tau, change))


def _common(tau: Tensor) -> Tensor:
    return _isotropic(decomposed(tau.sum(0)))


def _isotropic(directions: Singular) -> Tensor:
    u, s, v = directions
    return product((u, s.mean().expand_as(s) if len(s) else s, v))
