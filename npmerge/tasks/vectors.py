"""What models have learned since they were one: task vectors, their differences from a common base."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from npmerge.aggregate.uniform_and_greedy import uniform_soup
from npmerge.symmetry import check_same_architecture

NO_BASE = (
    "give base, the model that all of them were trained from: what each has learned is counted from it. "
    "Networks trained apart have none, and their mean is no substitute: counted from it, two of them have learned "
    "the same with opposite signs, which cancels"
)
"""Why a method with task vectors cannot do without a base, and what to give."""


def checked_base(models: Sequence[nn.Module], base: nn.Module | None) -> nn.Module:
    """The base, if it and all models are of one architecture.

    Args:
        models: at least one.
        base: what they were trained from.

    Raises:
        ValueError: there is no model or no base, or one of them is of another architecture than the first model.
    """
    if not models:
        raise ValueError("no models: give at least one")
    if base is None:
        raise ValueError(f"base is None: {NO_BASE}")
    for model in models[1:]:
        check_same_architecture(models[0], model)
    try:
        check_same_architecture(models[0], base)
    except ValueError as error:
        raise ValueError(f"the base, here the second model, does not fit: {error}") from error
    return base


@torch.no_grad()
def task_vectors(models: Sequence[nn.Module], base: nn.Module | None) -> dict[str, Tensor]:
    """The task vectors ``tau_i = theta_i - theta_0`` of all models, tensor by tensor.

    Those of floating-point parameters, frozen ones too; of a shared parameter once.

    Args:
        models: k of them.
        base: what they were trained from.

    Returns:
        By parameter name a tensor ``(k, *shape)``, on the first model's device, at least ``float32``.

    Raises:
        ValueError: as :func:`checked_base`; or the base is the mean of the models.
    """
    start = _named(checked_base(models, base))
    every = [_named(model) for model in models]
    found = {
        name: torch.stack([_wide(named[name], own) - _wide(start[name], own) for named in every])
        for name, own in models[0].named_parameters()
        if own.is_floating_point() and own.numel()
    }
    size = sum(float(tau.abs().sum()) for tau in found.values())
    if size and sum(float(tau.sum(0).abs().sum()) for tau in found.values()) < 1e-5 * size:
        raise ValueError(f"the base is the mean of the models: {NO_BASE}")
    return found


@torch.no_grad()
def added(
    models: Sequence[nn.Module], base: nn.Module | None, delta: Mapping[str, Tensor]
) -> nn.Module:
    """``theta_0 + delta`` as a new model, like the first one; its batch norm statistics are the models' mean.

    Args:
        models: of one architecture; integer buffers are the first one's.
        base: what they were trained from.
        delta: a tensor of its shape for every floating-point parameter, by name.
    """
    start, merged = _named(checked_base(models, base)), uniform_soup(models)
    for name, parameter in merged.named_parameters():
        if name in delta:
            parameter.copy_(start[name].to(delta[name]) + delta[name])
    return merged


def by_tensor(
    models: Sequence[nn.Module], base: nn.Module | None, change: Callable[[Tensor], Tensor]
) -> nn.Module:
    """``theta_0 + change(tau)``, tensor by tensor.

    Args:
        models: k of them.
        base: what they were trained from.
        change: takes ``(k, *shape)`` to ``shape``.
    """
    vectors = task_vectors(models, base)
    return added(models, base, {name: change(tau) for name, tau in vectors.items()})


def as_one(
    models: Sequence[nn.Module], base: nn.Module | None, change: Callable[[Tensor], Tensor]
) -> nn.Module:
    """``theta_0 + change(tau)``, with all parameters in one vector.

    Args:
        models: k of them.
        base: what they were trained from.
        change: takes ``(k, n)`` to ``(n,)``.
    """
    vectors = task_vectors(models, base)
    device = next(iter(vectors.values())).device
    whole = change(torch.cat([tau.reshape(len(tau), -1).to(device) for tau in vectors.values()], 1))
    parts = whole.split([tau[0].numel() for tau in vectors.values()])
    delta = {
        name: part.view(tau.shape[1:]).to(tau)
        for (name, tau), part in zip(vectors.items(), parts, strict=True)
    }
    return added(models, base, delta)


def check_share(name: str, value: float, *, zero: bool = False, one: bool = True) -> None:
    """Raise a ``ValueError`` if an option is not a share.

    Args:
        name: the option's.
        value: what was given.
        zero: whether none is allowed.
        one: whether all are.
    """
    if not (0 < value < 1 or (zero and value == 0) or (one and value == 1)):
        low, high = "0" if zero else "more than 0", "1" if one else "less than 1"
        raise ValueError(f"{name} is {value}: give a share, from {low} to {high}")


def _named(model: nn.Module) -> dict[str, nn.Parameter]:
    return dict(model.named_parameters(remove_duplicate=False))


def _wide(parameter: Tensor, like: Tensor) -> Tensor:
    return parameter.to(like.device, torch.promote_types(like.dtype, torch.float32))
