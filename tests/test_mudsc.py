"""MuDSC: what its similarity is, and where it is Permute and where it is weight matching."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from architectures import Attention, Residual, images, plain, random_alignment, randomised
from tiny import Snapshot, loader, marked, net
from torch import Tensor, nn

import npmerge as npm
from npmerge import align
from npmerge.align import Alignment, covariances
from npmerge.align.correlation import assignment
from npmerge.align.dual_space import mudsc
from npmerge.symmetry import Group, find_symmetry

IMAGES = [(images(16, seed=seed), torch.zeros(16, dtype=torch.long)) for seed in range(2)]
WORDS = [(torch.randn(8, 5, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(30)),
          torch.zeros(8, dtype=torch.long))]  # fmt: skip
Data = list[tuple[Tensor, Tensor]]
KINDS: list[tuple[Callable[[], nn.Module], Data]] = [
    (plain, IMAGES), (Residual, IMAGES), (Attention, WORDS),
]  # fmt: skip
kinds = pytest.mark.parametrize(("make", "data"), KINDS, ids=["plain", "residual", "attention"])


def pair(make: Callable[[], nn.Module]) -> tuple[nn.Module, nn.Module]:
    return randomised(make()), randomised(make(), 1)


def assert_same_maps(x: Alignment, y: Alignment) -> None:
    assert all(map(torch.equal, x.maps, y.maps))


def weights(model: nn.Module, group: Group) -> Tensor:
    """All weights of each channel."""
    state = dict(model.named_parameters())
    rows = [
        slot.view(state[slot.name].detach(), group.size).flatten(1)
        for slot in group.slots
        if slot.name in state
    ]
    return torch.cat(rows, 1)


def of_weights(a: nn.Module, b: nn.Module, group: Group) -> Tensor:
    both = torch.cat([weights(a, group), weights(b, group)])
    return torch.corrcoef(both)[: group.size, group.size :]


@kinds
def test_without_the_weights_it_is_permute(make: Callable[[], nn.Module], data: Data) -> None:
    a, b = pair(make)
    assert_same_maps(mudsc(a, b, data, phi=0), align.permute(a, b, data))


@kinds
@pytest.mark.parametrize("phi", [0.5, 1.0])
def test_at_the_end_no_group_alone_can_be_matched_better(
    make: Callable[[], nn.Module], data: Data, phi: float
) -> None:
    """By the correlations of the weights, computed anew, and of the activations that Permute has seen."""
    a, b = pair(make)
    groups = find_symmetry(a, data[0][0])
    found = mudsc(a, b, data, phi=phi)
    start = align.permute(a, b, data)
    seen = covariances(a, start.apply(b), data, groups=groups, variances_only=True).correlations()
    step = found.compose(start.inverse())
    moved = found.apply(b)
    for group, activations, order in zip(groups, seen, step.maps, strict=True):
        total = phi * of_weights(a, moved, group) + (1 - phi) * activations[:, order]
        best = total.gather(1, assignment(total, group)[:, None]).mean()
        assert total.diagonal().mean() == pytest.approx(float(best), abs=1e-5)
    assert not all(map(torch.equal, found.maps, start.maps)), "the weights have changed nothing"


def test_in_between_both_count() -> None:
    """One hidden layer: nothing else moves, so that one assignment is the answer."""
    torch.manual_seed(0)
    a, b = (nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 4)).double() for _ in range(2))
    data = [(torch.randn(40, 3, dtype=torch.float64), torch.zeros(40, dtype=torch.long))]
    (group,) = find_symmetry(a, data[0][0])
    (activations,) = covariances(a, b, data, variances_only=True).correlations()
    found = []
    for phi in (0, 0.3, 0.7, 1):
        expected = assignment(phi * of_weights(a, b, group) + (1 - phi) * activations, group)
        (own,) = mudsc(a, b, data, phi=phi).maps
        assert torch.equal(own, expected)
        found.append(tuple(own.tolist()))
    assert len(set(found)) >= 3


@kinds
def test_a_planted_permutation_is_found(make: Callable[[], nn.Module], data: Data) -> None:
    a = randomised(make())
    moved = random_alignment(find_symmetry(a, data[0][0])).apply(a)
    found = mudsc(a, moved, data)
    torch.testing.assert_close(found.apply(moved).state_dict(), a.state_dict())


def test_it_depends_on_its_seed_only_and_changes_nothing_that_is_given() -> None:
    a, b = marked(net(0)), marked(net(1))
    before = [Snapshot.of(model) for model in (a, b)]
    torch.manual_seed(0)
    first = mudsc(a, b, loader(), seed=3)
    torch.manual_seed(1)
    assert_same_maps(mudsc(a, b, loader(), seed=3), first)
    statistics = covariances(a, b, loader())
    assert_same_maps(mudsc(a, b, loader(), seed=3, statistics=statistics), first)
    for snapshot, model in zip(before, (a, b), strict=True):
        snapshot.assert_still(model)


def test_channels_that_are_dead_are_matched_by_the_rest() -> None:
    a, b = net(0), net(1)
    with torch.no_grad():
        for model in (a, b):
            model[8].weight[2:4], model[8].bias[2:4], model[10].weight[:, 2:4] = 0, 0, 0
    assert mudsc(a, b, loader()).is_permutation


def test_the_share_is_an_option_that_held_out_data_can_choose() -> None:
    a, b, data = net(0), net(1), loader(48)
    merged = npm.merge(
        [a, b], data[:4], align="mudsc", align_options={"phi": npm.Choice((0.1, 0.9))},
        aggregate="mean", held_out=npm.HeldOut(data[:4], data[4:]),
    )  # fmt: skip
    assert len(merged.chosen["phi"]["trials"]) == 2
    with pytest.raises(ValueError, match=r"phi is 1\.1: give the weights' share, from 0 to 1"):
        mudsc(a, b, data, phi=1.1)
