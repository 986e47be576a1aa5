"""What an aggregation that learns gives back."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Aggregated:
    """A merged model and how it came about.

    Attributes:
        model: its batch norm statistics are not yet reset.
        history: the mean loss of each epoch.
        details: what else the method has to tell, by name.
    """

    model: nn.Module
    history: list[float] = field(default_factory=list)
    details: Mapping[str, Any] = field(default_factory=dict)

    @property
    def alpha(self) -> dict[str, Tensor] | None:
        """The share of model A in every parameter, by name, in (0, 1); ``None`` where the method has none."""
        return self.details.get("alpha")


def learnable(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that are not frozen (``requires_grad``), by name.

    Args:
        model: about to learn.

    Raises:
        ValueError: there is none.
    """
    found = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not found:
        raise ValueError(
            "every parameter of the model is frozen, nothing can be learned: call model.requires_grad_(), "
            "or aggregate by the mean"
        )
    return found


@torch.no_grad()
def taken_over(model: nn.Module, learned: nn.Module) -> nn.Module:
    """A copy of a model with another's parameters and buffers, in its own memory.

    Args:
        model: gives modes, ``requires_grad`` and memory formats.
        learned: gives the numbers; of the same architecture.
    """
    copied = copy.deepcopy(model)
    for tensors in (nn.Module.parameters, nn.Module.buffers):
        for target, value in zip(tensors(copied), tensors(learned), strict=True):
            target.copy_(value)
    return copied
