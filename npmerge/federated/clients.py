"""Flower clients that train a model on data of their own."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import cast

import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from torch import nn

from npmerge.aggregate.freezing import Frozen
from npmerge.data.batches import child_seed
from npmerge.data.streams import Data, size_of
from npmerge.device import device_of
from npmerge.evaluate.scores import score
from npmerge.training import Loss, Optimizer, fit

NUMBER = "partition-id"
"""What a client's number is called, in a node's configuration and in replies."""
OWN = "own"
"""Where a client's context keeps its model between rounds."""


def client_app(
    build: Callable[[], nn.Module],
    data: Callable[[int], Data],
    optimizer: Callable[[nn.Module], Optimizer],
    *,
    epochs: int,
    schedule: Callable[[float], float] | None = None,
    loss: Loss | None = None,
    start: Callable[[int], nn.Module] | None = None,
    pull: float = 1.0,
    frozen: float = 0.0,
    evaluate_on: Callable[[int], Data] | None = None,
    mixed_precision: bool | None = None,
    seed: int = 0,
) -> ClientApp:
    """Clients that train the server's model, or their own, for some epochs a round.

    What a client learns is a function of the arrays that it gets, of its number, the round and the seed, and of what it
    has kept. It replies with its arrays, ``"num-examples"``, its last epoch's mean ``"loss"``, and its
    ``"partition-id"``, by which :class:`~npmerge.federated.server.MergeStrategy` puts replies in order.

    Args:
        build: makes a model.
        data: a client's batches, by its number, from 0; asked for in every round. What can be ``reseeded`` (as
            :class:`~npmerge.data.batches.Batches`) gets a seed of the client's and the round's own.
        optimizer: of a model's parameters; made anew in every round.
        epochs: passes over a client's data in a round.
        schedule: multiplies the learning rate; a function of the epoch, counted in fractions and over all rounds.
        loss: as :func:`npmerge.training.fit` has it.
        start: makes the model that a client begins the first round with, by its number, in the place of the server's:
            initial weights of its own.
        pull: the share of the server's model in what a client begins a further round with, in [0, 1]; the rest is what
            it ended its last round with. At 1 nothing is kept; below, the clients are a population that is pulled
            together, as in PAPA; at 0 they train apart.
        frozen: the share of weights that stay the server's, in [0, 1], all clients' the same, drawn anew in every
            round: TNA-PFN in one round, FedPFN in several.
        evaluate_on: a client's batches to score the server's model on, by its number: ``"accuracy"``, in percent, and
            ``"loss"``.
        mixed_precision: train in bfloat16; by default where the device gains from it.
        seed: of all that is drawn.

    Returns:
        The app, for :class:`~npmerge.federated.in_process.LocalGrid` or for Flower's own runtime. A node's number is
        its ``partition-id``.

    Raises:
        ValueError: ``epochs``, ``pull`` or ``frozen`` is out of range.

    Source:
        McMahan et al. 2017; Jolicoeur-Martineau et al. 2024 for the pull, Li et al. 2024 for frozen weights.
    """
    if epochs < 1:
        raise ValueError(f"epochs is {epochs}: give at least 1")
    for name, share in (("pull", pull), ("frozen", frozen)):
        if not 0 <= share <= 1:
            raise ValueError(f"{name} is {share}: give a share, from 0 to 1")
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        number, ((key, arrays),) = _number(context), message.content.array_records.items()
        (config,) = message.content.config_records.values()
        round_ = cast("int", config["server-round"])
        draw = child_seed(seed, round_, number)
        server = build()
        server.load_state_dict(arrays.to_torch_state_dict())
        device = device_of(server)
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(draw)
            model = copy.deepcopy(start(number) if start and round_ == 1 else server)
            if OWN in context.state and round_ > 1:
                _move(model, context.state.array_records[OWN], 1 - pull)
            batches = data(number)
            examples = sum(map(size_of, batches))
            reseeded = getattr(batches, "reseeded", None)
            steps = optimizer(model)
            if frozen:
                drawn = child_seed(seed, round_)
                steps = Frozen(steps, model, share=frozen, seed=drawn, start=server)
            history = fit(
                model, batches if reseeded is None else reseeded(draw), steps, epochs=epochs,
                loss=loss, schedule=_later(schedule, (round_ - 1) * epochs),
                mixed_precision=mixed_precision,
            )  # fmt: skip
        learned = ArrayRecord(model.state_dict())
        if pull < 1:
            context.state[OWN] = learned
        content = RecordDict({key: learned, "config": ConfigRecord({NUMBER: number})})
        content["metrics"] = MetricRecord({"num-examples": examples, "loss": history[-1]})
        return Message(content, reply_to=message)

    if evaluate_on is not None:

        @app.evaluate()
        def evaluate(message: Message, context: Context) -> Message:
            (arrays,) = message.content.array_records.values()
            model, batches = build(), evaluate_on(_number(context))
            model.load_state_dict(arrays.to_torch_state_dict())
            found = score(model, batches)
            metrics = MetricRecord(
                {"num-examples": sum(map(size_of, batches)), "accuracy": found.top1, "loss": found.loss}
            )  # fmt: skip
            return Message(RecordDict({"metrics": metrics}), reply_to=message)

    return app


def _number(context: Context) -> int:
    if NUMBER not in context.node_config:
        raise ValueError(
            f"node {context.node_id} has no {NUMBER}: start it with --node-config '{NUMBER}=0', and so on"
        )
    return int(context.node_config[NUMBER])


@torch.no_grad()
def _move(model: nn.Module, kept: ArrayRecord, share: float) -> None:
    """Move a model towards what was kept; integers are what was kept."""
    own = kept.to_torch_state_dict()
    for name, value in model.state_dict().items():
        there = own[name].to(value.device)
        value.copy_(value.lerp(there, share) if value.is_floating_point() else there)


def _later(
    schedule: Callable[[float], float] | None, epochs: int
) -> Callable[[float], float] | None:
    return None if schedule is None else lambda epoch: schedule(epochs + epoch)
