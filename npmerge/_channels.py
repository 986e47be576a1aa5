"""Which channels are the same: first-order unification over the axes of activations and weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

Role = Literal["out", "in", "scale", "variance", "tied"]


class UnsupportedError(Exception):
    """Raised by a rule; the tracer adds which operation and module it was."""


@dataclass(frozen=True)
class Segment:
    """Part of an axis: the channels of one variable, each `block` consecutive indices."""

    variable: int
    size: int
    block: int = 1

    @property
    def length(self) -> int:
        """Number of indices on the axis."""
        return self.size * self.block


Layout = tuple[Segment, ...]


def length(layout: Layout) -> int:
    """Return the length of the axis that a layout describes."""
    return sum(segment.length for segment in layout)


def scaled(layout: Layout, factor: int) -> Layout:
    """Return the layout of an axis on which every index is repeated `factor` times."""
    return tuple(Segment(s.variable, s.size, s.block * factor) for s in layout)


@dataclass(frozen=True)
class Activation:
    """An activation whose axis 1 is laid out as `layout`."""

    shape: torch.Size
    layout: Layout


@dataclass(frozen=True)
class Weight:
    """A parameter or buffer under all its state-dict names; without a name, a constant."""

    shape: torch.Size
    names: tuple[str, ...] = ()


@dataclass(frozen=True)
class Use:
    """An axis of a weight that enumerates the channels of a layout."""

    names: tuple[str, ...]
    axis: int
    role: Role
    layout: Layout


class Channels:
    """Variables, each a set of interchangeable channels, and where they act.

    A variable that turned out to be made of others is bound to their segments.
    """

    def __init__(self, names: Mapping[str, tuple[str, ...]]) -> None:
        self.names = names
        self._bindings: list[Layout | None] = []
        self._uses: dict[tuple[str, int], Use] = {}
        self._pinned: list[Layout] = []

    @property
    def uses(self) -> tuple[Use, ...]:
        """All uses, their layouts resolved."""
        uses = self._uses.values()
        return tuple(Use(u.names, u.axis, u.role, self.resolve(u.layout)) for u in uses)

    @property
    def pinned(self) -> set[int]:
        """The variables that cannot be permuted."""
        return {s.variable for layout in self._pinned for s in self.resolve(layout)}

    def pin(self, layout: Layout) -> None:
        """Say that these channels are seen from outside."""
        self._pinned.append(layout)

    def fresh(self, size: int) -> Layout:
        """Open a new variable."""
        if size == 0:
            return ()
        self._bindings.append(None)
        return (Segment(len(self._bindings) - 1, size),)

    def resolve(self, layout: Layout) -> Layout:
        """Replace every bound variable by what it is bound to."""
        return tuple(self._resolved(layout))

    def _resolved(self, layout: Layout) -> Iterator[Segment]:
        for segment in layout:
            binding = self._bindings[segment.variable]
            if binding is None:
                yield segment
            else:
                yield from self._resolved(scaled(binding, segment.block))

    def unite(self, first: Layout, second: Layout) -> None:
        """Say that two axes enumerate the same channels."""
        if length(first) != length(second):
            raise UnsupportedError(f"joins axes of {length(first)} and {length(second)} channels")
        while (left := self.resolve(first)) != (right := self.resolve(second)):
            x, y = next((x, y) for x, y in zip(left, right, strict=False) if x != y)
            coarse, fine = (x, y) if x.block >= y.block else (y, x)
            ratio, remainder = divmod(coarse.block, fine.block)
            if remainder or x.variable == y.variable:
                raise UnsupportedError("joins axes whose channels are interleaved differently")
            wide = coarse.size * ratio
            if fine.size >= wide:
                shared = (Segment(coarse.variable, coarse.size, ratio),)
                self._bindings[fine.variable] = shared + self.fresh(fine.size - wide)
            else:
                self._halve(coarse, fine.size, ratio)

    def cut(self, layout: Layout, at: int) -> tuple[Layout, Layout]:
        """Cut an axis at an index; a variable that lies across it is halved."""
        head: list[Segment] = []
        segments = list(reversed(self.resolve(layout)))
        while segments and at > 0:
            segment = segments.pop()
            if segment.length > at:
                self._halve(segment, at, segment.block)
                segments.extend(reversed(self.resolve((segment,))))
            else:
                head.append(segment)
                at -= segment.length
        return tuple(head), tuple(reversed(segments))

    def _halve(self, segment: Segment, at: int, block: int) -> None:
        size, remainder = divmod(at, block)
        if remainder:
            raise UnsupportedError("cuts an axis inside a channel's block of indices")
        self._bindings[segment.variable] = self.fresh(size) + self.fresh(segment.size - size)

    def weight(self, module: nn.Module, path: str, key: str) -> Weight | None:
        """Return a module's parameter or buffer; None where it has none."""
        tensor: Any = getattr(module, key, None)
        if tensor is None:
            return None
        name = f"{path}.{key}"
        if name not in self.names:
            raise UnsupportedError(f"computes its {key!r} from other parameters")
        return Weight(tensor.shape, self.names[name])

    def use(self, weight: Weight | None, axis: int, layout: Layout, role: Role) -> None:
        """Say that an axis of a weight enumerates the channels of a layout."""
        if weight is None:
            return
        if not weight.names:  # a constant cannot be permuted
            self.pin(layout)
            return
        key = weight.names[0], axis
        known = self._uses.get(key)
        if known is not None:
            self.unite(known.layout, layout)
            role = role if known.role == role else "tied"
        self._uses[key] = Use(weight.names, axis, role, layout)
