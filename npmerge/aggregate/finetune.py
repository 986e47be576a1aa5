"""Agg by fine-tuning the mean of the two models: the paper's protocol, and a fairly tuned control."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from npmerge.aggregate.learn import learn, learn_together
from npmerge.aggregate.mean import mean
from npmerge.data.batches import Data
from npmerge.training import Run, TrainingError


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
    return learn(
        LearnWeights(a, b, data, lr=lr),
        epochs=epochs,
        mixed_precision=mixed_precision,
        progress=progress,
    )


class LearnWeights:
    """Fine-tuning about to begin, alone or together with others; see :func:`finetune`.

    Args:
        a: model A.
        b: model B, of the same architecture and aligned to A.
        data: the optimisation data.
        lr: Adam's learning rate.

    Raises:
        ValueError: the models differ in architecture or shape.
    """

    def __init__(self, a: nn.Module, b: nn.Module, data: Data, *, lr: float = 1e-2) -> None:
        model = mean(a, b)
        for parameter in model.parameters():
            parameter.requires_grad_()
        self._lr, self._mode = lr, a.training
        self.run = Run(model, data, torch.optim.Adam(model.parameters(), lr=lr, fused=True))

    def result(self, history: list[float]) -> Finetuned:
        """The fine-tuned model."""
        self.run.model.train(self._mode)
        return Finetuned(self.run.model, history, self._lr, {})


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
    (found,) = finetune_tuned_together(
        [(a, b)], data, kept=kept, validate=validate, lrs=lrs, trial_epochs=trial_epochs,
        epochs=epochs, progress=progress,
    )  # fmt: skip
    return found


def finetune_tuned_together(
    pairs: Sequence[tuple[nn.Module, nn.Module]],
    data: Data,
    *,
    kept: Data,
    validate: Callable[[nn.Module], float],
    lrs: Sequence[float] = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2),
    trial_epochs: int = 10,
    epochs: int = 10,
    at_once: int | None = None,
    progress: str | None = None,
) -> list[Finetuned]:
    """:func:`finetune_tuned` for several pairs of models, with all trials in step.

    Args:
        pairs: models A and B, B aligned to A.
        data: all the optimisation data, for the final runs.
        kept: the part of it to try learning rates on.
        validate: scores a model on the rest of it, the higher the better.
        lrs: the learning rates to try.
        trial_epochs: passes over ``kept`` for each.
        epochs: passes over ``data`` with the chosen one.
        at_once: models to train at the same time; by default one on a CPU and 16 on CUDA.
        progress: label of the progress bar; none by default.

    Returns:
        The fine-tuned models with their learning rates and the trials, in the order of the pairs.

    Raises:
        ValueError: no learning rate to try, or as :func:`finetune`.
        TrainingError: every learning rate of a pair diverged.
    """
    if not lrs:
        raise ValueError("lrs is empty: give at least one learning rate to try")
    trials: list[dict[float, float]] = []
    best: list[float] = []
    every = [(pair, lr) for pair in pairs for lr in lrs]
    found = learn_together(
        [LearnWeights(a, b, kept, lr=lr) for (a, b), lr in every],
        epochs=trial_epochs, at_once=at_once, progress=f"{progress} trials" if progress else None,
    )  # fmt: skip
    # A learning rate that diverges is not chosen.
    scores = [-math.inf if isinstance(one, TrainingError) else validate(one.model) for one in found]
    for index in range(len(pairs)):
        here = scores[index * len(lrs) : (index + 1) * len(lrs)]
        trials.append(dict(zip(lrs, here, strict=True)))
        if not any(map(math.isfinite, here)):
            raise TrainingError(f"every learning rate of {tuple(lrs)} diverged: try lower ones")
        best.append(max(trials[-1], key=trials[-1].__getitem__))
    final = learn_together(
        [LearnWeights(a, b, data, lr=lr) for (a, b), lr in zip(pairs, best, strict=True)],
        epochs=epochs, at_once=at_once, progress=progress,
    )  # fmt: skip
    results = []
    for one, lr, seen in zip(final, best, trials, strict=True):
        if isinstance(one, TrainingError):
            raise one
        results.append(Finetuned(one.model, one.history, lr, seen))
    return results
