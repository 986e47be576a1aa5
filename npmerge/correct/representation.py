"""Surgery: a small network before the last layer brings the merged features nearer to the parents'."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import l1_loss

from npmerge.correct.batchnorm import reset_batchnorm
from npmerge.data.streams import Data, first_examples, labels_of, outputs_of, stream
from npmerge.device import device_of, measuring
from npmerge.methods import method
from npmerge.training import fit

BATCH = 16
"""Rows of features a step, as in the authors' code."""


@method(
    kind="correct",
    label="Surgery",
    family="correction",
    needs=("data",),
    reference="yang2024surgery",
    ours=True,
    use="Where a few more parameters may be added and unlabelled data tells what the features should be.",
)
def surgery(
    model: nn.Module,
    data: Data,
    *,
    parents: Sequence[nn.Module] = (),
    rank: int = 16,
    epochs: int = 10,
    lr: float = 1e-3,
    examples: int = 16000,
    seed: int = 0,
) -> nn.Module:
    """Put ``z - U relu(D z)`` before the last linear layer, so that features z are as the parents' are on average.

    Batch norm is reset first. Then the features are measured once, in evaluation mode, and U, zero at the start, and D
    are learned, so that the mean absolute difference to the mean of the parents' features falls; labels are not used.
    It is a variant of ours for models with the same classes: the authors have such a network for each task, towards
    that task's own model.

    The last linear layer ``head`` becomes a sequence of an :class:`Adapter` and itself: the state dict has
    ``head.0.down.weight``, ``head.0.up.weight`` and ``head.1.weight``, so that it fits no model but its like.

    Args:
        model: the merged model; changed in place.
        data: any re-iterable of batches of training data. (The authors learn on the test images.)
        parents: the models that were merged, aligned.
        rank: numbers that D makes of the features; 16 as in the authors' code.
        epochs: passes over the features, 16 of them at a step.
        lr: Adam's learning rate; 0.001 as in the authors' code.
        examples: how many are measured, at most; the first ones of a pass. By default as many as the authors' 1,000
            steps take.
        seed: of D's first weights.

    Returns:
        The same model.

    Raises:
        ValueError: no parents, a rank or a number of examples below 1, a model without a linear layer inside, or data
            that is empty.
        TrainingError: the difference is not finite.

    Source:
        After Yang et al. 2024, "Representation Surgery".
    """
    if not parents or rank < 1 or examples < 1:
        raise ValueError(
            f"{len(parents)} parents, rank {rank}, examples {examples}: give the models that were merged, a rank and "
            "a number of examples of at least 1"
        )
    reset_batchnorm(model, data)
    path = last_linear(model, data)
    head: Any = model.get_submodule(path)
    features = _features([model, *parents], path, data, examples)
    adapter = Adapter(features[0][0].shape[-1], rank, seed=seed).to(head.weight)
    fit(
        adapter, features, torch.optim.Adam(adapter.parameters(), lr=lr), epochs=epochs,
        loss=lambda outputs, batch: l1_loss(outputs, labels_of(batch)), mixed_precision=False,
    )  # fmt: skip
    model.set_submodule(path, nn.Sequential(adapter, head).train(head.training))
    return model


class Adapter(nn.Module):
    """What is subtracted of features, through a bottleneck; nothing at the start.

    Args:
        features: their number.
        rank: numbers in the bottleneck.
        seed: of its first weights.
    """

    def __init__(self, features: int, rank: int, *, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.down = nn.Linear(features, rank, bias=False)
        self.up = nn.Linear(rank, features, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, z: Tensor) -> Tensor:
        """Features ``(N, ..., features)`` to their like."""
        changed: Tensor = z - self.up(self.down(z).relu())
        return changed


@torch.no_grad()
def last_linear(model: nn.Module, data: Data) -> str:
    """The name of the linear layer that runs last on a batch.

    Args:
        model: is not changed.
        data: any re-iterable of batches.

    Raises:
        ValueError: no linear layer runs inside the model.
    """
    ran: list[str] = []
    with ExitStack() as hooks, measuring(model) as device:
        for name, layer in model.named_modules():
            if name and isinstance(layer, nn.Linear):
                hook = layer.register_forward_hook(lambda *_, name=name: ran.append(name))
                hooks.callback(hook.remove)
        outputs_of(model, next(stream(data, device)))
    if not ran:
        raise ValueError(
            f"no linear layer runs inside the {type(model).__name__}: surgery needs one that gives the logits"
        )
    return ran[-1]


@torch.no_grad()
def _features(
    models: Sequence[nn.Module], path: str, data: Data, examples: int
) -> list[tuple[Tensor, Tensor]]:
    """What a layer is given in the first model, and on average in the others, a few rows at a time."""
    given: list[Tensor] = []

    def note(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        given.append(inputs[0])

    found: list[tuple[Tensor, Tensor]] = []
    with ExitStack() as hooks:
        for model in models:
            hooks.callback(model.get_submodule(path).register_forward_pre_hook(note).remove)
            hooks.enter_context(measuring(model))
        for batch in first_examples(data, examples, device_of(models[0])):
            given.clear()
            for model in models:
                outputs_of(model, batch)
            own, *others = given
            found += zip(own.split(BATCH), torch.stack(others).mean(0).split(BATCH), strict=True)
    return found
