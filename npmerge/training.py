"""One training loop. Base training, fine-tuning and learning alpha differ only in what they optimise."""

from __future__ import annotations

import copy
import math
import operator
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from tqdm import tqdm

from npmerge._resume import Resume
from npmerge.checks import EPOCHS, check_finite, check_whole
from npmerge.data.streams import (
    Batch,
    Data,
    classified,
    mapped,
    outputs_of,
    size_of,
    stream,
)
from npmerge.device import (
    autocast,
    device_of,
    free_memory,
    gains_from_bfloat16,
    sound_convolutions,
)
from npmerge.named import user_code

Loss = Callable[[Any, Batch], Tensor]
"""``loss(outputs, batch)``: one number, from what the model answered to a batch."""

SAVE_EVERY = 120.0
"""Seconds between two times that a training which can be resumed is saved."""


class Optimizer(Protocol):
    """What the loop needs of an optimiser; every ``torch.optim.Optimizer`` has it."""

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """Each with its learning rate under ``"lr"``."""

    def zero_grad(self) -> None:
        """Forget the gradient."""

    def step(self) -> object:
        """Use the gradient."""

    def state_dict(self) -> Mapping[str, Any]:
        """All that a training needs to go on; asked for only where it can be resumed, like the next."""

    def load_state_dict(self, state: Any, /) -> None:
        """Go on from there."""


class TrainingError(ArithmeticError):
    """Training diverged: a loss is not finite."""


class OutOfMemoryError(RuntimeError):
    """The device's memory does not hold a training step."""


