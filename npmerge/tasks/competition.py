"""Agg of task vectors whose entries compete: within a model by their size, between models by their agreement."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from npmerge.methods import method
from npmerge.tasks.vectors import as_one, check_share

CLIPPED = 1e-4
"""Share of the smallest and of the largest magnitudes that are clipped."""


@method(
    kind="aggregate",
    label="PCB",
    row="PCB-{align}",
    family="task",
    needs=("base",),
    reference="du2024",
    place=62,
    use="For fine-tuned copies that compete for the same parameters.",
)
@torch.no_grad()
def pcb(
    models: Sequence[nn.Module], *, base: nn.Module | None, keep: float = 0.05, scale: float = 1.2
) -> nn.Module:
    r"""Weigh each entry of a task vector by its size and by its agreement with all, and keep the best.

    Over all parameters at once, with magnitudes clipped at their 0.01 % and 99.99 % quantiles, the score of an entry is
    ``s_i = exp(k n(|tau_i|)^2) tanh(tau_i sum_j tau_j)``, where n maps the smallest to 0 and the largest to 1. Scores
    below the best share of a model's are clipped to its edge, the rest mapped to [0, 1] likewise; the result is
    ``theta_0 + scale * sum_i s_i tau_i / sum_i s_i``.

    Args:
        models: k of them, of one architecture, aligned to the first.
        base: the model that they were trained from.
        keep: the share of the entries of each model that stay.
        scale: the authors' lambda, which they also search for per task.

    Returns:
        The merged model.

    Raises:
        ValueError: ``keep`` is no share, there is no base, the base is the mean of the models, or an architecture
            differs.

    Source:
        Du et al. 2024, as in the authors' code, with the values of its example.
    """
    check_share("keep", keep)
    return as_one(models, base, lambda tau: scale * _competed(tau, keep))


def _competed(tau: Tensor, keep: float) -> Tensor:
    count, size = tau.shape
    edge = round(CLIPPED * (size - 1))
    sizes = tau.abs()
    sizes = sizes.clamp(_smallest(sizes, 1 + edge), _smallest(sizes, size - edge))
    scores = (count * _spread(sizes) ** 2).exp() * (tau * tau.sum(0)).tanh()
    scores = _spread(scores.clamp(min=_smallest(scores, max(1, size - round(keep * size)))))
    return (scores * sizes * tau.sign()).sum(0) / scores.sum(0).clamp(min=1e-12)


def _smallest(rows: Tensor, place: int) -> Tensor:
    return rows.kthvalue(place, dim=1, keepdim=True).values


def _spread(rows: Tensor) -> Tensor:
    """Rows from 0 to 1; zero where all entries are equal."""
    low, high = rows.aminmax(dim=1, keepdim=True)
    return torch.where(high > low, (rows - low) / (high - low), 0)
