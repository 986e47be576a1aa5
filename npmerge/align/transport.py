"""Optimal transport: each group of channels is carried onto another model's, group after group from the input on."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from functools import partial
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor, nn

from npmerge.align.alignment import Alignment
from npmerge.align.correlation import assignment
from npmerge.data.streams import Data, example_of, inputs_of, mapped, size_of, stream
from npmerge.device import measuring
from npmerge.methods import method
from npmerge.symmetry import Group, activations, check_same_architecture, symmetry_on, tap
from npmerge.symmetry.multiplying import by_tensor, multiplied

COSTS = ("activations", "weights")
METRICS = ("euclidean", "sqeuclidean", "cosine")
ITERATIONS = 1_000_000
"""Of the exact solver, at most; its own default is too few for a thousand channels."""


@method(
    kind="align", label="Optimal Transport", short="OT", family="alignment", needs=("data",),
    reference="singh2020", place=8, use="To let NP Merge or any other aggregation follow optimal transport.",
)  # fmt: skip
def ot(
    a: nn.Module,
    b: nn.Module,
    data: Data,
    *,
    groups: Sequence[Group] | None = None,
    cost: str = "activations",
    metric: str = "euclidean",
    examples: int = 200,
) -> Alignment:
    """Carry B's channels onto A's at the least cost; between equal widths that is a permutation.

    Exact transport between uniform measures of n points each is ``P / n``, solved as an assignment. What differs from
    Permute and Weight Matching is the cost: distances of raw activations, or of the weights that produce a channel,
    their inputs carried before. A transport that splits channels has no inverse, as an alignment needs one, so
    regularisation and other widths are left to :func:`~npmerge.zips.optimal_transport.ot_fusion`.

    Args:
        a: Model A; its device is used.
        b: Model B, of the same architecture and width.
        data: Re-iterable of batches; the labels are not used.
        groups: The symmetry groups, if already known.
        cost: ``"activations"`` or ``"weights"``; see :func:`plans`.
        metric: ``"euclidean"`` (the authors'), ``"sqeuclidean"`` or ``"cosine"``.
        examples: How many activations are of, at most; 200 is the authors'.

    Returns:
        A permutation per group.

    Raises:
        ValueError: If the models differ in architecture or shape, an option is unknown, the data is empty, or values
            are not finite.
        SymmetryError: If the model's symmetry groups cannot be found.

    Source:
        Singh and Jaggi 2020, "Model Fusion via Optimal Transport", for equal widths.
    """
    check_same_architecture(a, b)
    groups = tuple(symmetry_on(a, example_of(data)) if groups is None else groups)
    found = plans(b, a, groups, groups, data, cost=cost, metric=metric, examples=examples)
    return Alignment.from_permutations(groups, [plan.argmax(0) for plan in found])


@torch.no_grad()
def plans(
    moved: nn.Module,
    anchor: nn.Module,
    moved_groups: Sequence[Group],
    anchor_groups: Sequence[Group],
    data: Data,
    *,
    cost: str = "activations",
    metric: str = "euclidean",
    examples: int = 200,
    regularisation: float = 0.0,
) -> list[Tensor]:
    """How much of each channel of one model goes to each of another, of any width; measures are uniform.

    One plan a group. By weights, the cost is the distance of what produces the two channels: weights, biases, and a
    norm's scale and shift, with the inputs of the moved ones carried already (``W @ U``, U the plan with rows that sum
    to one). The group comes next of which the largest share of entries has carried inputs: from the input of the
    network on, a residual stream by its first layer. By activations, it is the distance of what the channels answer,
    over examples and positions (the authors' before the activation function, ours where the group's tap is); groups
    that no activation shows, or none without others, go by their weights.

    Args:
        moved: The model whose channels are carried.
        anchor: The other; its device is used.
        moved_groups: The symmetry groups of the moved one.
        anchor_groups: Those of the anchor, matched.
        data: Re-iterable of batches, for activations.
        cost: ``"activations"`` or ``"weights"``.
        metric: ``"euclidean"``, ``"sqeuclidean"`` or ``"cosine"``.
        examples: How many activations are of, at most.
        regularisation: Of the plan's entropy, relative to the largest cost; 0 is exact. Groups of which only
            permutations are allowed are exact always.

    Returns:
        Per group ``float64 (moved channels, anchor's)``, on the CPU, with rows that sum to 1 / their number and columns
        alike.

    Raises:
        ValueError: If an option is unknown or out of range, the data is empty, values are not finite, or POT is needed
            (other widths or regularisation) and missing.
    """
    for word, value, known in (("cost", cost, COSTS), ("metric", metric, METRICS)):
        if value not in known:
            raise ValueError(f"unknown {word} {value!r}: choose one of {', '.join(known)}")
    if examples < 1:
        raise ValueError(f"examples is {examples}: it must be at least 1")
    if not 0 <= regularisation < float("inf"):
        raise ValueError(
            f"regularisation is {regularisation}: it must be a finite number that is not negative"
        )
    found: dict[int, Tensor] = {}
    if cost == "activations":
        found = {
            number: _plan(_distances(*sums, metric), moved_groups[number], regularisation)
            for number, sums in _products(
                moved, anchor, moved_groups, anchor_groups, data, examples
            ).items()
        }
    weights = _Weights(moved, anchor, moved_groups, anchor_groups)
    waiting = [number for number in range(len(anchor_groups)) if number not in found]
    while waiting:
        number = max(waiting, key=partial(weights.share, found))
        waiting.remove(number)
        costs = _distances(*weights.products(found, number), metric)
        found[number] = _plan(costs, moved_groups[number], regularisation)
    return [found[number] for number in range(len(anchor_groups))]


class _Weights:
    """What produces the channels of two models' groups."""

    def __init__(
        self,
        moved: nn.Module,
        anchor: nn.Module,
        moved_groups: Sequence[Group],
        anchor_groups: Sequence[Group],
    ) -> None:
        self._anchor = {name: p.detach().double() for name, p in anchor.named_parameters()}
        self._moved = {
            name: p.detach().to(self._anchor[name]) for name, p in moved.named_parameters()
        }
        self._groups = moved_groups, anchor_groups
        self._beside = by_tensor(moved_groups)

    def share(self, found: dict[int, Tensor], number: int) -> float:
        """Of the entries that produce a group's channels, the share whose other channels are carried already."""
        sizes = [
            (self._moved[place.name].numel(), self._is_known(found, number, index))
            for index, place in self._producing(number)
        ]
        return sum(size for size, known in sizes if known) / max(1, sum(size for size, _ in sizes))

    def products(self, found: dict[int, Tensor], number: int) -> tuple[Tensor, Tensor, Tensor]:
        """The squared norms of the channels' weights, and the inner products of the two models'."""
        first, second = (groups[number] for groups in self._groups)
        anchor = next(iter(self._anchor.values()))
        xx, yy = (anchor.new_zeros(group.size) for group in (first, second))
        xy = anchor.new_zeros(first.size, second.size)
        for index, place in self._producing(number):
            if not self._is_known(found, number, index):
                continue
            maps = []
            for other, slot in self._beside[place.name]:
                if other != number:
                    carried = stochastic(found[other] if slot.role == "in" else found[other].T)
                    matrix = carried.T if slot.role == "in" else carried
                    maps.append((slot, matrix.to(anchor)))
            tensor, (where,) = multiplied(self._moved[place.name], maps, [place])
            x = where.view(tensor, first.size).flatten(1)
            target = second.slots[index]
            y = target.view(self._anchor[target.name], second.size).flatten(1)
            xx, yy, xy = xx + x.square().sum(1), yy + y.square().sum(1), xy + x @ y.T
        return xx, yy, xy

    def _producing(self, number: int) -> list[tuple[int, Any]]:
        return [
            (index, slot)
            for index, slot in enumerate(self._groups[0][number].slots)
            if slot.role != "in" and slot.name in self._moved
        ]

    def _is_known(self, found: dict[int, Tensor], number: int, index: int) -> bool:
        place = self._groups[0][number].slots[index]
        return all(other in found or slot == place for other, slot in self._beside[place.name])


def _products(
    moved: nn.Module,
    anchor: nn.Module,
    moved_groups: Sequence[Group],
    anchor_groups: Sequence[Group],
    data: Data,
    examples: int,
) -> dict[int, tuple[Tensor, Tensor, Tensor]]:
    """As of weights, of the activations of each group that one shows by itself."""
    shown = [
        number
        for number, group in enumerate(anchor_groups)
        if group.tap is not None and not group.tap.mixed
    ]
    first, second = ([groups[n] for n in shown] for groups in (moved_groups, anchor_groups))
    sums: dict[int, tuple[Tensor, Tensor, Tensor]] = {}
    left = examples

    def add(held: list[Tensor | None], place: int, activation: Tensor) -> None:
        other = held[place]
        group, target = first[place], second[place]
        if other is None or group.tap is None or target.tap is None:
            return
        x = group.tap.rows(activation, group.size).double()
        y = target.tap.rows(other, target.size).double()
        new = x.square().sum(0), y.square().sum(0), x.T @ y
        old = sums.get(shown[place], (0, 0, 0))
        sums[shown[place]] = new[0] + old[0], new[1] + old[1], new[2] + old[2]

    with measuring(anchor) as device:
        for batch in stream(data, device):
            part = mapped(batch, itemgetter(slice(left)))
            positional, named = inputs_of(part, anchor)
            held = activations(anchor, second, *positional, **named)
            tap(moved, first, partial(add, held), *positional, **named)
            left -= size_of(part)
            if left <= 0:
                break
    return sums


def _distances(xx: Tensor, yy: Tensor, xy: Tensor, metric: str) -> Tensor:
    """The costs, from squared norms and inner products."""
    if metric == "cosine":
        norms = torch.outer(xx, yy).sqrt()
        return 1 - torch.where(norms > 0, xy / norms, 0)
    squares = (xx[:, None] + yy - 2 * xy).clamp(min=0)
    return squares.sqrt() if metric == "euclidean" else squares


def _plan(costs: Tensor, group: Group, regularisation: float) -> Tensor:
    """Transport between uniform measures, ``(moved channels, anchor's)``."""
    rows, columns = costs.shape
    exact = not regularisation or bool(group.permutations_only)
    if exact and rows == columns:
        return torch.eye(rows, dtype=torch.float64)[assignment(-costs, group)] / rows
    if not costs.isfinite().all():
        raise ValueError(
            f"group {group.name!r} has values that are not finite: check both models' parameters and the data"
        )
    try:
        pot = importlib.import_module("ot")
    except ImportError as error:
        raise ValueError(
            "optimal transport between widths, or with regularisation, is solved by POT, which is not here: "
            "pip install npmerge[ot]"
        ) from error
    matrix = costs.cpu().numpy()
    if exact:
        plan = pot.emd([], [], matrix, numItermax=ITERATIONS)
    else:
        scaled = matrix / (matrix.max() or 1)
        plan = pot.sinkhorn([], [], scaled, regularisation, method="sinkhorn_log")
    return torch.from_numpy(plan).double()


def stochastic(plan: Tensor) -> Tensor:
    """A plan with rows that sum to one.

    Args:
        plan: with rows that sum to more than nothing.
    """
    return plan / plan.sum(1, keepdim=True)
