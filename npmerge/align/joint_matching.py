"""Frank-Wolfe matching: the channels of all layers at once, by weights alone, through soft permutations."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.polynomial import Polynomial
from torch import Tensor, nn

from npmerge.align.alignment import Alignment, check_slot
from npmerge.align.correlation import assignment
from npmerge.methods import method
from npmerge.symmetry import Group, Slot, check_same_architecture, symmetry_on

logger = logging.getLogger(__name__)

Tensors = Mapping[str, Tensor]
Maps = Sequence[Tensor]
"""For each group a soft permutation, ``float64 (size, size)``: of no negative entry, each row and column with sum 1."""
Places = Mapping[str, Sequence[tuple[int, Slot]]]
"""By tensor: which groups act on it, by number, and where."""

SETTLED = 1e-6
"""A step that raises the objective by no more than this share of it is the last one."""


@method(
    kind="align", label="Frank-Wolfe Matching", short="FW", family="alignment",
    reference="crisostomi2024", place=4,
    use="Where there is no data, and Weight Matching depends on the order of the layers.",
)  # fmt: skip
def frank_wolfe(
    a: nn.Module,
    b: nn.Module,
    example: Any,
    *,
    groups: Sequence[Group] | None = None,
    seed: int = 0,
    starts: int = 3,
    max_steps: int = 400,
) -> Alignment:
    r"""Permute B's channels so that its parameters' inner product with A's is largest, all groups at once.

    The objective is that of :func:`~npmerge.align.rebasin.weight_matching`, f(P), but P ranges over soft permutations,
    and a step moves those of all groups together: to :math:`(1 - \gamma) P + \gamma S`, where S are the permutations
    that the gradient of f favours most, one assignment problem a group. In :math:`\gamma` f is a polynomial, so that
    the best step is known exactly. At the end each group's permutation is the one nearest to P.

    Args:
        a: Model A; its devices are used.
        b: Model B, of the same architecture.
        example: Inputs that the models accept: a tensor, a tuple of several, or a dictionary of keywords.
        groups: The symmetry groups, if already known.
        seed: Of the random starts.
        starts: From how many P to begin; what reaches the largest f counts. The first has all entries of a group equal,
            so that the order of B's channels does not matter; each other one is its mean with random permutations.
            Three are the authors', who begin at the identity, or at random.
        max_steps: The most steps from a start; 400 are the authors'.

    Returns:
        A permutation per group.

    Raises:
        ValueError: If ``starts`` or ``max_steps`` is not positive, the models differ in architecture or shape, or a
            parameter is not finite.
        SymmetryError: If the model's symmetry groups cannot be found.

    Source:
        Crisostomi et al. 2024, "C2M3", the matching of two models.
    """
    if starts < 1:
        raise ValueError(f"starts is {starts}: give at least 1")
    check_same_architecture(a, b)
    groups = tuple(symmetry_on(a, example) if groups is None else groups)
    generator = torch.Generator().manual_seed(seed)
    climb = partial(
        joint_ascent, parameters_of(a), [partial(parameters_of, b)], groups, max_steps=max_steps
    )
    reached = [climb([uniform_maps(groups)])]
    for _ in range(starts - 1):
        drawn = [torch.randperm(group.size, generator=generator) for group in groups]
        reached.append(climb([_between(uniform_maps(groups), _matrices(drawn), 0.5)]))
    (maps,), _ = max(reached, key=lambda one: one[1][-1])
    return rounded(groups, maps)


def joint_ascent(
    fixed: Tensors,
    moved: Sequence[Callable[[], Tensors]],
    groups: Sequence[Group],
    maps: Sequence[Maps],
    *,
    max_steps: int,
) -> tuple[list[Maps], list[float]]:
    r"""Frank-Wolfe steps that raise the inner products of all pairs of models, summed, until one hardly does.

    With :math:`T_0` the fixed parameters and :math:`T_m` those of another model as its soft permutations map them, the
    sum is :math:`f = \frac{1}{2} (\|\sum_m T_m\|^2 - \sum_m \|T_m\|^2)`: one model is in memory at a time. Along a step
    each T is a polynomial, whose degree is the number of groups that meet in an entry of a tensor, and so is f. In
    float64, with one copy of the parameters more in memory than that degree.

    Args:
        fixed: parameters by name; where they are, the products are taken.
        moved: functions that return the parameters of the other models; each is called once more than there are steps.
        groups: the symmetry groups; what they do to other tensors does not count.
        maps: for each of the other models where to begin.
        max_steps: the most steps; a warning says that they were not enough.

    Returns:
        For each of the other models its soft permutations; and f at the start and after each step: it never falls.

    Raises:
        ValueError: ``max_steps`` is not positive, a tensor does not have the shape a group expects, or a value is not
            finite.

    Source:
        Crisostomi et al. 2024, "C2M3". To take f from sums, and the best step from a polynomial, is ours.
    """
    if max_steps < 1:
        raise ValueError(f"max_steps is {max_steps}: give at least 1")
    places = _places(fixed, groups)
    nodes = np.linspace(0, 1, 1 + _degree(places, groups))
    basis = [Polynomial(own) for own in np.linalg.inv(np.vander(nodes, increasing=True)).T]
    still = {name: fixed[name].double() for name in places}
    total = {name: value[None].clone() for name, value in still.items()}
    for own, load in zip(maps, moved, strict=True):
        _add(total, load(), places, [own])
    history: list[float] = []
    for _ in range(max_steps):
        sums = {name: torch.stack([value] * len(nodes)) for name, value in still.items()}
        alone, goals = _products(sums, len(nodes)), []
        for own, load in zip(maps, moved, strict=True):
            tensors = load()
            goals.append(_favoured(tensors, total, places, groups, own))
            path = [_between(own, goals[-1], node) for node in nodes]
            alone += _add(sums, tensors, places, path)
        products = (_products(sums, len(nodes)) - alone).tolist()
        objective = sum(
            (0.5 * value * p * q for p, row in zip(basis, products, strict=True)
             for q, value in zip(basis, row, strict=True)), Polynomial([0.0]),
        )  # fmt: skip
        step = _highest(objective)
        maps = [_between(own, goal, step) for own, goal in zip(maps, goals, strict=True)]
        shares = torch.tensor([float(own(step)) for own in basis], dtype=torch.float64)
        total = {
            name: torch.tensordot(shares.to(value.device), value, dims=1)[None]
            for name, value in sums.items()
        }
        history = [*(history or [float(objective(0.0))]), float(objective(step))]
        if history[-1] - history[-2] <= SETTLED * abs(history[-1]):
            break
    else:
        logger.warning("joint matching still rises after %d steps", max_steps)
    return list(maps), history


def parameters_of(model: nn.Module) -> dict[str, Tensor]:
    """A model's parameters by name, without gradients."""
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def uniform_maps(groups: Sequence[Group]) -> Maps:
    """Soft permutations that favour none: the mean of all."""
    return [
        torch.full((group.size, group.size), 1 / group.size, dtype=torch.float64)
        for group in groups
    ]


