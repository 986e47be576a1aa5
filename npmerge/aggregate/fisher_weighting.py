"""Agg by Fisher weights: each parameter nearer to the model that is surer of it."""

from __future__ import annotations

from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev, vmap
from torch.utils._pytree import tree_map

from npmerge.aggregate.aggregated import Aggregated, learnable
from npmerge.aggregate.averaging import mean
from npmerge.checks import check_finite
from npmerge.data.streams import (
    Batch,
    Data,
    as_logits,
    inputs_of,
    labels_of,
    outputs_of,
    size_of,
    stream,
)
from npmerge.device import measuring
from npmerge.methods import method
from npmerge.symmetry import check_same_architecture

Expectation = Literal["exact", "sampled", "empirical"]
"""Over which labels the Fisher information is taken: all, by their probability; one drawn by it; the true one."""
AT_ONCE = 1 << 24
"""Numbers of per-example gradients that are held at a time."""


@method(
    kind="aggregate",
    label="Fisher",
    family="fisher",
    needs=("data",),
    reference="matena2022",
    place=50,
    use="Where the two models know different things, and gradients can be afforded for some thousand examples.",
)
def fisher(
    a: nn.Module,
    b: nn.Module,
    data: Data,
    *,
    expectation: str = "sampled",
    examples: int = 4096,
    floor: float = 1e-6,
    seed: int = 0,
) -> Aggregated:
    """Weigh each parameter by the models' diagonal Fisher information: ``(F_A * A + F_B * B) / (F_A + F_B)``.

    With the empirical information it is the server's step of FedFish (Dhawan et al. 2024), for two clients of equally
    many examples.

    Args:
        a: model A.
        b: model B, of the same architecture and aligned to A.
        data: what both are asked about; labels only for the empirical one. (The authors ask each about its own data.)
        expectation: ``"exact"``, ``"sampled"`` or ``"empirical"``; see :func:`diagonal_fisher`.
        examples: how many, at most; the first ones of a pass.
        floor: added to the information, so that where there is none the mean is taken.
        seed: of the labels that are drawn.

    Returns:
        The merged model, and in ``details["alpha"]`` the share of A in every parameter; one half for what A freezes.

    Raises:
        ValueError: the models differ in architecture or shape, or as :func:`diagonal_fisher`.

    Source:
        Matena & Raffel 2022, Eq. 5, with its 4,096 examples and its floor.
    """
    check_same_architecture(a, b)
    check_finite("floor", floor, above=0)
    merged = mean(a, b)
    known = partial(
        diagonal_fisher, data=data, expectation=expectation, examples=examples, seed=seed
    )
    alpha = fisher_share(known(a), known(b), floor=floor)
    alpha |= {n: torch.full_like(p, 0.5) for n, p in a.named_parameters() if not p.requires_grad}
    theirs = dict(b.named_parameters())
    with torch.no_grad():
        for (name, own), target in zip(a.named_parameters(), merged.parameters(), strict=True):
            target.copy_(torch.lerp(theirs[name].to(own.device), own, alpha[name]))
    return Aggregated(merged, details={"alpha": alpha})


def fisher_share(
    first: dict[str, Tensor], second: dict[str, Tensor], *, floor: float = 1e-6
) -> dict[str, Tensor]:
    """A's share of the information, ``F_A / (F_A + F_B)``, by parameter name.

    Args:
        first: A's, from :func:`diagonal_fisher`.
        second: B's, aligned to A.
        floor: added to both.
    """
    return {name: (one + floor) / (one + second[name] + 2 * floor) for name, one in first.items()}


def diagonal_fisher(
    model: nn.Module,
    data: Data,
    *,
    expectation: str = "exact",
    examples: int = 4096,
    seed: int = 0,
) -> dict[str, Tensor]:
    """The diagonal of a classifier's Fisher information: the mean over the examples of squared gradients of log p.

    The gradients are each example's own: squares of a batch's gradient would be another quantity.

    Args:
        model: gives logits ``(N, classes)``; evaluated, not changed.
        data: any re-iterable of batches.
        expectation: the mean over all labels, weighted by what the model thinks of them (``"exact"``); over one label,
            drawn by it (``"sampled"``); or over the true one (``"empirical"``).
        examples: the first so many of a pass, at most.
        seed: of the labels that are drawn.

    Returns:
        A tensor of its shape for every parameter, by name; zero for frozen ones.

    Raises:
        ValueError: an unknown expectation, no example asked for, data that is empty, or a model without logits.

    Source:
        Matena & Raffel 2022, Section 3.
    """
    if expectation not in get_args(Expectation):
        known = ", ".join(get_args(Expectation))
        raise ValueError(f"unknown expectation {expectation!r}: choose one of {known}")
    if examples < 1:
        raise ValueError(f"examples is {examples}: it must be at least 1")
    parameters = {name: p.detach() for name, p in learnable(model).items()}
    rest = {
        name: value.detach()
        for name, value in (*model.named_parameters(), *model.named_buffers())
        if name not in parameters
    }
    generator = torch.Generator().manual_seed(seed)
    found = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    count = 0
    with measuring(model) as device:
        for batch in stream(data, device):
            batch = _first(batch, examples - count)
            for name, value in _squared_gradients(
                model, parameters, rest, batch, expectation, generator
            ):
                found[name] += value
            count += size_of(batch)
            if count >= examples:
                break
    return {name: value / count for name, value in found.items()}


def _squared_gradients(
    model: nn.Module,
    parameters: dict[str, Tensor],
    rest: dict[str, Tensor],
    batch: Batch,
    expectation: str,
    generator: torch.Generator,
) -> list[tuple[str, Tensor]]:
    """The sums over a batch of weighted squares."""
    positional, named = inputs_of(batch, model)

    def log_probabilities(values: dict[str, Tensor], *given: Any) -> Tensor:
        args, kwargs = tree_map(lambda tensor: tensor[None], given)
        outputs = functional_call(model, values | rest, args, kwargs)
        return as_logits(outputs).log_softmax(-1)[0]

    with torch.no_grad():
        logits = as_logits(outputs_of(model, batch))
    if logits.ndim != 2:
        raise ValueError(
            f"the model gives {tuple(logits.shape)} where one label an example is needed"
        )
    weights = logits.softmax(-1)
    if expectation == "sampled":
        drawn = torch.multinomial(weights.cpu(), 1, generator=generator).to(weights.device)
        weights = torch.zeros_like(weights).scatter_(1, drawn, 1)
    elif expectation == "empirical":
        weights = torch.zeros_like(weights).scatter_(1, labels_of(batch)[:, None], 1)
    asked = weights.shape[1] if expectation == "exact" else 1

    def weighted(weight: Tensor, *given: Any) -> dict[str, Tensor]:
        if asked == 1:
            gradient = jacrev(lambda values: (weight * log_probabilities(values, *given)).sum())
            return {name: g.square() for name, g in gradient(parameters).items()}
        rows = jacrev(log_probabilities)(parameters, *given)
        return {name: torch.tensordot(weight, row.square(), 1) for name, row in rows.items()}

    numbers = asked * sum(p.numel() for p in parameters.values())
    sums = vmap(weighted, chunk_size=max(1, AT_ONCE // numbers))(weights, positional, named)
    return [(name, value.sum(0)) for name, value in sums.items()]


def _first(batch: Batch, count: int) -> Batch:
    cut: Batch = tree_map(lambda tensor: tensor[:count], batch)
    return cut