def fit(
    model: nn.Module,
    data: Data,
    optimizer: Optimizer,
    *,
    epochs: int,
    schedule: Callable[[float], float] | None = None,
    loss: Loss | None = None,
    mixed_precision: bool | None = None,
    compile: bool = False,  # noqa: A002 - the word users know
    saved: Path | None = None,
    save_every: float = SAVE_EVERY,
    on_epoch: Callable[[int, float], None] | None = None,
    validate: Callable[[], float] | None = None,
    patience: int | None = None,
    progress: str | None = None,
) -> list[float]:
    """Minimise a loss of ``model`` over ``data``; the model is changed in place and left in train mode.

    Nothing inside an epoch waits for the device, but for a progress bar: the losses stay there and are looked at once
    the epoch is over. (The labels of data other than npmerge's own batches are checked step by step, which does wait.)

    Args:
        model: maps a batch's inputs to logits ``(N, classes)``, or to what ``loss`` takes.
        data: any re-iterable of batches; one pass is one epoch.
        optimizer: holds what is optimised.
        epochs: passes over the data.
        schedule: multiplies the optimiser's learning rates; a function of the epoch, counted in fractions.
        loss: of the outputs and the batch; by default the cross-entropy of the labels.
        mixed_precision: bfloat16 autocast; by default where the device gains from it.
        compile: run the model through ``torch.compile``.
        saved: a file that is kept up to date at the ends of epochs. If a training that began alike was cut off, this
            one goes on from it, to the bits of an uninterrupted one on the same kind of processor, as long as a pass
            over the data depends on nothing but its ``epoch`` (as :class:`~npmerge.data.batches.Batches`) and PyTorch's
            own random generator. The file is the caller's to delete.
        save_every: seconds to pass between two times that it is written; a shorter training leaves none.
        on_epoch: called with each epoch, counted from 1, and its mean loss; not again for those of a resumed training.
        validate: called after each epoch; the lower what it returns, the better. Model and optimiser are put back to
            the best epoch at the end.
        patience: stop after so many epochs in a row that did not validate better; by default never.
        progress: label of the progress bar on stderr; none by default.

    Returns:
        The mean loss of each epoch.

    Raises:
        TrainingError: a loss is not finite; the message names epoch, step and learning rate.
        OutOfMemoryError: a step does not fit into the device's memory; the message says which batch size does.
        OSError: ``saved`` cannot be written.
        ValueError: the data is empty, its batches are malformed, a label, ``epochs`` or a learning rate is out of
            range, the model is in float16, the loss gives no number to learn by, ``patience`` has nothing to go by, or
            both ``validate`` and ``saved`` are given.
    """
    check_whole("epochs", epochs, most=EPOCHS)
    if patience is not None and (validate is None or patience < 1):
        raise ValueError(f"patience is {patience}: give at least 1, and validation data")
    if validate is not None and saved is not None:
        raise ValueError("a training that validates cannot be resumed: give validation or saved")
    steps = operator.length_hint(data)  # 0 where the data does not know
    if schedule is not None and not steps:
        raise ValueError(
            "a learning-rate schedule needs data of known length: give data with len()"
        )
    device = device_of(model)
    if any(parameter.dtype == torch.float16 for parameter in model.parameters()):
        raise ValueError(
            "a model in float16 does not learn: give model.float(), and mixed_precision for speed"
        )
    mixed = gains_from_bfloat16(device) if mixed_precision is None else mixed_precision
    forward = torch.compile(model) if compile else model
    peaks = [float(group["lr"]) for group in optimizer.param_groups]
    for peak in peaks:
        check_finite("lr", peak, above=0)

    def step(batch: Batch) -> Tensor:
        with autocast(device, mixed):
            outputs = outputs_of(forward, batch)
            value = (
                cross_entropy(*classified(outputs, batch, data))
                if loss is None
                else _own(loss, outputs, batch)
            )
        optimizer.zero_grad()
        torch.autograd.backward(value)
        optimizer.step()
        return value.detach()

    model.train()
    resume, best = None, None if validate is None else _Best(model, optimizer)
    history: list[float] = []
    if saved is not None:
        conditions = {
            "epochs": epochs,
            "steps": steps,
            "schedule": [schedule(epoch) for epoch in range(epochs)] if schedule else None,
            "bfloat16": mixed,
            "compile": compile,
        }
        resume = Resume(saved, save_every, model, optimizer, data, conditions)
        history = resume.history()
    sound = sound_convolutions(model) if mixed and device.type == "cpu" else nullcontext()
    try:
        with sound, _bar(progress, epochs * steps, len(history) * steps) as bar:
            for epoch in range(len(history), epochs):
                losses: list[Tensor] = []
                factors: list[float] = []
                for number, batch in enumerate(stream(data, device), start=1):
                    factors.append(schedule(epoch + number / steps) if schedule else 1.0)
                    _set_rates(optimizer, [peak * factors[-1] for peak in peaks])
                    try:
                        losses.append(step(batch))
                    except torch.OutOfMemoryError as error:
                        raise OutOfMemoryError(_what_fits(step, batch, device)) from error
                    if bar.update():  # shown, at most twice a second
                        bar.set_postfix(loss=f"{losses[-1].item():.3f}", refresh=False)
                rates = [max(peaks) * factor for factor in factors]
                history.append(_mean_loss(torch.stack(losses).tolist(), rates, epoch))
                bar.set_postfix(loss=f"{history[-1]:.3f}")
                if on_epoch is not None:
                    on_epoch(epoch + 1, history[-1])
                if resume is not None:
                    resume.save(history, finished=epoch + 1 == epochs)
                if best is not None and validate is not None:
                    best.note(validate())
                    bar.set_postfix(loss=f"{history[-1]:.3f}", best=f"{best.value:.3f}")
                    if best.waited == patience:
                        break
    finally:
        _set_rates(optimizer, peaks)
    if best is not None:
        best.restore()
    return history


@dataclass(frozen=True)
class Learning:
    """How something is learned, whatever it is: what all methods that learn take alike.

    Attributes:
        loss: of the outputs and the batch; by default the cross-entropy of the labels.
        mixed_precision: bfloat16 autocast; by default where the device gains from it.
        saved: a file that is kept up to date, from which a learning that was cut off goes on; the caller deletes it.
        on_epoch: called with each epoch, counted from 1, and its mean loss.
        schedule: multiplies the learning rate; a function of the epoch, counted in fractions.
        validate: called with the model after each epoch; the lower what it returns, the better, and the best epoch is
            what is kept.
        patience: stop after so many epochs in a row that did not validate better; by default never.
        progress: label of the progress bar; none by default.
    """

    loss: Loss | None = None
    mixed_precision: bool | None = None
    saved: Path | None = None
    on_epoch: Callable[[int, float], None] | None = None
    schedule: Callable[[float], float] | None = None
    validate: Callable[[nn.Module], float] | None = None
    patience: int | None = None
    progress: str | None = None

    def fit(
        self, model: nn.Module, data: Data, optimizer: Optimizer, *, epochs: int
    ) -> list[float]:
        """:func:`fit` in this way.

        Args:
            model: changed in place.
            data: any re-iterable of batches.
            optimizer: holds what is optimised.
            epochs: passes over the data.

        Returns:
            The mean loss of each epoch.
        """
        return fit(
            model, data, optimizer, epochs=epochs, loss=self.loss,
            mixed_precision=self.mixed_precision, saved=self.saved, on_epoch=self.on_epoch,
            schedule=self.schedule, patience=self.patience, progress=self.progress,
            validate=None if self.validate is None else partial(self.validate, model),
        )  # fmt: skip


