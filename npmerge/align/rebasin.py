"""Weight matching: match channels by their weights alone."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from npmerge.align.alignment import Alignment, check_slot
from npmerge.align.correlation import assignment
from npmerge.methods import method
from npmerge.symmetry import Group, Slot, check_same_architecture, symmetry_on

logger = logging.getLogger(__name__)

Tensors = Mapping[str, Tensor]
Order = Mapping[int, Tensor]
"""For axes of a tensor, which entry comes to each place."""

ROUNDING = 4 * torch.finfo(torch.float32).eps
"""What rounding two models' weights to float32 changes of an inner product at most, relative to their norms, twice."""
CLEAR = 1e-6
"""Where a group's gains say that the inner product rises by this much, relative to the norms, it does."""
SAFE = 1e-12, 1e12
"""Largest weights whose products float32 can hold; others are scaled."""


@method(
    kind="align", label="Weight Matching", short="WM", family="alignment",
    reference="ainsworth2023", place=3, use="Where there is no data at all.",
)  # fmt: skip
def weight_matching(
    a: nn.Module,
    b: nn.Module,
    example: Any,
    *,
    groups: Sequence[Group] | None = None,
    seed: int = 0,
    max_sweeps: int = 100,
) -> Alignment:
    """Permute B's channels so that its parameters' inner product with A's is largest.

    Coordinate descent: the groups are visited in random order; each is solved exactly with the others held fixed; it
    ends when a sweep changes no group. Weights, biases and batch-norm scale and shift count, running statistics do
    not. Products are taken in float32; a group is changed only if the inner product, in float64, rises. On residual
    networks the method does not reliably find a planted permutation.

    Args:
        a: Model A; its device is used.
        b: Model B, of the same architecture.
        example: Inputs that the models accept: a tensor, a tuple of several, or a dictionary of keywords.
        groups: The symmetry groups, if already known.
        seed: Of the order in which the groups are visited.
        max_sweeps: The most sweeps over all groups.

    Returns:
        A permutation per group.

    Raises:
        ValueError: If the models differ in architecture or shape, or a parameter is not finite.
        SymmetryError: If the model's symmetry groups cannot be found.

    Source:
        Ainsworth et al. 2023, "Git Re-Basin", algorithm 1.
    """
    check_same_architecture(a, b)
    groups = tuple(symmetry_on(a, example) if groups is None else groups)
    fixed = {name: p.detach() for name, p in a.named_parameters()}
    moved = {name: p.detach().to(fixed[name].device) for name, p in b.named_parameters()}
    descent = Descent(fixed, moved, groups)
    return Alignment.from_permutations(groups, descent.run(seed, max_sweeps))


def match_tensors(
    fixed: Tensors,
    moved: dict[str, Tensor],
    groups: Sequence[Group],
    *,
    seed: int,
    max_sweeps: int = 100,
) -> list[Tensor]:
    """Weight matching of tensors by name, without the models.

    Args:
        fixed: A's parameters.
        moved: B's, of the same names, shapes and devices; at the end its entries are the permuted ones.
        groups: The symmetry groups; what they do to other tensors does not count.
        seed: Of the order in which the groups are visited.
        max_sweeps: The most sweeps over all groups.

    Returns:
        A permutation per group.

    Raises:
        ValueError: If a tensor does not have the shape a group expects, or a value is not finite.
    """
    descent = Descent(fixed, moved, groups)
    permutations = descent.run(seed, max_sweeps)
    moved.update({name: descent.permuted(name) for name in descent.order})
    return permutations


