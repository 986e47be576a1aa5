"""Agg by fine-tuning the mean of the two models."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import nn

from npmerge.aggregate.aggregated import Aggregated, learnable, taken_over
from npmerge.aggregate.averaging import mean
from npmerge.data.streams import Data
from npmerge.methods import method
from npmerge.training import Loss, fit


@method(
    kind="aggregate",
    label="Fine-tuning",
    row="Finetune-{align}",
    family="finetune",
    needs=("data", "labels"),
    reference="npmerge2024",
    place=30,
)
def finetune(
    a: nn.Module,
    b: nn.Module,
    data: Data,
    *,
    epochs: int = 10,
    lr: float = 1e-2,
    loss: Loss | None = None,
    mixed_precision: bool | None = None,
    saved: Path | None = None,
    on_epoch: Callable[[int, float], None] | None = None,
    schedule: Callable[[float], float] | None = None,
    validate: Callable[[nn.Module], float] | None = None,
    patience: int | None = None,
    progress: str | None = None,
) -> Aggregated:
    """Train the mean of two models with Adam: every parameter is free that A does not freeze (``requires_grad``).

    Args:
        a: model A.
        b: model B, of the same architecture and aligned to A.
        data: the optimisation data, any re-iterable of batches.
        epochs: passes over the data.
        lr: Adam's learning rate; the paper's is 0.01.
        loss: of the outputs and the batch; by default the cross-entropy of the labels.
        mixed_precision: bfloat16 autocast; by default where the device gains from it.
        saved: a file that is kept up to date, from which a learning that was cut off goes on; the caller deletes it.
        on_epoch: called with each epoch, counted from 1, and its mean loss.
        schedule: multiplies the learning rate; a function of the epoch, counted in fractions.
        validate: called with the model after each epoch; the lower what it returns, the better, and the best epoch is
            what is kept.
        patience: stop after so many epochs in a row that did not validate better; by default never.
        progress: label of the progress bar; none by default.

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
    history = fit(
        model, data, optimizer, epochs=epochs, loss=loss, mixed_precision=mixed_precision,
        saved=saved, on_epoch=on_epoch, schedule=schedule, patience=patience, progress=progress,
        validate=None if validate is None else partial(validate, model),
    )  # fmt: skip
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
