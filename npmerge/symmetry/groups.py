"""Symmetry groups, and where they act."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, overload

import torch
from torch import Tensor

Role = Literal["out", "in", "scale", "variance", "tied"]


class SymmetryError(ValueError):
    """The model contains an operation whose permutation symmetry is not known."""


@dataclass(frozen=True, kw_only=True)
class Span:
    """Where a group's channels lie on an axis of a tensor.

    Channel ``i`` has ``block`` consecutive indices from ``offset + i * block`` on, and the same again at every step of
    the loops in ``repeats``: heads around a head's dimensions, groups around the channels of a group.

    Attributes:
        axis: Number of the axis.
        length: Its length.
        offset: First index that belongs to the group (concatenation).
        block: Consecutive indices a channel (positions of a flattened map, the dimensions of a head).
        repeats: Loops around the channels, the outermost first: how often, and how many indices further each time.
    """

    axis: int
    length: int
    offset: int = 0
    block: int = 1
    repeats: tuple[tuple[int, int], ...] = ()

    def view(self, tensor: Tensor, size: int) -> Tensor:
        """View the place's part of a tensor with the channels first.

        Args:
            tensor: Of the length ``length`` on ``axis``.
            size: Number of channels of the group.

        Returns:
            A view ``(size, *repeats, block, *other axes)``.
        """
        moved = tensor.movedim(self.axis, 0)
        step, rest = moved.stride(0), moved.shape[1:]
        counts, strides = [n for n, _ in self.repeats], [s * step for _, s in self.repeats]
        return moved.as_strided(
            (size, *counts, self.block, *rest),
            (self.block * step, *strides, step, *moved.stride()[1:]),
            moved.storage_offset() + self.offset * step,
        )

    def permuted(self, tensor: Tensor, permutation: Tensor) -> Tensor:
        """Permute the channels of a tensor.

        Args:
            tensor: It is not changed.
            permutation: ``int64 (size,)``, ``new[i] = old[permutation[i]]``.

        Returns:
            A new tensor.
        """
        index = permutation.to(tensor.device)
        if self.block == 1 and len(index) == self.length:
            return tensor.index_select(self.axis, index)
        result = tensor.clone()
        part = self.view(result, len(index))
        part.copy_(part.index_select(0, index))
        return result

    def indices(self, size: int) -> Tensor:
        """The indices of each channel on the axis, ``int64 (size, indices a channel)``."""
        return replace(self, axis=0).view(torch.arange(self.length), size).flatten(1)


@dataclass(frozen=True, kw_only=True)
class Slot(Span):
    """Where a group acts on one tensor of the state dict.

    Attributes:
        name: State-dict key of a parameter or buffer, e.g. ``layer1.0.conv1.weight``.
        role: ``"out"``: as produced; ``"in"``: as consumed; ``"scale"``: a normalised channel's scale (batch norm's
            weight); ``"variance"``: a produced channel's variance (batch norm's running variance); ``"tied"``: used
            channel by channel, as by a depthwise convolution.
    """

    name: str
    role: Role


@dataclass(frozen=True, kw_only=True)
class Tap(Span):
    """The activation that shows a group: an output of the n-th run of an operation in a module.

    Attributes:
        path: Name of the module; empty for the model itself.
        operation: Name of the ATen operation.
        occurrence: How often it has run in the module before.
        output: Which of its tensors.
        mixed: Whether other axes hold channels of other groups, which must be aligned before this one is measured.
    """

    path: str
    operation: str
    occurrence: int
    output: int = 0
    mixed: bool = False

    def rows(self, activation: Tensor, size: int) -> Tensor:
        """The group's channels of an activation as ``(samples and positions, size)``; a view where that is possible."""
        if self.block == 1 and size == self.length:
            return activation.movedim(self.axis, -1).reshape(-1, size)
        return self.view(activation, size).movedim(0, -1).reshape(-1, size)


@dataclass(frozen=True)
class Group:
    """Channels (neurons, heads, dimensions of a head) that can be permuted without changing the model's function.

    Attributes:
        name: Readable, unique in the model: of the module whose activation shows the channels, where one does.
        size: Number of channels.
        slots: Every place in the state dict that enumerates these channels.
        tap: The activation that shows them; ``None`` if none does, as inside a product of two weights.
        permutations_only: What allows no other linear map than a permutation; empty where any is allowed.
    """

    name: str
    size: int
    slots: tuple[Slot, ...]
    tap: Tap | None = None
    permutations_only: str = ""

    @classmethod
    def unpack(cls, words: Mapping[str, Any]) -> Group:
        """Make a group of what :func:`dataclasses.asdict` and JSON have made of one.

        Args:
            words: by attribute.
        """
        slots = tuple(Slot(**_tuples(slot)) for slot in words["slots"])
        tap = words["tap"] and Tap(**_tuples(words["tap"]))
        return cls(**{**words, "slots": slots, "tap": tap})


def _tuples(place: Mapping[str, Any]) -> dict[str, Any]:
    return {**place, "repeats": tuple(tuple(loop) for loop in place["repeats"])}


@dataclass(frozen=True)
class Symmetry(Sequence[Group]):
    """The symmetry groups of a model: a sequence of :class:`Group`.

    Attributes:
        groups: In the order in which their activations appear.
        movable: Share of the parameters that some permutation moves, from 0 to 1.
        pinned: Operations without a rule, whose channels are held fixed, as ``"operation in module"``, and how often
            each ran; empty unless that was allowed.
        unused: Names of the parameters that the watched pass did not use; no group acts on them.
    """

    groups: tuple[Group, ...]
    movable: float
    pinned: Mapping[str, int] = field(default_factory=dict)
    unused: tuple[str, ...] = ()

    @overload
    def __getitem__(self, index: int) -> Group: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[Group, ...]: ...
    def __getitem__(self, index: int | slice) -> Group | tuple[Group, ...]:
        return self.groups[index]

    def __len__(self) -> int:
        return len(self.groups)

    def __iter__(self) -> Iterator[Group]:
        return iter(self.groups)

    def __str__(self) -> str:
        text = f"{len(self)} groups move {100 * self.movable:.1f}% of the parameters"
        if self.pinned:
            text += f"; held fixed by {', '.join(self.pinned)}"
        if self.unused:
            text += f"; not used by the pass: {', '.join(self.unused)}"
        return text
