"""Sums of models, one in memory at a time."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from npmerge.prepare import checked
from npmerge.symmetry import check_same_architecture


class Sum:
    """Models of one architecture added up in float64, each times its weight, on the devices of the first one."""

    def __init__(self, first: nn.Module, weight: float = 1) -> None:
        state = checked(first).state_dict()
        self._like = emptied(first)
        self._weight = weight
        self._kept = {name: v.clone() for name, v in state.items() if not v.is_floating_point()}
        self._sums = {
            name: weight * v.to(torch.float64) for name, v in state.items() if v.is_floating_point()
        }

    def add(self, model: nn.Module, weight: float = 1) -> None:
        """Add a model."""
        check_same_architecture(self._like, model)
        state = model.state_dict()
        for name, total in self._sums.items():
            total.add_(state[name].to(total.device), alpha=weight)
        self._weight += weight

    def mean(self) -> nn.Module:
        """The mean as a new model, in the dtypes of the first one."""
        values = dict(self._kept)
        for name, empty in self._like.state_dict().items():
            if name in self._sums:
                values[name] = (self._sums[name] / self._weight).to(empty.dtype)
        return with_tensors(self._like, values)


def checked_weights(weights: Sequence[float] | None, count: int) -> list[float]:
    """The weights of a mean.

    Args:
        weights: equal by default.
        count: of models.

    Raises:
        ValueError: they are not so many, one is not finite, or their sum is not positive.
    """
    shares = [1.0] * count if weights is None else list(weights)
    if len(shares) != count or not all(map(math.isfinite, shares)) or sum(shares) <= 0:
        raise ValueError(
            f"weights is {weights}: give one finite number for each of the {count} models, with a positive sum"
        )
    return shares


def with_tensors(model: nn.Module, values: Mapping[str, Tensor]) -> nn.Module:
    """A copy of a model that has these tensors in the place of its own; tied ones stay tied.

    Args:
        model: is not changed.
        values: for every parameter and buffer, by name.
    """
    memo: dict[int, Any] = {}  # deepcopy takes these instead of copying
    for name, old in model.state_dict(keep_vars=True).items():
        new = values[name]
        memo[id(old)] = (
            nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else new
        )
    return copy.deepcopy(model, memo)


def emptied(model: nn.Module) -> nn.Module:
    """A copy of a model without its data: on the meta device, where memory formats are kept.

    Args:
        model: is not changed.
    """
    return with_tensors(model, {name: v.to("meta") for name, v in model.state_dict().items()})
