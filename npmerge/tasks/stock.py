"""Agg between the base and the mean: as far from the base as the angles between the task vectors say."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from npmerge.methods import method
from npmerge.tasks.vectors import by_tensor


@method(
    kind="aggregate",
    label="Model Stock",
    row="Model Stock-{align}",
    family="task",
    needs=("base",),
    reference="jang2024",
    place=62,
    use="For a few fine-tuned copies on the same task, with nothing to tune.",
)
@torch.no_grad()
def model_stock(models: Sequence[nn.Module], *, base: nn.Module | None) -> nn.Module:
    """Interpolate each tensor between the base and the mean of the models by the angle between the task vectors.

    ``t * mean + (1 - t) * theta_0`` with ``t = k cos / (1 + (k - 1) cos)``. The cosine is the mean over the pairs of
    models. A tensor on which they do not agree, with a cosine of zero or less, stays the base's.

    Args:
        models: k of them, of one architecture, aligned to the first.
        base: the model that they were trained from.

    Returns:
        The merged model.

    Raises:
        ValueError: there is no base, the base is the mean of the models, or an architecture differs.

    Source:
        Jang et al. 2024; of more than two models the mean cosine, as model-merging tools do.
    """
    return by_tensor(
        models, base, lambda tau: _share(tau.reshape(len(tau), -1).double()).to(tau) * tau.mean(0)
    )


def _share(rows: Tensor) -> Tensor:
    """The share t of the mean."""
    count, unit = len(rows), normalize(rows, dim=1)
    if count == 1:
        return torch.ones_like(rows[0, 0])
    pairs = unit.sum(0).square().sum() - unit.square().sum()
    cosine = (pairs / (count * (count - 1))).clamp(min=0)
    return count * cosine / (1 + (count - 1) * cosine)
