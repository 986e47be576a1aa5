"""One training loop. Base training, fine-tuning and learning alpha differ only in what they optimise."""

from __future__ import annotations

import copy
import math
import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.nn.functional import cross_entropy
from tqdm import tqdm

from npmerge.data.batches import Batches, Data, check_labels, stream
from npmerge.device import (
    autocast,
    channels_last,
    compiled,
    device_of,
    free_memory,
    gains,
    models_at_once,
    record,
    side_by_side,
)

WARM_UP_STEPS = 3
"""Steps before one is recorded: by then the optimisers have their buffers and the kernels are chosen."""


class Optimizer(Protocol):
    """What the loop needs of an optimiser; every ``torch.optim.Optimizer`` has it."""

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """Each with its learning rate under ``"lr"``."""

    def zero_grad(self) -> None:
        """Forget the gradient."""

    def step(self) -> object:
        """Use the gradient."""


@dataclass(frozen=True, eq=False)
class Run:
    """The training of one model.

    Attributes:
        model: maps images ``(N, C, H, W)`` to logits ``(N, classes)``.
        data: any re-iterable of ``(images, labels)``; one pass is one epoch. Runs that name the same object see the
            same batches. (Runs that wait for each other do so if it is a :class:`npmerge.data.batches.Batches`, or
            does not shuffle.)
        optimizer: holds what is optimised.
    """

    model: nn.Module
    data: Data
    optimizer: Optimizer


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
    mixed_precision: bool | None = None,
    progress: str | None = None,
) -> list[float]:
    """Minimise the cross-entropy of ``model`` over ``data``; the model is changed in place and left in train mode.

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
        OutOfMemoryError: a step does not fit into the device's memory; the message says which batch size does.
        ValueError: the data is empty or a label is out of range.
    """
    (result,) = fit_together(
        [Run(model, data, optimizer)], epochs=epochs, schedule=schedule,
        mixed_precision=mixed_precision, progress=progress,
    )  # fmt: skip
    if isinstance(result, TrainingError):
        raise result
    return result


def fit_together(
    runs: Sequence[Run],
    *,
    epochs: int,
    schedule: Callable[[float], float] | None = None,
    at_once: int | None = None,
    stacked: bool = False,
    mixed_precision: bool | None = None,
    compile: bool | None = None,  # noqa: A002 - the word users know
    recorded: bool | None = None,
    progress: str | None = None,
) -> list[list[float] | TrainingError]:
    """Train several models in step, each as :func:`fit` would, up to rounding: one alone leaves a large GPU idle.

    Nothing inside an epoch waits for the device: the losses stay there and are looked at once the epoch is over. (The
    labels of data other than npmerge's own batches are checked step by step, which does wait.)

    Args:
        runs: with as many steps an epoch each; on one device.
        epochs: passes over the data.
        schedule: multiplies the optimisers' learning rates; a function of the epoch, counted in fractions.
        at_once: models to train at the same time, the others wait; by default one on a CPU and 16 on CUDA.
        stacked: run models of one architecture as one, with stacked parameters (``torch.func.vmap``: grouped
            convolutions). By default every model runs as it is, on CUDA on a stream of its own.
        mixed_precision: bfloat16 autocast; by default where the device gains from it (CUDA), as the next two.
        compile: compile the forward and backward pass (``torch.compile``).
        recorded: record a whole step, the optimisers' included, and replay it (CUDA graphs); needs fused optimisers.
        progress: label of the progress bar on stderr; none by default.

    Returns:
        For each run the mean loss of each epoch, or, if it diverged, the error that :func:`fit` would raise.

    Raises:
        OutOfMemoryError: a step does not fit into the device's memory; the message says which batch size does.
        ValueError: the data is empty or of different lengths, or a label is out of range.
    """
    if epochs < 0:
        raise ValueError(f"epochs is {epochs}: it cannot be negative")
    if not runs:
        return []
    device = device_of(runs[0].model)
    size = models_at_once(device) if at_once is None else at_once
    if size < 1:
        raise ValueError(f"at_once is {size}: it must be at least 1")
    results: list[list[float] | TrainingError] = []
    groups = [_own(runs[i : i + size]) for i in range(0, len(runs), size)]
    steps = [_steps(group, needed=schedule is not None) for group in groups]
    total = epochs * sum(steps) or None
    with tqdm(
        total=total, desc=progress, unit="step", leave=False, disable=progress is None,
        mininterval=0.5,
    ) as bar:  # fmt: skip
        for group, length in zip(groups, steps, strict=True):
            advance = _Advance(
                group,
                device,
                stacked=stacked and len(group) > 1,
                mixed_precision=mixed_precision,
                compiling=gains(device) if compile is None else compile,
                recording=gains(device) if recorded is None else recorded,
            )
            results += _fit_group(group, advance, epochs, length, schedule, bar)
    for data in {id(run.data): run.data for run in runs}.values():
        if isinstance(data, Batches):
            data.epoch += epochs
    return results