def rounded(groups: Sequence[Group], maps: Maps) -> Alignment:
    """The permutations nearest to soft ones."""
    nearest = [assignment(own, group) for own, group in zip(maps, groups, strict=True)]
    return Alignment.from_permutations(groups, nearest)


def _places(tensors: Tensors, groups: Sequence[Group]) -> dict[str, list[tuple[int, Slot]]]:
    places: dict[str, list[tuple[int, Slot]]] = defaultdict(list)
    for number, group in enumerate(groups):
        for slot in group.slots:
            if slot.name in tensors:
                check_slot(slot, tensors)
                places[slot.name].append((number, slot))
    return places


def _degree(places: Places, groups: Sequence[Group]) -> int:
    """How many soft permutations meet in an entry of a tensor, at most."""
    highest = 1
    for slots in places.values():
        uses = {slot.axis: torch.zeros(slot.length, dtype=torch.int64) for _, slot in slots}
        for number, slot in slots:
            uses[slot.axis][slot.indices(groups[number].size)] += 1
        highest = max(highest, sum(int(use.max()) for use in uses.values()))
    return highest


@torch.enable_grad()
def _favoured(
    tensors: Tensors, total: Tensors, places: Places, groups: Sequence[Group], maps: Maps
) -> Maps:
    """The permutations that the gradient of one model's products with all others favours most."""
    leaves = [own.clone().requires_grad_() for own in maps]
    gains = [torch.zeros_like(own) for own in maps]
    for name, value in total.items():
        mapped = _mapped(tensors[name].to(value), places[name], leaves)
        product = ((value[0] - mapped.detach()) * mapped).sum()
        numbers = sorted({number for number, _ in places[name]})
        gradients = torch.autograd.grad(product, [leaves[number] for number in numbers])
        for number, gradient in zip(numbers, gradients, strict=True):
            gains[number] += gradient
    pairs = zip(gains, groups, strict=True)
    return _matrices([assignment(gain, group) for gain, group in pairs])


def _matrices(permutations: Sequence[Tensor]) -> Maps:
    return [torch.eye(len(own), dtype=torch.float64)[own] for own in permutations]


def _add(sums: Tensors, tensors: Tensors, places: Places, path: Sequence[Maps]) -> Tensor:
    """Add a model's tensors as they are at each point of a path; return their products with each other."""
    products = torch.zeros(len(path), len(path), dtype=torch.float64)
    for name, value in sums.items():
        tensor = tensors[name].to(value)
        along = torch.stack([_mapped(tensor, places[name], at) for at in path])
        products += _products({name: along}, len(path))
        value += along
    return products


def _products(tensors: Tensors, points: int) -> Tensor:
    """Inner products between the points of a path."""
    products = torch.zeros(points, points, dtype=torch.float64)
    for value in tensors.values():
        rows = value.flatten(1)
        products += (rows @ rows.T).cpu()
    return products


def _mapped(tensor: Tensor, slots: Sequence[tuple[int, Slot]], maps: Maps) -> Tensor:
    for number, slot in slots:
        matrix = maps[number].to(tensor.device)
        mixed = torch.tensordot(matrix, slot.view(tensor, len(matrix)), dims=1)
        tensor = tensor.clone()
        slot.view(tensor, len(matrix)).copy_(mixed)
    return tensor


def _between(one: Maps, other: Maps, share: float) -> Maps:
    return [torch.lerp(p, q, share) for p, q in zip(one, other, strict=True)]


def _highest(polynomial: Polynomial) -> float:
    """Where in [0, 1] a polynomial is largest."""
    turns = [complex(root) for root in polynomial.deriv().roots()]
    inner = [root.real for root in turns if not root.imag and 0 < root.real < 1]
    return max([0.0, 1.0, *inner], key=lambda step: float(polynomial(step)))