class _Best:
    """The epoch that validates best."""

    def __init__(self, model: nn.Module, optimizer: Optimizer) -> None:
        self._learns: tuple[Any, ...] = (model, optimizer)
        self._states: list[Any] = []
        self.value, self.waited = math.inf, 0

    def note(self, value: float) -> None:
        """An epoch is over, and the model validates so."""
        self.waited += 1
        if value < self.value:
            self.value, self.waited = value, 0
            self._states = [copy.deepcopy(one.state_dict()) for one in self._learns]

    def restore(self) -> None:
        """Put model and optimiser back to where they were best."""
        for one, state in zip(self._learns, self._states, strict=False):  # no epoch, no state
            one.load_state_dict(state)


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
    return _after_warm_up(
        warmup_epochs, lambda epoch: max(0.0, (epochs - epoch) / max(epochs - warmup_epochs, 1e-9))
    )


def warmup_cosine(epochs: int, warmup_epochs: float) -> Callable[[float], float]:
    """ImageNet's schedule: linearly from 0 to 1 over the warm-up, then half a cosine to 0 at the end.

    Args:
        epochs: passes in all.
        warmup_epochs: passes until the peak.

    Returns:
        The multiplier of the peak learning rate, as a function of the epoch.

    Source:
        The protocol page (the authors' earlier code).
    """

    def fall(epoch: float) -> float:
        done = (epoch - warmup_epochs) / max(epochs - warmup_epochs, 1e-9)
        return 0.5 * (1 + math.cos(math.pi * min(1.0, done)))

    return _after_warm_up(warmup_epochs, fall)


def _after_warm_up(
    warmup_epochs: float, fall: Callable[[float], float]
) -> Callable[[float], float]:
    return lambda epoch: epoch / warmup_epochs if epoch < warmup_epochs else fall(epoch)


def _own(loss: Loss, outputs: Any, batch: Batch) -> Tensor:
    """A user's loss, if it can be learned by."""
    name = getattr(loss, "__name__", type(loss).__name__)
    with user_code(f"loss {name!r}"):
        value = loss(outputs, batch)
    if not isinstance(value, Tensor) or value.numel() != 1 or not value.requires_grad:
        found = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(
            f"loss {name!r} gives {found}: give one number, a tensor that is computed of the model's outputs"
        )
    return value


def _bar(label: str | None, total: int, initial: int) -> tqdm[Any]:
    return tqdm(
        total=total or None, initial=initial, desc=label, unit="step", leave=False,
        disable=label is None, mininterval=0.5,
    )  # fmt: skip


def _what_fits(step: Callable[[Batch], Tensor], batch: Batch, device: torch.device) -> str:
    size = tried = size_of(batch)
    message = f"a training step with batches of {size} does not fit into the memory of {device}"
    while tried > 1:
        tried //= 2
        free_memory(device)
        try:
            step(mapped(batch, lambda tensor: tensor[:tried]))  # noqa: B023 - called right here
        except (torch.OutOfMemoryError, ValueError):  # a batch of one has no batch statistics
            continue
        return f"{message}: batches of {tried} do"
    return f"{message}, nor does a smaller one: free memory or take a narrower network"


def _set_rates(optimizer: Optimizer, rates: list[float]) -> None:
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        if isinstance(group["lr"], Tensor):  # as compiled steps want it
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


def _mean_loss(values: list[float], rates: list[float], epoch: int) -> float:
    for step, (value, rate) in enumerate(zip(values, rates, strict=True)):
        if not math.isfinite(value):
            raise TrainingError(
                f"the loss is {value} in epoch {epoch + 1}, step {step + 1}, at learning rate {rate:g}: try a lower one"
            )
    return sum(values) / len(values)