def _own(runs: Sequence[Run]) -> list[Run]:
    """The runs with batches that start where the given ones stand, whatever other groups have used of them."""
    own = {
        id(run.data): copy.copy(run.data) if isinstance(run.data, Batches) else run.data
        for run in runs
    }
    return [replace(run, data=own[id(run.data)]) for run in runs]


def _fit_group(
    runs: Sequence[Run],
    advance: _Advance,
    epochs: int,
    steps: int,
    schedule: Callable[[float], float] | None,
    bar: tqdm[Any],
) -> list[list[float] | TrainingError]:
    peaks = [[float(group["lr"]) for group in run.optimizer.param_groups] for run in runs]
    histories: list[list[float]] = [[] for _ in runs]
    errors: dict[int, TrainingError] = {}
    classes: list[int] = []
    for run in runs:
        run.model.train()
    try:
        for epoch in range(epochs):
            losses: list[Tensor] = []
            factors: list[float] = []
            for step, batches in enumerate(_in_step(runs, advance.device)):
                classes = classes or [
                    _classes(run.model, images[:1])
                    for run, (images, _) in zip(runs, batches, strict=True)
                ]
                for run, outputs, (_, labels) in zip(runs, classes, batches, strict=True):
                    check_labels(run.data, labels, outputs)
                factors.append(schedule(epoch + (step + 1) / steps) if schedule else 1.0)
                for run, rates in zip(runs, peaks, strict=True):
                    _set_rates(run.optimizer, [rate * factors[-1] for rate in rates])
                losses.append(advance(batches))
                bar.update()
            means = []
            for index, values in enumerate(torch.stack(losses, dim=1).tolist()):
                used = [max(peaks[index]) * factor for factor in factors]
                try:
                    means.append(_mean_loss(values, used, epoch))
                except TrainingError as error:
                    errors.setdefault(index, error)
                    continue
                histories[index].append(means[-1])
            if len(errors) == len(runs):
                break
            bar.set_postfix(loss=f"{sum(means) / len(means):.3f}")
    finally:
        advance.restore()
        for run, rates in zip(runs, peaks, strict=True):
            _set_rates(run.optimizer, rates)
    return [errors.get(index, history) for index, history in enumerate(histories)]


