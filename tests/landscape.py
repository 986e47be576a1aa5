"""Landscapes of two parameters, whose minima, valleys and saddles are known."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from npmerge.training import Learning

Height = Callable[[Tensor, Tensor], Tensor]


class Place(nn.Module):
    """A place in a landscape: its answer is the height there, for every example."""

    def __init__(self, x: float, y: float, height: Height) -> None:
        super().__init__()
        self.place = nn.Parameter(torch.tensor([x, y], dtype=torch.float64))
        self.height = height

    def forward(self, examples: Tensor) -> Tensor:
        """``(N, 1)`` to ``(N,)``."""
        return self.height(*self.place).expand(len(examples))


def parabola(x: Tensor, y: Tensor) -> Tensor:
    """Minima of 0 at (-1, 0) and (1, 0), a valley ``y = 1 - x^2`` in between, a saddle of 1 at (0, 1).

    On the straight line the height is 5 half-way.
    """
    return (x**2 - 1) ** 2 + 4 * (y - 1 + x**2) ** 2


def ends(height: Height = parabola) -> tuple[Place, Place]:
    return Place(-1, 0, height), Place(1, 0, height)


def ticks(count: int) -> list[Any]:
    """Data that is so many steps long and says nothing."""
    return [(torch.zeros(1, 1), torch.zeros(1))] * count


def lowering(**ways: Any) -> Learning:
    """The loss is the height."""
    return Learning(loss=lambda outputs, _: outputs.mean(), mixed_precision=False, **ways)
