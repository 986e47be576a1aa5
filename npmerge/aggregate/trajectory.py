"""Agg by the average along a trajectory: what fine-tuning passes through, not where it happens to end."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from npmerge.aggregate.aggregated import Aggregated, learnable, taken_over
from npmerge.aggregate.uniform_and_greedy import uniform_soup
from npmerge.data.streams import Data
from npmerge.methods import method
from npmerge.training import Learning


@method(
    kind="aggregate",
    label="SWA",
    row="SWA-{align}",
    family="training",
    needs=("data", "labels"),
    reference="izmailov2018",
    place=82,
    use="Where fine-tuning is affordable anyway, and its end should lie in a flat place.",
)
def swa(
    models: Sequence[nn.Module],
    data: Data,
    *,
    start: float = 0.5,
    epochs: int = 10,
    lr: float = 1e-2,
    learning: Learning | None = None,
) -> Aggregated:
    """Fine-tune the mean of the models, and average the weights at the end of each of the last epochs.

    ``W = (w_s + ... + w_n) / (n - s + 1)`` with the weights ``w_e`` after epoch e and ``s`` the first one behind the
    share ``start``. From there on the learning rate stays as it is. But for the average it is
    :func:`~npmerge.aggregate.finetuning.finetune`.

    Args:
        models: at least one, aligned to the first.
        data: the optimisation data, any re-iterable of batches.
        start: the share of the epochs before the average begins, in [0, 1).
        epochs: passes over the data.
        lr: Adam's learning rate, that of fine-tuning; the authors have SGD's.
        learning: how; see :class:`~npmerge.training.Learning`.

    Returns:
        The average, its batch norm not yet reset; ``models`` are not changed.

    Raises:
        ValueError: ``start`` is out of range, the models differ in architecture or shape, every parameter is frozen,
            the data is empty, or a label is out of range.
        TrainingError: the loss is not finite.

    Source:
        Izmailov et al. 2018, with a constant learning rate.
    """
    if not 0 <= start < 1:
        raise ValueError(f"start is {start}: give a share of the epochs, at least 0 and below 1")
    learning = learning or Learning()
    first, planned = start * epochs, learning.schedule
    if planned is not None:
        learning = replace(learning, schedule=lambda epoch: planned(min(epoch, first)))
    model = uniform_soup(models)
    averaging = Averaging(model, torch.optim.Adam(learnable(model).values(), lr=lr, fused=True))
    history = averaging.fit(learning, data, epochs=epochs, noted=lambda epoch: epoch > first)
    return Aggregated(taken_over(models[0], averaging.average), history)


@method(
    kind="aggregate",
    label="EMA",
    row="EMA-{align}",
    family="training",
    needs=("data", "labels"),
    reference="szegedy2016",
    place=83,
    use="As SWA, with nothing to schedule.",
)
def ema(
    models: Sequence[nn.Module],
    data: Data,
    *,
    decay: float = 0.999,
    epochs: int = 10,
    lr: float = 1e-2,
    learning: Learning | None = None,
) -> Aggregated:
    """Fine-tune the mean of the models, and average the weights over all steps, late ones more than early ones.

    ``W <- d * W + (1 - d) * w`` with the weights ``w`` after each step; W begins at those after the first. ``d`` is
    ``decay``, but at most ``n / (n + 9)`` at step n, so that short trainings forget their start, too. But for the
    average it is :func:`~npmerge.aggregate.finetuning.finetune`.

    Args:
        models: at least one, aligned to the first.
        data: the optimisation data, any re-iterable of batches.
        decay: how much of the average stays at a step, in [0, 1): it reaches about ``1 / (1 - decay)`` steps back;
            0.999 is common.
        epochs: passes over the data.
        lr: Adam's learning rate, that of fine-tuning.
        learning: how; see :class:`~npmerge.training.Learning`.

    Returns:
        The average, its batch norm not yet reset; ``models`` are not changed.

    Raises:
        ValueError: ``decay`` is out of range, the models differ in architecture or shape, every parameter is frozen,
            the data is empty, or a label is out of range.
        TrainingError: the loss is not finite.

    Source:
        Szegedy et al. 2016, as PyTorch averages; the rise of the decay is TensorFlow's.
    """
    if not 0 <= decay < 1:
        raise ValueError(f"decay is {decay}: give a number of at least 0 and below 1")

    def follow(average: Any, weights: Any, count: Tensor) -> None:
        steps = int(count) + 1
        get_ema_multi_avg_fn(min(decay, steps / (steps + 9)))(average, weights, count)

    model = uniform_soup(models)
    averaging = Averaging(
        model,
        torch.optim.Adam(learnable(model).values(), lr=lr, fused=True),
        multi_avg_fn=follow,
        every_step=True,
    )
    history = averaging.fit(learning or Learning(), data, epochs=epochs)
    return Aggregated(taken_over(models[0], averaging.average), history)


@method(
    kind="aggregate",
    label="FGE soup",
    row="FGE soup-{align}",
    family="training",
    needs=("data", "labels"),
    reference="garipov2018",
    ours=True,
    place=84,
    use="Where one learning should give several models for an ensemble, or their soup.",
)
def fge(
    models: Sequence[nn.Module],
    data: Data,
    *,
    cycle: int = 4,
    epochs: int = 20,
    lr: float = 0.05,
    lowest_lr: float = 1e-4,
    momentum: float = 0.9,
    weight_decay: float = 1e-4,
    learning: Learning | None = None,
) -> Aggregated:
    """Fine-tune the mean of the models with a learning rate that goes up and down, and average what is at its minima.

    In each cycle it falls linearly from ``lr`` to ``lowest_lr`` and rises back; a snapshot is taken half-way. The
    authors average the snapshots' predictions; their weights, of one trajectory, need no alignment.

    Args:
        models: at least one, aligned to the first.
        data: the optimisation data, re-iterable batches of known number.
        cycle: length of a cycle in epochs, even; the authors' is 4.
        epochs: passes over the data, the authors' 20; at least half a cycle.
        lr: SGD's learning rate where a cycle begins; the authors' is 0.05.
        lowest_lr: that where a snapshot is taken; the authors' is 0.0001.
        momentum: of SGD, the authors'.
        weight_decay: of SGD, the authors'.
        learning: how; see :class:`~npmerge.training.Learning`. A schedule multiplies the cycles.

    Returns:
        The mean of the snapshots, its batch norm not yet reset; and in ``details["snapshots"]`` the models themselves,
        for an :class:`~npmerge.evaluate.ensembles.Ensemble`. ``models`` are not changed.

    Raises:
        ValueError: a cycle is not even or not half of one is asked for, the models differ in architecture or shape,
            every parameter is frozen, the data is empty or of unknown length, or a label is out of range.
        TrainingError: the loss is not finite.

    Source:
        Garipov et al. 2018 and its code, for the snapshots; their soup is ours.
    """
    half = cycle // 2
    if cycle < 2 or cycle % 2:
        raise ValueError(f"cycle is {cycle}: give an even number of epochs")
    if epochs < half:
        raise ValueError(f"epochs is {epochs}: the first snapshot is taken after {half}")
    learning = learning or Learning()
    planned = learning.schedule or (lambda _: 1.0)

    def cycles(epoch: float) -> float:
        height = abs(epoch % cycle / half - 1)
        return planned(epoch) * (height + (1 - height) * lowest_lr / lr)

    model = uniform_soup(models)
    averaging = Averaging(
        model,
        torch.optim.SGD(
            learnable(model).values(), lr=lr, momentum=momentum, weight_decay=weight_decay
        ),
        snapshots=True,
    )
    history = averaging.fit(
        replace(learning, schedule=cycles), data, epochs=epochs,
        noted=lambda epoch: epoch % cycle == half % cycle,
    )  # fmt: skip
    snapshots = []
    for state in averaging.snapshots:
        snapshots.append(copy.deepcopy(models[0]))
        snapshots[-1].load_state_dict(state)
    return Aggregated(taken_over(models[0], averaging.average), history, {"snapshots": snapshots})


class Averaging:
    """An optimiser, and the average of the weights that it passes through.

    Args:
        model: what learns.
        optimizer: of its parameters.
        multi_avg_fn: how the average is updated; see :class:`torch.optim.swa_utils.AveragedModel`. By default all that
            was noted counts alike.
        every_step: note the weights after each step.
        snapshots: keep what is noted, too.

    Attributes:
        snapshots: states of the model, where they are kept.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        multi_avg_fn: Callable[..., None] | None = None,
        every_step: bool = False,
        snapshots: bool = False,
    ) -> None:
        self._model, self._optimizer, self._every_step = model, optimizer, every_step
        self._average = AveragedModel(model, multi_avg_fn=multi_avg_fn)
        self._keeps = snapshots
        self.snapshots: list[dict[str, Tensor]] = []

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The optimiser's."""
        return self._optimizer.param_groups

    @property
    def average(self) -> nn.Module:
        """The average; the model as it is while nothing was noted."""
        found: nn.Module = self._average.module if self._average.n_averaged else self._model
        return found

    def zero_grad(self) -> None:
        """Forget the gradient."""
        self._optimizer.zero_grad()

    def step(self) -> None:
        """Use the gradient."""
        self._optimizer.step()
        if self._every_step:
            self.note()

    def note(self) -> None:
        """Let the weights of now count."""
        self._average.update_parameters(self._model)
        if self._keeps:
            self.snapshots.append(copy.deepcopy(self._model.state_dict()))

    def state_dict(self) -> dict[str, Any]:
        """What :meth:`load_state_dict` needs to go on from here."""
        return {
            "optimizer": self._optimizer.state_dict(),
            "average": self._average.state_dict(),
            "snapshots": list(self.snapshots),
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on from a saved state.

        Args:
            state_dict: from :meth:`state_dict`.
        """
        self._optimizer.load_state_dict(state_dict["optimizer"])
        self._average.load_state_dict(state_dict["average"])
        self.snapshots = list(state_dict["snapshots"])

    def fit(
        self,
        learning: Learning,
        data: Data,
        *,
        epochs: int,
        noted: Callable[[int], bool] = lambda _: False,
    ) -> list[float]:
        """Learn; what is validated is the average.

        Args:
            learning: how.
            data: any re-iterable of batches.
            epochs: passes over it.
            noted: whether to let the weights count after an epoch, counted from 1.
        """
        told, validate = learning.on_epoch, learning.validate

        def on_epoch(epoch: int, loss: float) -> None:
            if noted(epoch):
                self.note()
            if told is not None:
                told(epoch, loss)

        learning = replace(
            learning,
            on_epoch=on_epoch,
            validate=None if validate is None else lambda _: validate(self.average),
        )
        return learning.fit(self._model, data, self, epochs=epochs)
