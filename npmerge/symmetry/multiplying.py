"""Linear maps of channels, to as many or to more or fewer, on the axis of a tensor that enumerates them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from npmerge.symmetry.groups import Group, Slot


def by_tensor(groups: Sequence[Group]) -> dict[str, list[tuple[int, Slot]]]:
    """The slots of each tensor by its name, with the numbers of their groups.

    Args:
        groups: Of one model.
    """
    found: dict[str, list[tuple[int, Slot]]] = {}
    for number, group in enumerate(groups):
        for slot in group.slots:
            found.setdefault(slot.name, []).append((number, slot))
    return found


def multiplied(
    tensor: Tensor, maps: Sequence[tuple[Slot, Tensor]], others: Sequence[Slot] = ()
) -> tuple[Tensor, list[Slot]]:
    """Multiply channels by matrices; what else is on an axis stays, in its order.

    Args:
        tensor: It is not changed.
        maps: Slots of the tensor as it is, and for each a matrix ``(channels afterwards, channels before)`` of the
            tensor's type.
        others: Other slots of it.

    Returns:
        The new tensor, and where the others lie on it.
    """
    waiting, others = list(maps), list(others)
    while waiting:
        slot, matrix = waiting.pop()
        tensor = _multiplied(tensor, slot, matrix)
        waiting = [(_moved(place, slot, matrix), other) for place, other in waiting]
        others = [_moved(place, slot, matrix) for place in others]
    return tensor, others


def _multiplied(tensor: Tensor, slot: Slot, matrix: Tensor) -> Tensor:
    after, before = matrix.shape
    moved = _moved(slot, slot, matrix)
    shape = list(tensor.shape)
    shape[slot.axis] = moved.length
    result = tensor.new_empty(shape)
    rest, kept = (
        _beside(place, size).to(tensor.device) for place, size in ((slot, before), (moved, after))
    )
    result.index_copy_(slot.axis, kept, tensor.index_select(slot.axis, rest))
    moved.view(result, after).copy_(torch.tensordot(matrix, slot.view(tensor, before), dims=1))
    return result


def _beside(slot: Slot, size: int) -> Tensor:
    """The indices on a slot's axis that are not the group's."""
    free = torch.ones(slot.length, dtype=torch.bool)
    free[slot.indices(size).flatten()] = False
    return free.nonzero()[:, 0]


def _moved(place: Slot, by: Slot, matrix: Tensor) -> Slot:
    """Where a slot lies once the channels of another one on its axis, or its own, have become more or fewer."""
    after, before = matrix.shape
    if place.axis != by.axis or after == before:
        return place
    starts, run = list(_starts(by)), before * by.block

    def at(index: int) -> int:
        return index + (after - before) * by.block * sum(start + run <= index for start in starts)

    def further(step: int) -> int:
        return at(place.offset + step) - at(place.offset)

    inside = any(start <= place.offset < start + by.block for start in starts)
    repeats = tuple(
        (after if inside and (count, step) == (before, by.block) else count, further(step))
        for count, step in place.repeats
    )
    return replace(
        place,
        length=at(place.length),
        offset=at(place.offset),
        block=further(place.block),
        repeats=repeats,
    )


def _starts(slot: Slot) -> Iterator[int]:
    """The first index of each run of a slot's channels."""
    for number in range(math.prod(count for count, _ in slot.repeats)):
        start, left = slot.offset, number
        for count, step in reversed(slot.repeats):
            left, turn = divmod(left, count)
            start += turn * step
        yield start
