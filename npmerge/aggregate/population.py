"""Agg by training models on together, so that they stay near each other until they are averaged."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from npmerge.aggregate.aggregated import Aggregated, learnable, taken_over
from npmerge.aggregate.uniform_and_greedy import uniform_soup
from npmerge.data.batches import child_seed
from npmerge.data.streams import Batch, Data, stream
from npmerge.device import device_of
from npmerge.methods import method
from npmerge.symmetry import check_same_architecture
from npmerge.training import Learning

Variant = Literal["papa", "all", "pairs"]
"""What a push does to the models: it pulls them a little to their mean, makes them their mean, or each the mean of
itself and another."""


@method(
    kind="aggregate",
    label="PAPA",
    row="PAPA-{align}",
    family="training",
    needs=("data", "labels"),
    reference="jolicoeur2024",
    place=80,
    use="Where the models can still be trained: a population that stays close enough to average.",
)
def papa(
    models: Sequence[nn.Module],
    data: Data,
    *,
    epochs: int = 10,
    lr: float = 1e-2,
    momentum: float = 0.9,
    weight_decay: float = 1e-4,
    every: int = 10,
    pull: float = 0.01,
    variant: str = "papa",
    seed: int = 0,
    learning: Learning | None = None,
) -> Aggregated:
    """Train the models on, each pulled to their mean M every few steps, and take the mean in the end.

    ``W_j <- (1 - c) W_j + c M`` with ``c = pull * lr_t / lr_0``: the pull falls with the learning rate. Models that
    were only initialised can be trained this way from the start.

    Args:
        models: aligned to the first; of one model nothing is pulled.
        data: the optimisation data, any re-iterable of batches. Each model makes passes of its own. They differ in
            order and augmentation where the data draws them afresh in every pass, as a loader that shuffles or
            :class:`~npmerge.data.batches.Batches` do; of a list all get the same batches.
        epochs: passes over the data of each model.
        lr: SGD's learning rate; the authors train from scratch with 0.1.
        momentum: of SGD; the authors' is 0.9.
        weight_decay: of SGD; the authors' is 0.0001.
        every: steps of each model between two pushes; the authors' is 10, and 5 epochs for the other variants.
        pull: the share c of the mean at the first learning rate, in [0, 1]; the authors' is 0.01.
        variant: ``"papa"``, or what a push does instead: ``"all"`` makes all models their mean, ``"pairs"`` each the
            mean of itself and another that is drawn. (The authors then rescale channels, which is left out here.)
        seed: of the passes and of the pairs.
        learning: how; see :class:`~npmerge.training.Learning`.

    Returns:
        The mean, its batch norm not yet reset; and in ``details["population"]`` the models that it is the mean of.
        ``models`` are not changed.

    Raises:
        ValueError: an unknown variant, ``every`` or ``pull`` out of range; the models differ in architecture or shape,
            every parameter is frozen, the data is empty, or a label is out of range.
        TrainingError: the loss is not finite.

    Source:
        Jolicoeur-Martineau et al. 2024 and its code; the other variants are its PAPA-all and PAPA-2.
    """
    if variant not in get_args(Variant):
        known = ", ".join(get_args(Variant))
        raise ValueError(f"unknown variant {variant!r}: choose one of {known}")
    if every < 1:
        raise ValueError(f"every is {every}: give at least 1 step")
    if not 0 <= pull <= 1:
        raise ValueError(f"pull is {pull}: give a share of the mean, from 0 to 1")
    if not models:
        raise ValueError("no models: give at least one")
    for other in models[1:]:
        check_same_architecture(models[0], other)
    population = Population(taken_over(models[0], model) for model in models)
    optimizer = PullingSGD(
        population, lr=lr, momentum=momentum, weight_decay=weight_decay, every=every, pull=pull,
        variant=variant, seed=seed,
    )  # fmt: skip
    learning = learning or Learning()
    validate = learning.validate
    if validate is not None:
        learning = replace(learning, validate=lambda _: validate(uniform_soup(list(population))))
    passes = Turns(data, len(models), device_of(population), seed)
    history = learning.fit(population, passes, optimizer, epochs=epochs)
    members = [taken_over(models[0], model) for model in population]
    return Aggregated(uniform_soup(members), history, {"population": members})


class Population(nn.ModuleList):
    """Models that take turns: a call goes to the one whose turn it is."""

    turn = 0

    def forward(self, *inputs: Any, **named: Any) -> Any:
        """What the model answers whose turn it is."""
        return self[self.turn](*inputs, **named)


class Turns:
    """A batch for each model in turn, each from a pass of its own.

    Args:
        data: any re-iterable of batches; what can be ``reseeded`` gets a seed of each model's own.
        count: of the models.
        device: where to move the batches.
        seed: that the models' own are made of.
    """

    def __init__(self, data: Data, count: int, device: torch.device, seed: int) -> None:
        reseeded = getattr(data, "reseeded", None)
        self._device = device
        self._passes: list[Any] = [
            data if reseeded is None else reseeded(child_seed(seed, number))
            for number in range(count)
        ]
        self.seed, self.label_range = seed, getattr(data, "label_range", None)

    @property
    def epoch(self) -> int | None:
        """How many passes each model has made, where the data counts them."""
        return getattr(self._passes[0], "epoch", None)

    @epoch.setter
    def epoch(self, epoch: int) -> None:
        for data in self._passes:
            data.epoch = epoch

    def __len__(self) -> int:
        return len(self._passes) * operator.length_hint(self._passes[0])

    def __iter__(self) -> Iterator[Batch]:
        passes = (stream(data, self._device) for data in self._passes)
        for batches in zip(*passes, strict=False):
            yield from batches


class PullingSGD:
    """SGD on models that take turns, with a push between them every few rounds; see :func:`papa`."""

    def __init__(
        self,
        population: Population,
        *,
        lr: float,
        momentum: float,
        weight_decay: float,
        every: int,
        pull: float,
        variant: str,
        seed: int,
    ) -> None:
        members = [list(learnable(model).values()) for model in population]
        self._population, self._tensors = population, list(zip(*members, strict=True))
        self._sgd = torch.optim.SGD(
            [p for parameters in members for p in parameters], lr=lr, momentum=momentum,
            weight_decay=weight_decay,
        )  # fmt: skip
        self._every, self._pull, self._variant, self._lr = every, pull, variant, lr
        self._generator = torch.Generator().manual_seed(seed)
        self._rounds = 0

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """SGD's."""
        return self._sgd.param_groups

    def zero_grad(self) -> None:
        """Forget the gradient: only the model whose turn it is will have one, so that only it is stepped."""
        self._sgd.zero_grad(set_to_none=True)

    def step(self) -> None:
        """Step the model whose turn it is; after the last one's turn, push if it is time."""
        self._sgd.step()
        self._population.turn = (self._population.turn + 1) % len(self._population)
        if self._population.turn == 0:
            self._rounds += 1
            if self._rounds % self._every == 0:
                self._push()

    def state_dict(self) -> dict[str, Any]:
        """What :meth:`load_state_dict` needs to go on from here, after a whole round."""
        generator = self._generator.get_state()
        return {"sgd": self._sgd.state_dict(), "rounds": self._rounds, "generator": generator}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on from a saved state.

        Args:
            state_dict: from :meth:`state_dict`.
        """
        self._sgd.load_state_dict(state_dict["sgd"])
        self._rounds = state_dict["rounds"]
        self._generator.set_state(state_dict["generator"])

    @torch.no_grad()
    def _push(self) -> None:
        order = torch.randperm(len(self._population), generator=self._generator)
        partner = dict(zip(order.tolist(), order.roll(1).tolist(), strict=True))
        rate = float(self.param_groups[0]["lr"]) / self._lr
        share = self._pull * rate if self._variant == "papa" else 1.0
        for members in self._tensors:
            before = torch.stack(members)
            for number, parameter in enumerate(members):
                those: Tensor = before
                if self._variant == "pairs":
                    those = before[[number, partner[number]]]
                parameter.lerp_(those.mean(0), share)
