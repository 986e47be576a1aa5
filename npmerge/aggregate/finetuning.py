"""Agg by fine-tuning the mean of the two models."""

from __future__ import annotations

import torch
from torch import nn

from npmerge.aggregate.aggregated import Aggregated, learnable, taken_over
from npmerge.aggregate.averaging import mean
from npmerge.data.streams import Data
from npmerge.methods import method
from npmerge.training import Learning


@method(
    kind="aggregate",
    label="Fine-tuning",
    row="Finetune-{align}",
    family="finetune",
    needs=("data", "labels"),
    reference="npmerge2024",
    place=30,
    use="Where labelled data is at hand: the rival that every learned merge must beat at equal steps.",
)
def finetune(
    a: nn.Module,
    b: nn.Module,
    data: Data,
    *,
    epochs: int = 10,
    lr: float = 1e-2,
    learning: Learning | None = None,
) -> Aggregated:
    """Train the mean of two models with Adam: every parameter is free that A does not freeze (``requires_grad``).

    Args:
        a: model A.
        b: model B, of the same architecture and aligned to A.
        data: the optimisation data, any re-iterable of batches.
        epochs: passes over the data.
        lr: Adam's learning rate; the paper's is 0.01.
        learning: how; see :class:`~npmerge.training.Learning`.

    Returns:
        The fine-tuned model; ``a`` and ``b`` are not changed.

    Raises:
        ValueError: the models differ in architecture or shape, every parameter is frozen, the data is empty, or a label
            is out of range.
        TrainingError: the loss is not finite.

    Source:
        Section III-D.
    """
    model, optimizer = learning_weights(a, b, lr=lr)
    history = (learning or Learning()).fit(model, data, optimizer, epochs=epochs)
    return Aggregated(taken_over(a, model), history)


def learning_weights(
    a: nn.Module, b: nn.Module, *, lr: float
) -> tuple[nn.Module, torch.optim.Optimizer]:
    """Fine-tuning about to begin: the mean of two models, and the optimiser of its parameters.

    Args:
        a: model A.
        b: model B, aligned to A.
        lr: Adam's learning rate.

    Raises:
        ValueError: every parameter is frozen.
    """
    model = mean(a, b)
    return model, torch.optim.Adam(learnable(model).values(), lr=lr, fused=True)
