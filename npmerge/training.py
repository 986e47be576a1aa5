"""One training loop. Base training, fine-tuning and learning alpha differ only in what they optimise."""

from __future__ import annotations

import contextlib
import math
import operator
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from tqdm import tqdm

from npmerge.data.batches import Data, check_labels, stream


class Optimizer(Protocol):
    """What the loop needs of an optimiser; every ``torch.optim.Optimizer`` has it."""

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """Each with its learning rate under ``"lr"``."""

    def zero_grad(self) -> None:
        """Forget the gradient."""

    def step(self) -> object:
        """Use the gradient."""


class TrainingError(ArithmeticError):
    """Training diverged: a loss is not finite."""


def fit(
    model: nn.Module,
    data: Data,
    optimizer: Optimizer,
    *,
    epochs: int,
    schedule: Callable[[float], float] | None = None,
    mixed_precision: bool | None = None,
    progress: str | None = None,
) -> list[float]:
    """Minimise the cross-entropy of ``model`` over ``data``; the model is changed in place and left in train mode.

    Nothing inside an epoch waits for the device: the losses stay there and are looked at once the epoch is over.

    Args:
        model: maps images ``(N, C, H, W)`` to logits ``(N, classes)``.
        data: any re-iterable of ``(images, labels)``; one pass is one epoch.
        optimizer: holds what is optimised.
        epochs: passes over the data.
        schedule: multiplies the optimiser's learning rates; a function of the epoch, counted in fractions.
        mixed_precision: bfloat16 autocast; by default where the device gains from it (CUDA).
        progress: label of the progress bar on stderr; none by default.

    Returns:
        The mean loss of each epoch.

    Raises:
        TrainingError: a loss is not finite; the message names epoch, step and learning rate.
        ValueError: the data is empty or a label is out of range.
    """
    if epochs < 0:
        raise ValueError(f"epochs is {epochs}: it cannot be negative")
    device = device_of(model)
    rates = [group["lr"] for group in optimizer.param_groups]
    steps = operator.length_hint(data)  # 0 for data that does not know
    if schedule and not steps:
        raise ValueError(
            "a learning-rate schedule needs data of known length: give data with len()"
        )
    model.train()
    history: list[float] = []
    try:
        with _bar(progress, epochs, steps) as bar:
            for epoch in range(epochs):
                losses: list[Tensor] = []
                used: list[float] = []
                for step, (images, labels) in enumerate(stream(data, device)):
                    factor = schedule(epoch + (step + 1) / steps) if schedule else 1.0
                    _set_rates(optimizer, [rate * factor for rate in rates])
                    with autocast(device, mixed_precision):
                        logits = model(channels_last(images))
                        check_labels(data, labels, logits.shape[1])
                        loss = cross_entropy(logits.float(), labels)
                    optimizer.zero_grad()
                    torch.autograd.backward(loss)
                    optimizer.step()
                    losses.append(loss.detach())
                    used.append(max(rates) * factor)
                    bar.update()
                history.append(_mean_loss(torch.stack(losses), used, epoch))
                bar.set_postfix(loss=f"{history[-1]:.3f}")
    finally:
        _set_rates(optimizer, rates)
    return history


def piecewise_linear(epochs: int, warmup_epochs: float) -> Callable[[float], float]:
    """The base models' schedule: 0 to 1 over the warm-up, then 1 to 0 at the end.

    Args:
        epochs: passes in all.
        warmup_epochs: passes until the peak.

    Returns:
        The multiplier of the peak learning rate, as a function of the epoch.

    Source:
        The protocol page (the authors' earlier code).
    """

    def multiplier(epoch: float) -> float:
        if epoch < warmup_epochs:
            return epoch / warmup_epochs
        return max(0.0, (epochs - epoch) / max(epochs - warmup_epochs, 1e-9))

    return multiplier


def device_of(model: nn.Module) -> torch.device:
    """The device of a model's first parameter; the CPU for a model without parameters."""
    return next((p.device for p in model.parameters()), torch.device("cpu"))


def channels_last(images: Tensor) -> Tensor:
    """Images ``(N, C, H, W)`` with their channels innermost in memory, as convolutions prefer; others as they are."""
    return images.contiguous(memory_format=torch.channels_last) if images.ndim == 4 else images


def autocast(
    device: torch.device, enabled: bool | None = None
) -> contextlib.AbstractContextManager[None]:
    """bfloat16 autocast on ``device``.

    Args:
        device: where the model runs.
        enabled: by default where the device gains from it: on CUDA.
    """
    if not (device.type == "cuda" if enabled is None else enabled):
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=torch.bfloat16)


def _bar(progress: str | None, epochs: int, steps: int) -> tqdm[Any]:
    total = epochs * steps or None
    return tqdm(
        total=total,
        desc=progress,
        unit="step",
        leave=False,
        disable=progress is None,
        mininterval=0.5,
    )


def _set_rates(optimizer: Optimizer, rates: list[float]) -> None:
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate


def _mean_loss(losses: Tensor, rates: list[float], epoch: int) -> float:
    values: list[float] = losses.tolist()
    for step, (value, rate) in enumerate(zip(values, rates, strict=True)):
        if not math.isfinite(value):
            raise TrainingError(
                f"the loss is {value} in epoch {epoch + 1}, step {step + 1}, at learning rate {rate:g}: try a lower one"
            )
    return sum(values) / len(values)
