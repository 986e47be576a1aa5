"""Weight matching: match channels by their weights alone."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from npmerge.align.alignment import Alignment, channels, check_slot, permuted
from npmerge.align.permute import assignment
from npmerge.symmetry import Group, Slot, check_same_architecture, symmetry

logger = logging.getLogger(__name__)


def weight_matching(
    a: nn.Module,
    b: nn.Module,
    example_input: Tensor,
    *,
    groups: Sequence[Group] | None = None,
    seed: int = 0,
    max_sweeps: int = 100,
) -> Alignment:
    """Permute B's channels so that its parameters' inner product with A's is largest.

    Coordinate descent: the groups are visited in random order; each is solved exactly with the others held fixed; it
    ends when a sweep changes no group. Weights, biases and batch-norm scale and shift count, running statistics do
    not. The inner product (float64) never falls. On residual networks the method does not reliably find a planted
    permutation.

    Args:
        a: Model A; its device is used.
        b: Model B, of the same architecture.
        example_input: A batch the models accept, (N, C, ...); only its shape is used.
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
    groups = tuple(symmetry(a, example_input) if groups is None else groups)
    fixed = {name: p.detach().double() for name, p in a.named_parameters()}
    moved = {name: p.detach().to(fixed[name]) for name, p in b.named_parameters()}
    return Alignment.from_permutations(
        groups, match_tensors(fixed, moved, groups, seed=seed, max_sweeps=max_sweeps)
    )


def match_tensors(
    fixed: Mapping[str, Tensor],
    moved: dict[str, Tensor],
    groups: Sequence[Group],
    *,
    seed: int,
    max_sweeps: int = 100,
) -> list[Tensor]:
    """Weight matching of tensors by name, without the models.

    Args:
        fixed: A's parameters, float64.
        moved: B's, of the same names, shapes, dtype and device; at the end its entries are the permuted ones.
        groups: The symmetry groups; what they do to other tensors does not count.
        seed: Of the order in which the groups are visited.
        max_sweeps: The most sweeps over all groups.

    Returns:
        A permutation per group.

    Raises:
        ValueError: If a tensor does not have the shape a group expects, or a value is not finite.
    """
    slots = [[slot for slot in group.slots if slot.name in fixed] for group in groups]
    for slot in (slot for part in slots for slot in part):
        check_slot(slot, fixed)
    permutations = [torch.arange(group.size) for group in groups]
    generator = torch.Generator().manual_seed(seed)
    for sweep in range(max_sweeps):
        changed = 0
        for index in torch.randperm(len(groups), generator=generator).tolist():
            step = _improve(fixed, moved, groups[index], slots[index])
            if step is not None:
                permutations[index] = permutations[index][step]
                changed += 1
        logger.debug("weight matching: sweep %d changed %d groups", sweep, changed)
        if not changed:
            break
    else:
        logger.warning("weight matching still changes groups after %d sweeps", max_sweeps)
    return permutations


def _improve(
    fixed: Mapping[str, Tensor], moved: dict[str, Tensor], group: Group, slots: Sequence[Slot]
) -> Tensor | None:
    """Permute one group of `moved` in place if that brings it closer to `fixed`; return the permutation."""
    gain = torch.zeros(group.size, group.size, dtype=torch.float64)
    for slot in slots:
        x, y = (channels(state[slot.name], slot, group.size).flatten(1) for state in (fixed, moved))
        gain += (x @ y.T).cpu()
    step = assignment(gain, group)
    trial: dict[str, Tensor] = {}
    for slot in slots:
        trial[slot.name] = permuted(trial.get(slot.name, moved[slot.name]), slot, step)
    # Not read off `gain`: where the group enumerates two axes of one tensor, the problem is quadratic.
    before = sum(_inner(fixed[name], moved[name]) for name in trial)
    after = sum(_inner(fixed[name], tensor) for name, tensor in trial.items())
    scale = sum(float(fixed[name].norm() * moved[name].norm()) for name in trial)
    if after - before <= 1e-12 * scale:
        return None
    moved.update(trial)
    return step


def _inner(x: Tensor, y: Tensor) -> float:
    return float(torch.sum(x * y))
