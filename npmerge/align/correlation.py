"""Permute: match channels by the correlation of their activations."""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Sequence

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from npmerge.align.alignment import Alignment
from npmerge.align.moments import Covariances, covariances
from npmerge.data.streams import Data
from npmerge.methods import method
from npmerge.symmetry import Group

ROUNDS = 3
"""How often groups that share an activation take turns at most."""


@method(
    kind="align", label="Permute", short="P", family="alignment", needs=("data",),
    reference="li2015", place=2,
    use="The first choice: one pass over unlabelled data, exact assignment in every layer.",
)  # fmt: skip
def permute(
    a: nn.Module,
    b: nn.Module,
    data: Data,
    *,
    groups: Sequence[Group] | None = None,
    statistics: Covariances | None = None,
) -> Alignment:
    """Permute B's channels so that their activations correlate best with A's.

    A group whose activation also holds channels of other groups (a head's dimensions, in all heads) is measured again
    once those are aligned.

    Args:
        a: Model A; its device is used.
        b: Model B, of the same architecture.
        data: Re-iterable of batches (tuples of inputs and labels, or dictionaries); one pass is made, and more for
            groups that share an activation.
        groups: The symmetry groups, if already known.
        statistics: What :func:`npmerge.align.moments.covariances` has measured, if that is known already.

    Returns:
        A permutation per group, which maximises the sum of Pearson correlations over all samples and positions. A
        channel that is constant on the data correlates with nothing.

    Raises:
        ValueError: If the models differ in architecture or shape, the data is empty, or activations are not finite.
        SymmetryError: If the model's symmetry groups cannot be found.

    Source:
        The paper's "Permute"; Li et al. 2015, "Convergent Learning"; Jordan et al. 2023, "REPAIR".
    """
    if statistics is None:
        statistics = covariances(a, b, data, groups=groups, variances_only=True)
    found = _matched(statistics)
    turns = _turns(statistics.groups)
    if not turns:
        return found
    still = Alignment.from_permutations(found.groups, [torch.arange(g.size) for g in found.groups])
    mixed = {number for turn in turns for number in turn}
    found = _with(found, still, mixed)
    for _ in range(ROUNDS if len(turns) > 1 else 1):
        before = found
        for turn in turns:
            groups = [found.groups[number] for number in turn]
            again = covariances(a, found.apply(b), data, groups=groups, variances_only=True)
            step = dict(zip(turn, _matched(again).maps, strict=True))
            maps = [step.get(number, mapping) for number, mapping in enumerate(still.maps)]
            found = Alignment.from_permutations(found.groups, maps).compose(found)
        if all(map(torch.equal, before.maps, found.maps)):
            break
    return found


def _matched(statistics: Covariances) -> Alignment:
    pairs = zip(statistics.groups, statistics.correlations(), strict=True)
    return Alignment.from_permutations(
        statistics.groups, [assignment(correlation, group) for group, correlation in pairs]
    )


def _turns(groups: Sequence[Group]) -> list[list[int]]:
    """The groups that share an activation with others, by number; those of one activation take turns."""
    turns: list[list[int]] = []
    seen: Counter[tuple[str, str, int]] = Counter()
    for number, group in enumerate(groups):
        if group.tap is not None and group.tap.mixed:
            where = group.tap.path, group.tap.operation, group.tap.occurrence
            if seen[where] == len(turns):
                turns.append([])
            turns[seen[where]].append(number)
            seen[where] += 1
    return turns


def _with(found: Alignment, other: Alignment, numbers: Container[int]) -> Alignment:
    """An alignment that has some groups' maps from another one."""
    pairs = enumerate(zip(found.maps, other.maps, strict=True))
    maps = [other_map if number in numbers else mine for number, (mine, other_map) in pairs]
    return Alignment.from_permutations(found.groups, maps)


def assignment(gain: Tensor, group: Group) -> Tensor:
    """Solve the linear assignment problem of one group.

    Args:
        gain: (size, size), what is gained where A's channel (row) meets B's (column).
        group: The group, to be named in an error.

    Returns:
        The permutation with the largest total gain, int64 (size,): B's channel for each of A's.

    Raises:
        ValueError: If a gain is not finite.
    """
    if not gain.sum().isfinite():
        raise ValueError(
            f"group {group.name!r} has values that are not finite: check both models' parameters and the data"
        )
    _, columns = linear_sum_assignment(gain.cpu().numpy(), maximize=True)
    return torch.from_numpy(columns).long()
