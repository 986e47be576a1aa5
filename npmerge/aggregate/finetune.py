"""Agg by fine-tuning the mean of the two models: the paper's protocol, and a fairly tuned control."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from npmerge.aggregate.mean import mean
from npmerge.data.batches import Data
from npmerge.training import TrainingError, fit


@dataclass(frozen=True)
class Finetuned:
    """A fine-tuned model.

    Attributes:
        model: its batch norm statistics are not yet reset.
        history: the mean loss of each epoch.
        lr: the learning rate it was trained with.
        trials: for the tuned control, the validation score of every learning rate tried.
    """

    model: nn.Module
    history: list[float]
    lr: float
    trials: dict[float, float]


def finetune(
    a: nn.Module,
    b: nn.Module,
    data: Data,
    *,
    epochs: int = 10,
    lr: float = 1e-2,
    mixed_precision: bool | None = None,
    progress: str | None = None,
) -> Finetuned:
    """Train the mean of two models with Adam: every parameter is free.

    Args:
        a: model A.
        b: model B, of the same architecture and aligned to A.
        data: the optimisation data, any re-iterable of ``(images, labels)``.
        epochs: passes over the data.
        lr: Adam's learning rate; the paper's is 0.01.
        mixed_precision: bfloat16 autocast; by default where the device gains from it (CUDA).
        progress: label of the progress bar; none by default.

    Returns:
        The fine-tuned model; ``a`` and ``b`` are not changed.

    Raises:
        ValueError: the models differ in architecture or shape, the data is empty, or a label is out of range.
        TrainingError: the loss is not finite.

    Source:
        Section III-D.
    """
    model = mean(a, b)
    for parameter in model.parameters():
        parameter.requires_grad_()
    optimizer = torch.optim.Adam(model.parameters(), lr=lr, fused=True)
    history = fit(
        model, data, optimizer, epochs=epochs, mixed_precision=mixed_precision, progress=progress
    )
    model.train(a.training)
    return Finetuned(model, history, lr, {})


def finetune_tuned(
    a: nn.Module,
    b: nn.Module,
    data: Data,
    *,
    kept: Data,
    validate: Callable[[nn.Module], float],
    lrs: Sequence[float] = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2),
    trial_epochs: int = 10,
    epochs: int = 10,
    progress: str | None = None,
) -> Finetuned:
    """Fine-tune with a learning rate chosen on held-out optimisation data: the control the paper lacks.

    Args:
        a: model A.
        b: model B, of the same architecture and aligned to A.
        data: all the optimisation data, for the final run.
        kept: the part of it to try learning rates on.
        validate: scores a model on the rest of it, the higher the better (batch norm is its business too).
        lrs: the learning rates to try.
        trial_epochs: passes over ``kept`` for each.
        epochs: passes over ``data`` with the chosen one.
        progress: label of the progress bar; none by default.

    Returns:
        The fine-tuned model with its learning rate and the trials; ``a`` and ``b`` are not changed.

    Raises:
        ValueError: no learning rate to try, or as :func:`finetune`.
        TrainingError: every learning rate diverged.
    """
    if not lrs:
        raise ValueError("lrs is empty: give at least one learning rate to try")
    trials = {}
    for lr in lrs:
        try:
            label = f"{progress} lr={lr:g}" if progress else None
            trial = finetune(a, b, kept, epochs=trial_epochs, lr=lr, progress=label).model
            trials[lr] = validate(trial)
        except TrainingError:
            trials[lr] = -math.inf  # a learning rate that diverges is not chosen
    if not any(map(math.isfinite, trials.values())):
        raise TrainingError(f"every learning rate of {tuple(lrs)} diverged: try lower ones")
    best = finetune(
        a, b, data, epochs=epochs, lr=max(trials, key=lambda lr: trials[lr]), progress=progress
    )
    return Finetuned(best.model, best.history, best.lr, trials)
