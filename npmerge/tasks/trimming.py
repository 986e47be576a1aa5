"""Agg of what is left of the task vectors when small entries and the losers of a vote on the sign are gone."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from npmerge.methods import method
from npmerge.tasks.vectors import as_one, check_share


@method(
    kind="aggregate",
    label="TIES",
    row="TIES-{align}",
    family="task",
    needs=("base",),
    reference="yadav2023",
    place=62,
    use="For many fine-tuned copies whose changes have opposite signs.",
)
@torch.no_grad()
def ties(
    models: Sequence[nn.Module], *, base: nn.Module | None, keep: float = 0.2, scale: float = 1.0
) -> nn.Module:
    """Trim the task vectors, elect a sign for each parameter, and add the mean of those that agree to the base.

    Each task vector keeps its largest entries, by magnitude over all parameters at once (other tools trim tensor by
    tensor). A parameter's sign is that of the sum of what is left; where this is zero, the most frequent one. The mean
    is over the entries that are left and have that sign (others take their sum, and a smaller ``scale``).

    Args:
        models: of one architecture, aligned to the first.
        base: the model that they were trained from.
        keep: the share of the entries that each task vector keeps.
        scale: the authors' lambda; 1 is theirs without validation data, with it 0.8 to 2.5.

    Returns:
        The merged model.

    Raises:
        ValueError: ``keep`` is no share, there is no base, the base is the mean of the models, or an architecture
            differs.

    Source:
        Yadav et al. 2023, Algorithm 1, with the defaults of the authors' code.
    """
    check_share("keep", keep)
    return as_one(models, base, lambda tau: scale * disjoint_mean(trimmed(tau, keep)))


def trimmed(tau: Tensor, keep: float) -> Tensor:
    """The largest entries of each row by magnitude, and zeros; all entries as large as the last one stay.

    Args:
        tau: ``(k, n)``.
        keep: the share that stays.
    """
    sizes = tau.abs()
    count = max(1, round(keep * tau.shape[1]))
    last = sizes.kthvalue(tau.shape[1] - count + 1, dim=1, keepdim=True).values
    return torch.where(sizes >= last, tau, 0)


def disjoint_mean(tau: Tensor) -> Tensor:
    """The mean over the models' entries whose sign is that of their sum; zero where there are none.

    Args:
        tau: ``(k, n)``; where a sum is zero, the sign is the one that most other sums have.
    """
    signs = tau.sum(0).sign()
    signs = torch.where(signs == 0, signs.sum().sign(), signs)
    agreeing = tau * signs > 0
    return torch.where(agreeing, tau, 0).sum(0) / agreeing.sum(0).clamp(min=1)
