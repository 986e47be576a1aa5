"""Agg by task arithmetic: what the models have learned is added up."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from npmerge.methods import method
from npmerge.tasks.vectors import by_tensor


@method(
    kind="aggregate",
    label="Task arithmetic",
    row="Task arithmetic-{align}",
    family="task",
    needs=("base",),
    reference="ilharco2023",
    place=62,
    use="For fine-tuned copies of one model; choose the scale on held-out data.",
)
@torch.no_grad()
def task_arithmetic(
    models: Sequence[nn.Module], *, base: nn.Module | None, scale: float = 0.8
) -> nn.Module:
    """Add up the task vectors: ``theta_0 + scale * sum_i tau_i`` with ``tau_i = theta_i - theta_0``.

    With ``scale`` 1/k it is the mean of the k models; a negative one lets a single model forget.

    Args:
        models: of one architecture, aligned to the first.
        base: the model that they were trained from.
        scale: the authors' lambda, to be chosen on held-out data; 0.8 is their example for two tasks.

    Returns:
        The merged model.

    Raises:
        ValueError: there is no base, the base is the mean of the models, or an architecture differs.

    Source:
        Ilharco et al. 2023.
    """
    return by_tensor(models, base, lambda tau: scale * tau.sum(0))