class Descent:
    """Coordinate descent over the groups.

    B's tensors stay where they are: ``order[name][axis]`` says which entry comes to each place. A group's gains are
    kept, and updated where another axis of its tensors has changed its order; where none has, there is nothing to do.
    Axis 1 of every tensor is taken last, where matrix products need no copies.

    Args:
        fixed: A's parameters.
        moved: B's, of the same names, shapes and devices.
        groups: The symmetry groups; what they do to other tensors does not count.
    """

    def __init__(self, fixed: Tensors, moved: Tensors, groups: Sequence[Group]) -> None:
        self.groups, self.moved = groups, moved
        self.slots = [
            [_last_slot(slot, fixed) for slot in group.slots if slot.name in fixed]
            for group in groups
        ]
        self.order: dict[str, dict[int, Tensor]] = {}
        self.gains: list[Tensor] = []
        for group, slots in zip(groups, self.slots, strict=True):
            device = fixed[slots[0].name].device if slots else None
            self.gains.append(torch.zeros(group.size, group.size, device=device))
            for slot in slots:
                order = torch.arange(slot.length, device=fixed[slot.name].device)
                self.order.setdefault(slot.name, {})[slot.axis] = order
        self.x, self.y = (
            _prepared({name: state[name] for name in self.order}) for state in (fixed, moved)
        )
        self.scale = {name: float(x.norm() * self.y[name].norm()) for name, x in self.x.items()}
        self.permutations = [torch.arange(group.size) for group in groups]
        self.beside = self._beside()
        self.seen: dict[Slot, dict[int, Tensor]] = {}

    def run(self, seed: int, max_sweeps: int) -> list[Tensor]:
        """Visit the groups until none changes; return their permutations."""
        generator = torch.Generator().manual_seed(seed)
        for sweep in range(max_sweeps):
            order = torch.randperm(len(self.groups), generator=generator).tolist()
            changed = sum([self._improve(index) for index in order])
            logger.debug("weight matching: sweep %d changed %d groups", sweep, changed)
            if not changed:
                break
        else:
            logger.warning("weight matching still changes groups after %d sweeps", max_sweeps)
        return self.permutations

    def permuted(self, name: str) -> Tensor:
        """B's tensor in its present order."""
        tensor = _taken(_last(self.moved[name]), self.order[name])
        return tensor.movedim(-1, 1) if tensor.ndim > 2 else tensor

    def _improve(self, index: int) -> bool:
        """Solve one group with the others held fixed; return whether that has changed it."""
        if not self._update_gains(index):
            return False
        old, gains = self.permutations[index], self.gains[index].cpu().double()
        new = assignment(gains, self.groups[index])
        if torch.equal(new, old):
            return False
        orders = self._orders(index, new)
        rise = float((gains.gather(1, new[:, None]) - gains.gather(1, old[:, None])).sum())
        # Where the group enumerates two axes of one tensor, the problem is quadratic: the gains do not tell.
        linear = all(len(change) == 1 for change in orders.values()) and not any(
            self.beside[index, slot] for slot in self.slots[index]
        )
        clear = linear and rise > CLEAR * sum(self.scale[name] for name in orders)
        if not clear and not self._rises(orders):
            return False
        self._move(index, new, orders)
        return True

    def _move(self, index: int, permutation: Tensor, orders: Mapping[str, Order]) -> None:
        self.permutations[index] = permutation
        for name, change in orders.items():
            self.order[name] |= change

    def _update_gains(self, index: int) -> bool:
        """Bring a group's gains up to date; return whether anything was to be done."""
        done = False
        for slot in self.slots[index]:
            seen, order = self.seen.get(slot), self.order[slot.name]
            now = {axis: order[axis] for axis in order if axis != slot.axis}
            if self.beside[index, slot]:
                now[slot.axis] = self._axis_order(slot.name, slot.axis, without=index)
            if seen is None or not all(torch.equal(now[axis], seen[axis]) for axis in now):
                self._add(index, slot, seen, now)
                self.seen[slot] = now
                done = True
        return done

    def _add(self, index: int, slot: Slot, seen: Order | None, now: Order) -> None:
        """Add what a slot's tensor contributes to a group's gains, or by how much that has changed."""
        size, x, y = self.groups[index].size, self.x[slot.name], self.y[slot.name]
        if seen is None:
            y = _taken(y, now)
        else:
            if not self.beside[index, slot]:
                x, seen, now = _differing(x, seen, now)
            y = _taken(y, now) - _taken(y, seen)
        left, right = (channel_rows(tensor, slot, size) for tensor in (x, y))
        gains = self.gains[index]
        gains.addmm_(left.to(gains.device), right.T.to(gains.device))

    def _orders(self, index: int, permutation: Tensor) -> dict[str, dict[int, Tensor]]:
        """The orders of the tensors' axes under another permutation of a group."""
        result: dict[str, dict[int, Tensor]] = {}
        for slot in self.slots[index]:
            change = result.setdefault(slot.name, {})
            if self.beside[index, slot]:
                change[slot.axis] = self._axis_order(slot.name, slot.axis, index, permutation)
            else:
                order = change.get(slot.axis, self.order[slot.name][slot.axis]).clone()
                places = slot.indices(len(permutation))
                order[places] = places[permutation].to(order.device)
                change[slot.axis] = order
        return result

    def _beside(self) -> dict[tuple[int, Slot], bool]:
        """Whether other groups permute a slot's entries too, as heads and their dimensions do, or one does twice."""
        uses: dict[tuple[str, int], Tensor] = {}
        for slots, group in zip(self.slots, self.groups, strict=True):
            for slot in slots:
                used = uses.setdefault(
                    (slot.name, slot.axis), torch.zeros(slot.length, dtype=torch.int64)
                )
                used[slot.indices(group.size)] += 1
        return {
            (index, slot): bool((uses[slot.name, slot.axis][slot.indices(group.size)] > 1).any())
            for index, (slots, group) in enumerate(zip(self.slots, self.groups, strict=True))
            for slot in slots
        }

    def _axis_order(
        self,
        name: str,
        axis: int,
        index: int = -1,
        permutation: Tensor | None = None,
        *,
        without: int = -1,
    ) -> Tensor:
        """The order of an axis under the permutations of all groups, one of them another one or left out."""
        device = self.order[name][axis].device
        order: Tensor | None = None
        for number, (slots, own) in enumerate(zip(self.slots, self.permutations, strict=True)):
            for slot in slots:
                if slot.name == name and slot.axis == axis and number != without:
                    order = torch.arange(slot.length) if order is None else order
                    places = replace(slot, axis=0)
                    given = permutation if number == index and permutation is not None else own
                    order = places.permuted(order, given)
        if order is None:
            return torch.arange(len(self.order[name][axis]), device=device)
        return order.to(device)

    def _rises(self, orders: Mapping[str, Order]) -> bool:
        """Whether other orders make the inner product larger, by more than weights in float32 can be wrong about."""
        rise = scale = 0.0
        for name, change in orders.items():
            order = self.order[name]
            x, before, after = _differing(self.x[name], order, {**order, **change})
            x, old, new = x.double(), *(_taken(self.y[name], o).double() for o in (before, after))
            rise += float((x * new).sum() - (x * old).sum())
            scale += float(x.norm() * old.norm())
        return rise > ROUNDING * scale


