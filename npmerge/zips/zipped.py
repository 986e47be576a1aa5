"""The value that methods return which align and merge at once: for each symmetry group, which channels make which."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from npmerge.align.alignment import Alignment, check_slot
from npmerge.symmetry import Group, Slot, check_same_architecture, symmetry_on
from npmerge.symmetry.multiplying import by_tensor, multiplied
from npmerge.zips.widths import resized

TOLERANCE = 1e-6
"""How far from one the weights of a merged channel may sum."""


@dataclass(frozen=True, eq=False)
class Zip:
    r"""For each symmetry group and model m a merge matrix :math:`M_m` and an unmerge matrix :math:`U_m`.

    A merged channel is :math:`\sum_m M_m x_m` of the models' channels :math:`x_m`, and :math:`U_m` says which merged
    channels stand in for those of model m. The merged weights are
    :math:`W_C = \sum_m M_m^{out} W_m U_m^{in}`. Copies of one function, whose channels are permuted or doubled (with
    the weights behind them shared out), become that function if each U joins what is equal and its rows sum to one. (A
    norm over all channels, as LayerNorm, must see each of them equally often.)

    Args:
        groups: The symmetry groups of each model, as :func:`matched_groups` returns them.
        merges: Per group and model, ``float64 (merged channels, its channels)``; over all models a row sums to one.
        unmerges: Per group and model, ``float64 (its channels, merged channels)``.

    Raises:
        ValueError: If numbers, shapes or types do not fit, a value is not finite, weights do not sum to one, or
            channels are mixed in a group of which only permutations are allowed (heads, the channels of a depthwise
            convolution): there each channel of a model must stand in one merged channel alone.
    """

    groups: tuple[tuple[Group, ...], ...]
    merges: tuple[tuple[Tensor, ...], ...]
    unmerges: tuple[tuple[Tensor, ...], ...]

    def __post_init__(self) -> None:
        for field in ("groups", "merges", "unmerges"):
            object.__setattr__(self, field, tuple(map(tuple, getattr(self, field))))
        counts = {len(groups) for groups in self.groups} | {len(self.merges), len(self.unmerges)}
        if len(counts) != 1:
            raise ValueError(
                f"{len(self.merges)} and {len(self.unmerges)} groups of matrices for models of "
                f"{[len(groups) for groups in self.groups]} groups: give one of each a group"
            )
        for groups, merges, unmerges in zip(
            zip(*self.groups, strict=True), self.merges, self.unmerges, strict=True
        ):
            _check(groups, merges, unmerges)

    @classmethod
    def of(cls, *alignments: Alignment) -> Zip:
        """The mean of a model and of others that are aligned to it.

        Args:
            *alignments: Of the second model to the first, of the third to the first, and so on; not that of matrices
                whose rows do not sum to one, as CCA's: ``mean`` the aligned models there.

        Returns:
            The zip: of permutations it does what ``mean(a, alignment.apply(b))`` does.

        Raises:
            ValueError: If the alignments are of different groups, or as of a :class:`Zip`.
        """
        groups = alignments[0].groups
        if any(one.groups != groups for one in alignments):
            raise ValueError("alignments of different symmetry groups: give those of one model")
        count = 1 + len(alignments)
        merges, unmerges = [], []
        for number, group in enumerate(groups):
            still = torch.eye(group.size, dtype=torch.float64)
            maps = [still, *(_matrix(one.maps[number], still) for one in alignments)]
            merges.append(tuple(matrix / count for matrix in maps))
            unmerges.append((still, *(_matrix(one.inverses[number], still) for one in alignments)))
        return cls((tuple(groups),) * count, tuple(merges), tuple(unmerges))

    @property
    def widths(self) -> tuple[int, ...]:
        """How many channels each group has in the merged model."""
        return tuple(len(merges[0]) for merges in self.merges)

    @torch.no_grad()
    def apply(self, models: Sequence[nn.Module]) -> nn.Module:
        r"""Merge models, in float64.

        What a layer produces (weights, biases, a norm's scale and shift, a weight that works channel by channel) is
        multiplied by :math:`M_m`, what the next one consumes by :math:`U_m^\top`, on every axis that a group acts on,
        and the sum over the models is divided by the models' weights in it: one where one group produces, their number
        where none does, as of the last bias, which is the mean, or of the last weights, whose classes stay; and where
        several produce one entry, as a head and its dimension, the sum of the products of their weights.

        A running variance is multiplied by M too: that is exact for copies, and else no less than the variance of the
        merged channel. Reset batch norm afterwards. Integers are those of the first model.

        Args:
            models: As many as the zip has; none is changed.

        Returns:
            A new model of the merged widths, on the device and of the types of the first.

        Raises:
            ValueError: If a model does not have its groups' tensors and shapes, the models differ in more than widths,
                or a layer cannot take its new width; see :func:`~npmerge.zips.widths.resized`.
        """
        if len(models) != len(self.groups):
            raise ValueError(f"{len(models)} models for a zip of {len(self.groups)}")
        for model in models[1:]:
            check_same_architecture(models[0], model, widths=False)
        states = [model.state_dict() for model in models]
        slots = [by_tensor(groups) for groups in self.groups]
        merged: dict[str, Tensor] = {}
        for name, first in states[0].items():
            if not first.is_floating_point():
                merged[name] = first
                continue
            total, weight = (first.new_zeros((), dtype=torch.float64) for _ in range(2))
            shape = None
            for number, state in enumerate(states):
                part, share = self._mapped(
                    state[name].to(first.device), slots[number].get(name, ()), number
                )
                if shape not in (None, part.shape):
                    raise ValueError(
                        f"{name!r} becomes {tuple(shape or ())} of the first model and {tuple(part.shape)} of "
                        f"number {number + 1}: merge models that differ only in widths that can be permuted"
                    )
                shape, total, weight = part.shape, total + part, weight + share
            merged[name] = (total / torch.where(weight == 0, 1, weight)).to(first.dtype)
        like = next(
            (
                model
                for model, state in zip(models, states, strict=True)
                if all(state[name].shape == tensor.shape for name, tensor in merged.items())
            ),
            models[0],
        )
        return resized(like, merged)

    def _mapped(
        self, tensor: Tensor, slots: Sequence[tuple[int, Slot]], model: int
    ) -> tuple[Tensor, Tensor]:
        """What a model adds to a merged tensor, and its weight in it, which broadcasts."""
        part = tensor.double()
        read = [(s, self.unmerges[n][model].T.to(part)) for n, s in slots if s.role == "in"]
        made = [(s, self.merges[n][model].to(part)) for n, s in slots if s.role != "in"]
        for slot, _ in (*read, *made):
            check_slot(slot, {slot.name: part})
        axes = {slot.axis for slot, _ in made}
        ones = part.new_ones([n if axis in axes else 1 for axis, n in enumerate(part.shape)])
        return multiplied(part, [*read, *made])[0], multiplied(ones, made)[0]


def matched_groups(
    models: Sequence[nn.Module], example: Any, groups: Sequence[Group] | None = None
) -> tuple[tuple[Group, ...], ...]:
    """The symmetry groups of models of one architecture, whose widths may differ.

    Args:
        models: Two or more.
        example: Inputs that all of them accept: a tensor, a tuple of several, or a dictionary of keywords.
        groups: Those of the first model, if already known; they are those of every model of its shapes.

    Returns:
        The groups of each model, of equal names and in equal order.

    Raises:
        ValueError: If the models differ in more than widths; the message says what differs.
        SymmetryError: If a model's symmetry groups cannot be found.
    """
    for model in models[1:]:
        check_same_architecture(models[0], model, widths=False)
    known: dict[tuple[torch.Size, ...], tuple[Group, ...]] = {}
    if groups is not None:
        known[_shapes(models[0])] = tuple(groups)
    found = []
    for model in models:
        key = _shapes(model)
        if key not in known:
            known[key] = tuple(symmetry_on(model, example))
        found.append(known[key])
    for number, other in enumerate(found[1:], 2):
        if len(other) != len(found[0]):
            raise ValueError(
                f"the first model has {len(found[0])} symmetry groups and number {number} has {len(other)} (one of a "
                "single channel does not count): merge models of one architecture, each layer of two channels or more"
            )
        for first, second in zip(found[0], other, strict=True):
            if _places(first) != _places(second):
                raise ValueError(
                    f"group {first.name!r} of the first model acts on {_places(first)}, and group {second.name!r} of "
                    f"number {number} on {_places(second)}: merge models of one architecture"
                )
    return tuple(found)


def _check(groups: Sequence[Group], merges: Sequence[Tensor], unmerges: Sequence[Tensor]) -> None:
    """Check the matrices of one group of all models."""
    name = groups[0].name
    if not len(groups) == len(merges) == len(unmerges):
        raise ValueError(
            f"group {name!r} has {len(merges)} merges and {len(unmerges)} unmerges for {len(groups)} models"
        )
    for group, merge, unmerge in zip(groups, merges, unmerges, strict=True):
        width = len(merges[0])
        for what, matrix, shape in (
            ("merge", merge, (width, group.size)), ("unmerge", unmerge, (group.size, width)),
        ):  # fmt: skip
            if tuple(matrix.shape) != shape or matrix.dtype != torch.float64:
                raise ValueError(
                    f"the {what} of group {name!r} is {matrix.dtype} {tuple(matrix.shape)}: it must be float64 {shape}"
                )
            if not matrix.isfinite().all():
                raise ValueError(f"the {what} of group {name!r} has entries that are not finite")
        if group.permutations_only and not _is_pure(merge, unmerge):
            raise ValueError(
                f"channels are mixed in group {name!r}, but {group.permutations_only} works on each by itself: give "
                "unmerges of a single 1 a row, and merges of channels that this joins"
            )
    weights = torch.stack([merge.sum(1) for merge in merges]).sum(0)
    off = float((weights - 1).abs().max())
    if off > TOLERANCE:
        raise ValueError(
            f"the weights of a merged channel of group {name!r} sum to one but for {off:.1e}: divide the rows of the "
            "merges by their sum over all models"
        )


def _is_pure(merge: Tensor, unmerge: Tensor) -> bool:
    """Whether every channel of a model stands in one merged channel alone."""
    single = bool(((unmerge == 0) | (unmerge == 1)).all()) and bool((unmerge.sum(1) == 1).all())
    return single and not bool(merge[unmerge.T == 0].any())


def _shapes(model: nn.Module) -> tuple[torch.Size, ...]:
    return tuple(tensor.shape for tensor in model.state_dict().values())


def _places(group: Group) -> list[tuple[str, int, str]]:
    return [(slot.name, slot.axis, slot.role) for slot in group.slots]


def _matrix(mapping: Tensor, still: Tensor) -> Tensor:
    return still[mapping.cpu()] if mapping.ndim == 1 else mapping.cpu().double()
