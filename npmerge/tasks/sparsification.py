"""Agg of task vectors of which entries are dropped: at random, at random by their rank, or the largest and smallest."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from npmerge.methods import method
from npmerge.tasks.trimming import disjoint_mean
from npmerge.tasks.vectors import by_tensor, check_share


@method(
    kind="aggregate",
    label="DARE",
    row="DARE-{align}",
    family="task",
    needs=("base",),
    reference="yu2024",
    place=62,
    use="For large fine-tuned models with small changes; look at more than one seed.",
)
@torch.no_grad()
def dare(
    models: Sequence[nn.Module],
    *,
    base: nn.Module | None,
    drop: float = 0.2,
    scale: float = 0.8,
    seed: int = 0,
) -> nn.Module:
    """Drop entries of the task vectors at random, divide the others by ``1 - drop``, and add all up.

    ``theta_0 + scale * sum_i m_i tau_i / (1 - drop)`` with masks m: on average over the seeds, task arithmetic.

    Args:
        models: of one architecture, aligned to the first.
        base: the model that they were trained from.
        drop: the probability of an entry to be dropped; 0.2 is the authors' example of a merge, and 0.9 of a single
            large model, whose task vectors are small.
        scale: as of :func:`~npmerge.tasks.arithmetic.task_arithmetic`; 1/k for the mean, which the authors' example
            takes.
        seed: of what is dropped.

    Returns:
        The merged model.

    Raises:
        ValueError: ``drop`` is not in [0, 1), there is no base, the base is the mean of the models, or an architecture
            differs.

    Source:
        Yu et al. 2024.
    """
    check_share("drop", drop, zero=True, one=False)
    generator = torch.Generator().manual_seed(seed)
    kept = torch.tensor(1 - drop, dtype=torch.float64)
    return by_tensor(models, base, lambda tau: scale * _drawn(tau, kept, generator).sum(0))


@method(
    kind="aggregate",
    label="DELLA",
    row="DELLA-{align}",
    family="task",
    needs=("base",),
    reference="deep2024",
    place=62,
    use="As DARE, where large changes should be kept rather than small ones.",
)
@torch.no_grad()
def della(
    models: Sequence[nn.Module],
    *,
    base: nn.Module | None,
    drop: float = 0.3,
    window: float = 0.14,
    scale: float = 1.1,
    seed: int = 0,
) -> nn.Module:
    """Drop entries at random, small ones more often, then elect signs and take the mean of those that agree.

    The probability to be dropped falls linearly with the rank of the magnitude in its row (an output channel's weights;
    a tensor of one axis is one row), from ``drop + window / 2`` to ``drop - window / 2``. What is left is divided by
    its probability to stay. Signs are elected and the mean taken as in :func:`~npmerge.tasks.trimming.ties`.

    Args:
        models: of one architecture, aligned to the first.
        base: the model that they were trained from.
        drop: the mean probability to be dropped.
        window: how far the probabilities of the smallest and the largest entry are apart.
        scale: the authors' lambda.
        seed: of what is dropped.

    Returns:
        The merged model.

    Raises:
        ValueError: a probability would not be in [0, 1), there is no base, the base is the mean of the models, or an
            architecture differs.

    Source:
        Deep et al. 2024, with the values of their code's example.
    """
    if window < 0 or drop - window / 2 < 0 or drop + window / 2 >= 1:
        raise ValueError(
            f"drop is {drop} and window {window}: drop - window / 2 must be at least 0, drop + window / 2 less than 1"
        )
    generator = torch.Generator().manual_seed(seed)

    def change(tau: Tensor) -> Tensor:
        kept = 1 - drop + window * (_ranks(tau) - 0.5)
        return scale * disjoint_mean(_drawn(tau, kept, generator))

    return by_tensor(models, base, change)


@method(
    kind="aggregate",
    label="Breadcrumbs",
    row="Breadcrumbs-{align}",
    family="task",
    needs=("base",),
    reference="davari2024",
    place=62,
    use="For many fine-tuned copies, where both outliers and noise are to go.",
)
@torch.no_grad()
def breadcrumbs(
    models: Sequence[nn.Module],
    *,
    base: nn.Module | None,
    density: float = 0.9,
    gamma: float = 0.01,
    scale: float = 0.8,
) -> nn.Module:
    """Drop the largest and the smallest entries of each tensor of the task vectors, and add up what is left.

    Args:
        models: of one architecture, aligned to the first.
        base: the model that they were trained from.
        density: the share of a tensor that stays; 0.9 and gamma 0.01 are usual in model-merging tools.
        gamma: the share of the largest ones, by magnitude, that is dropped.
        scale: as of :func:`~npmerge.tasks.arithmetic.task_arithmetic`.

    Returns:
        The merged model.

    Raises:
        ValueError: ``density`` or ``gamma`` is no share, or they are more than 1 together; there is no base, the base
            is the mean of the models, or an architecture differs.

    Source:
        Davari & Belilovsky 2024.
    """
    check_share("density", density)
    check_share("gamma", gamma, zero=True)
    if density + gamma > 1:
        raise ValueError(
            f"density is {density} and gamma {gamma}: of what gamma leaves, density can at most keep all, {1 - gamma:g}"
        )

    def change(tau: Tensor) -> Tensor:
        rows = tau.reshape(len(tau), -1)
        size = rows.shape[1]
        end = size - int(gamma * size)
        order = rows.abs().argsort(dim=1, stable=True)
        middle = order[:, max(0, end - round(density * size)) : end]
        left = torch.zeros_like(rows).scatter(1, middle, rows.gather(1, middle))
        return scale * left.sum(0).view(tau.shape[1:])

    return by_tensor(models, base, change)


def _drawn(tau: Tensor, kept: Tensor, generator: torch.Generator) -> Tensor:
    """Entries that stay with a probability, divided by it; zero for the others."""
    stays = torch.rand(tau.shape, generator=generator, dtype=torch.float64).to(tau.device) < kept
    return torch.where(stays, tau / kept.to(tau), 0)


def _ranks(tau: Tensor) -> Tensor:
    """The rank of an entry's magnitude in its row, from 0 for the smallest to 1; one half where it is alone."""
    rows = tau.flatten(2) if tau.ndim > 2 else tau.reshape(len(tau), 1, -1)
    last = rows.shape[2] - 1
    ranks = rows.abs().argsort(dim=2, stable=True).argsort(dim=2).double()
    return (ranks / last if last else torch.full_like(ranks, 0.5)).view(tau.shape)