def _last(tensor: Tensor) -> Tensor:
    return tensor.movedim(1, -1) if tensor.ndim > 2 else tensor


def _last_slot(slot: Slot, state: Tensors) -> Slot:
    """The slot, once axis 1 of its tensor is the last."""
    check_slot(slot, state)
    axis, ndim = slot.axis, state[slot.name].ndim
    return replace(slot, axis=(axis - 2) % (ndim - 1) + 1) if ndim > 2 and axis else slot


def channel_rows(tensor: Tensor, slot: Slot, size: int) -> Tensor:
    """A slot's channels as the rows of a matrix: a view, but for blocks on the last axis.

    Args:
        tensor: That of the slot.
        slot: Where the channels are.
        size: How many.
    """
    part = slot.view(tensor, size)
    if slot.axis:
        inner = len(slot.repeats) + 1
        part = part.movedim(tuple(range(1, 1 + inner)), tuple(range(-inner, 0)))
    return part.flatten(1)


def _taken(tensor: Tensor, order: Order) -> Tensor:
    """The entries of a tensor in other orders of some axes; the axis that loses most comes first."""
    for axis in sorted(order, key=lambda axis: len(order[axis]) / tensor.shape[axis]):
        if torch.equal(order[axis], torch.arange(tensor.shape[axis], device=tensor.device)):
            continue
        if axis == tensor.ndim - 1:  # a matrix's columns are much faster to take
            rows = tensor.flatten(0, -2) if axis else tensor
            taken = rows.index_select(-1, order[axis])
            tensor = taken.view(*tensor.shape[:-1], -1)
        else:
            tensor = tensor.index_select(axis, order[axis])
    return tensor


def _differing(x: Tensor, one: Order, other: Order) -> tuple[Tensor, Order, Order]:
    """Two orders, and the tensor beside them, without the places of an axis where they are the same.

    Only if a single axis differs: each place of two that do meets all of the other.
    """
    axes = [axis for axis in one if not torch.equal(one[axis], other[axis])]
    if len(axes) != 1:
        return x, one, other
    (axis,) = axes
    where = (one[axis] != other[axis]).nonzero()[:, 0]
    one, other = ({**order, axis: order[axis][where]} for order in (one, other))
    return x.index_select(axis, where), one, other


def _prepared(tensors: Tensors) -> dict[str, Tensor]:
    """Contiguous float32 tensors of a size whose products are finite."""
    peak = 0.0
    for name, tensor in tensors.items():
        largest = float(torch.stack(tensor.aminmax()).abs().max())
        if not math.isfinite(largest):
            raise ValueError(
                f"{name!r} has values that are not finite: check both models' parameters"
            )
        peak = max(peak, largest)
    factor = 1 if SAFE[0] < peak < SAFE[1] or not peak else 1 / peak
    return {
        name: _last(tensor if factor == 1 else tensor.double() * factor).float().contiguous()
        for name, tensor in tensors.items()
    }