class _Advance:
    """One step of every run of a group, by the means that the device gains from."""

    def __init__(
        self,
        runs: Sequence[Run],
        device: torch.device,
        *,
        stacked: bool,
        mixed_precision: bool | None,
        compiling: bool,
        recording: bool,
    ) -> None:
        self.runs, self.device = runs, device
        self._stacked, self._compiling = stacked, compiling
        self._mixed_precision = mixed_precision
        self._recording = recording and all(_recordable(run.optimizer) for run in runs)
        self._capturable: list[tuple[dict[str, Any], Any]] = []
        self._taken = 0
        self._loss: Callable[..., Tensor] | None = None
        self._inputs: list[Tensor] = []
        self._replay: Callable[[], Tensor] | None = None

    def __call__(self, batches: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
        """Take a step of every run, each on its batch; returns the losses, ``(runs,)``, on the device."""
        if self._loss is None and (self._stacked or self._compiling):
            self._loss = self._prepare(batches)
        # A batch that two runs share is one tensor, and stays one.
        flat = list({id(t): t for batch in batches for t in batch}.values())
        places = {id(t): index for index, t in enumerate(flat)}
        where = [(places[id(images)], places[id(labels)]) for images, labels in batches]
        step = partial(self._step, where)
        try:
            if not self._recording or self._taken < WARM_UP_STEPS:
                self._taken += 1
                return step(*flat)
            if self._replay is None:
                self._inputs = [tensor.clone() for tensor in flat]
                self._make_capturable()
                self._replay = record(step, self._inputs, self.device)
            if [t.shape for t in flat] != [t.shape for t in self._inputs]:
                return step(*flat)  # a last batch that is smaller
            for kept, tensor in zip(self._inputs, flat, strict=True):
                kept.copy_(tensor)
            return self._replay().clone()
        except torch.OutOfMemoryError as error:
            raise OutOfMemoryError(self._what_fits(batches)) from error

    def restore(self) -> None:
        """Leave the optimisers as they were but for their progress."""
        for group, before in self._capturable:
            group["capturable"] = before

    def _step(self, where: Sequence[tuple[int, int]], *tensors: Tensor) -> Tensor:
        batches = [(tensors[images], tensors[labels]) for images, labels in where]
        if self._stacked and len({images.shape for images, _ in batches}) == 1:
            return self._all_as_one(batches)
        jobs = [partial(self._one, *job) for job in zip(self.runs, batches, strict=True)]
        return torch.stack(side_by_side(jobs, self.device))

    def _one(self, run: Run, batch: tuple[Tensor, Tensor]) -> Tensor:
        with autocast(self.device, self._mixed_precision):
            if self._compiling and not self._stacked and self._loss is not None:
                parameters, buffers = _tensors(run.model)
                loss = self._loss(parameters, buffers, *batch)
            else:
                loss = cross_entropy(run.model(batch[0]).float(), batch[1])
        run.optimizer.zero_grad()
        torch.autograd.backward(loss)
        run.optimizer.step()
        return loss.detach()

    def _all_as_one(self, batches: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
        assert self._loss is not None  # noqa: S101 - prepared before the first step
        every = [_tensors(run.model) for run in self.runs]
        parameters, buffers = (
            {name: torch.stack([one[part][name] for one in every]) for name in every[0][part]}
            for part in (0, 1)
        )
        with autocast(self.device, self._mixed_precision):
            losses = self._loss(parameters, buffers, *_side(batches))
        for run in self.runs:
            run.optimizer.zero_grad()
        torch.autograd.backward(losses.sum())  # through the stacks, to each model's own parameters
        with torch.no_grad():
            for index, (_, own) in enumerate(every):
                for name, buffer in own.items():
                    buffer.copy_(buffers[name][index])
        for run in self.runs:
            run.optimizer.step()
        return losses.detach()

    def _prepare(self, batches: Sequence[tuple[Tensor, Tensor]]) -> Callable[..., Tensor]:
        """The loss as a function of a model's tensors, stacked or compiled or both."""
        skeleton = copy.deepcopy(self.runs[0].model)

        def loss(
            parameters: dict[str, Tensor],
            buffers: dict[str, Tensor],
            images: Tensor,
            labels: Tensor,
        ) -> Tensor:
            logits = functional_call(skeleton, (parameters, buffers), (images,))
            return cross_entropy(logits.float(), labels)

        shared = batches[0][0] is batches[-1][0]
        function: Callable[..., Tensor] = loss
        if self._stacked:
            inner = None if shared else 0
            function = vmap(loss, in_dims=(0, 0, inner, inner), randomness="different")
        if not self._compiling:
            return function

        def example() -> tuple[Any, ...]:
            parameters, buffers = (
                {name: tensor.detach().clone().requires_grad_(tensor.requires_grad)
                 for name, tensor in part.items()}
                for part in _tensors(self.runs[0].model)
            )  # fmt: skip
            if not self._stacked:
                return parameters, buffers, *batches[0]
            count = len(self.runs)
            stack = {k: torch.stack([v] * count) for k, v in parameters.items()}
            return stack, {k: torch.stack([v] * count) for k, v in buffers.items()}, *_side(batches)

        with autocast(self.device, self._mixed_precision):
            return compiled(function, example)

    def _make_capturable(self) -> None:
        """Learning rates and step counts must be on the device for a recorded step to see them change."""
        for run in self.runs:
            for group in run.optimizer.param_groups:
                if self.device.type == "cuda":
                    group["lr"] = torch.tensor(float(group["lr"]), device=self.device)
                if "capturable" in group:
                    self._capturable.append((group, group["capturable"]))
                    group["capturable"] = self.device.type == "cuda"

    def _what_fits(self, batches: Sequence[tuple[Tensor, Tensor]]) -> str:
        size = tried = len(batches[0][1])
        count = len(self.runs)
        models = f"{count} models at once" if count > 1 else "one model"
        message = f"a training step of {models} with batches of {size} does not fit into the memory of {self.device}"
        self._replay, self._inputs = None, []
        where = [(2 * index, 2 * index + 1) for index in range(count)]
        while tried > 1:
            tried //= 2
            free_memory(self.device)
            try:
                self._step(where, *(t[:tried] for batch in batches for t in batch))
            except (torch.OutOfMemoryError, ValueError):  # a batch of one has no batch statistics
                continue
            fewer = ", or train fewer models at once" if count > 1 else ""
            return f"{message}: batches of {tried} do{fewer}"
        return f"{message}, nor does a smaller one: free memory or take a narrower network"


def _in_step(runs: Sequence[Run], device: torch.device) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """The runs' batches, step by step; data that several runs share is read once."""
    sources = list({id(run.data): run for run in runs}.values())
    places = {id(run.data): index for index, run in enumerate(sources)}
    for found in zip(*(stream(run.data, device) for run in sources), strict=True):
        ready = [(channels_last(images), labels) for images, labels in found]
        yield [ready[places[id(run.data)]] for run in runs]


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


def _tensors(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    return dict(model.named_parameters()), dict(model.named_buffers())


def _side(batches: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """The batches of all models: side by side, or the one that they share."""
    if batches[0][0] is batches[-1][0]:
        return batches[0]
    images, labels = zip(*batches, strict=True)
    return torch.stack(images), torch.stack(labels)


def _recordable(optimizer: Optimizer) -> bool:
    return all(group.get("fused") for group in optimizer.param_groups)


def _steps(runs: Sequence[Run], *, needed: bool) -> int:
    """Steps of an epoch; 0 for data that does not know."""
    lengths = {operator.length_hint(run.data) for run in runs}
    if len(lengths) > 1:
        raise ValueError(
            f"runs trained together need as many steps an epoch each, these have {sorted(lengths)}: "
            "train them one at a time (at_once=1)"
        )
    if needed and 0 in lengths:
        raise ValueError(
            "a learning-rate schedule needs data of known length: give data with len()"
        )
    return lengths.pop()


@torch.no_grad()
def _classes(model: nn.Module, image: Tensor) -> int:
    """How many outputs a model in train mode has."""
    model.eval()
    try:
        return int(model(image).shape[1])
    finally:
        model.train()


def _set_rates(optimizer: Optimizer, rates: list[float]) -> None:
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        if isinstance(group["lr"], Tensor):
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
