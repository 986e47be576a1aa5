"""Permute, with the heads of attention held in place or their dimensions matched head by head: what do heads bring?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from npmerge.align.alignment import Alignment
from npmerge.align.correlation import assignment, permute
from npmerge.align.moments import covariances
from npmerge.data.streams import Data, example_of
from npmerge.methods import method
from npmerge.symmetry import Group, SymmetryError, Tap, symmetry_on


@dataclass(frozen=True)
class Heads:
    """The heads of one attention.

    Attributes:
        group: its heads, each of whose channels is a block of others.
        inner: the groups of the dimensions inside, which all heads share.
    """

    group: Group
    inner: tuple[Group, ...]


def heads_of(groups: Sequence[Group]) -> list[Heads]:
    """The groups that are heads: their channels are blocks that hold the channels of other groups.

    Args:
        groups: the symmetry groups of a model.
    """

    def blocks(group: Group) -> set[tuple[str, int]]:
        return {(slot.name, slot.axis) for slot in group.slots if slot.block > 1}

    def inside(group: Group, heads: Group) -> bool:
        return all(
            (slot.name, slot.axis) in blocks(heads) and [n for n, _ in slot.repeats] == [heads.size]
            for slot in group.slots
        )

    found = [Heads(one, tuple(other for other in groups if inside(other, one))) for one in groups]
    return [one for one in found if one.inner]


@method(
    kind="align", label="Permute, heads held", short="P, heads held", family="alignment",
    needs=("data",), ours=True, place=5, use="As a control for transformers, to see how much matched heads bring.",
)  # fmt: skip
def permute_fixed_heads(
    a: nn.Module, b: nn.Module, data: Data, *, groups: Sequence[Group] | None = None
) -> Alignment:
    """Permute all channels but the heads of attention, which stay where they are.

    Args:
        a: model A; its device is used.
        b: model B, of the same architecture.
        data: re-iterable of batches.
        groups: the symmetry groups, if already known.

    Raises:
        ValueError, SymmetryError: as :func:`npmerge.align.correlation.permute`.
    """
    groups = _known(a, data, groups)
    held = [one.group for one in heads_of(groups)]
    return permute(a, b, data, groups=[group for group in groups if group not in held])


@method(
    kind="align", label="Permute, head by head", short="P, by head", family="alignment",
    needs=("data",), reference="verma2024", ours=True, place=6,
    use="For transformers whose heads have learned their dimensions independently of each other.",
)  # fmt: skip
def permute_by_head(
    a: nn.Module, b: nn.Module, data: Data, *, groups: Sequence[Group] | None = None
) -> Alignment:
    """Permute, with a permutation of its own for the dimensions of each head.

    The symmetry groups have one permutation of dimensions for all heads of an attention, but each head may have its
    own. Heads are matched by their attention patterns, as in Permute; then the dimensions of each pair of heads by the
    correlation of what the layers before them put out.

    Args:
        a: model A; its device is used.
        b: model B, of the same architecture.
        data: re-iterable of batches.
        groups: the symmetry groups, if already known.

    Raises:
        ValueError, SymmetryError: as :func:`npmerge.align.correlation.permute`.

    Source:
        Verma & Elbayad 2024, "Merging Text Transformer Models from Different Initializations": a permutation of the
        heads and one inside each. That heads are matched by their attention patterns is as in Permute.
    """
    return _by_head(a, b, data, groups, held=False)


@method(
    kind="align", label="Permute, head by head, heads held", short="P, by head, held", family="alignment",
    needs=("data",), ours=True, place=7, use="As a control for transformers: dimensions matched, heads held.",
)  # fmt: skip
def permute_by_fixed_head(
    a: nn.Module, b: nn.Module, data: Data, *, groups: Sequence[Group] | None = None
) -> Alignment:
    """Permute, with a permutation of its own for the dimensions of each head, and each head where it is.

    Args:
        a: model A; its device is used.
        b: model B, of the same architecture.
        data: re-iterable of batches.
        groups: the symmetry groups, if already known.

    Raises:
        ValueError, SymmetryError: as :func:`npmerge.align.correlation.permute`.
    """
    return _by_head(a, b, data, groups, held=True)


def _by_head(
    a: nn.Module, b: nn.Module, data: Data, groups: Sequence[Group] | None, *, held: bool
) -> Alignment:
    groups = _known(a, data, groups)
    every = heads_of(groups)
    inner = [group for one in every for group in one.inner]
    found = permute(a, b, data, groups=[group for group in groups if group not in inner])
    orders = dict(zip((group.name for group in found.groups), found.maps, strict=True))
    wholes = {group.name: _whole(a, one.group, group) for one in every for group in one.inner}
    measured = covariances(a, b, data, groups=list(wholes.values()), variances_only=True)
    correlations = dict(zip(wholes, measured.correlations(), strict=True))
    permutations: list[tuple[Group, Tensor]] = []
    for group, order in zip(found.groups, found.maps, strict=True):
        slots = _outside(group, every)
        if slots and not (held and slots != group.slots):
            permutations.append((replace(group, slots=slots), order))
    for one in every:
        order = torch.arange(one.group.size) if held else orders[one.group.name]
        for group in one.inner:
            shape = (one.group.size, group.size)
            pairs = correlations[group.name].view(*shape, *shape)
            parts = [
                head * group.size + assignment(pairs[k, :, head], group)
                for k, head in enumerate(order.tolist())
            ]
            permutations.append((wholes[group.name], torch.cat(parts)))
    return Alignment.from_permutations(*map(list, zip(*permutations, strict=True)))


def _known(a: nn.Module, data: Data, groups: Sequence[Group] | None) -> tuple[Group, ...]:
    return tuple(symmetry_on(a, example_of(data)) if groups is None else groups)


def _outside(group: Group, every: Sequence[Heads]) -> tuple[Any, ...]:
    """The slots of a group that no inner group of its heads permutes too."""
    inner = {
        (slot.name, slot.axis)
        for one in every
        if one.group == group
        for other in one.inner
        for slot in other.slots
    }
    return tuple(slot for slot in group.slots if (slot.name, slot.axis) not in inner)


def _whole(model: nn.Module, heads: Group, inner: Group) -> Group:
    """The dimensions of all heads as one group, shown by the linear layer that puts them out."""
    slots = tuple(replace(slot, repeats=()) for slot in inner.slots)
    for slot in slots:
        path, _, kind = slot.name.rpartition(".")
        layer: Any = model.get_submodule(path)
        if slot.role == "out" and kind == "weight" and slot.block == 1:
            operation = "mm" if layer.bias is None else "addmm"
            place = {name: getattr(slot, name) for name in ("length", "offset", "block")}
            tap = Tap(path=path, operation=operation, occurrence=0, axis=1, **place)
            return replace(inner, size=heads.size * inner.size, slots=slots, tap=tap)
    raise SymmetryError(
        f"no linear layer puts out the dimensions of {heads.name!r} in {inner.name!r}: take permute"
    )
