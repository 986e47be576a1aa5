"""NP Merge from another point: the point is where it starts, and the parents' difference is where it can go."""

from __future__ import annotations

import pytest
import torch
from tiny import Snapshot, loader, net
from torch import nn

from npmerge.aggregate import fisher, mean, neuron_interpolation, np_merge, regmean
from npmerge.aggregate.started import (
    around,
    np_from_fisher,
    np_from_interpolation,
    np_from_regmean,
    np_from_repair,
)
from npmerge.correct import repair
from npmerge.zips import np_from_pleas, pleas

STARTS = {
    "repair": (np_from_repair, lambda a, b, data: repair(mean(a, b), data, parents=(a, b))),
    "regmean": (np_from_regmean, regmean),
    "interpolation": (np_from_interpolation, lambda a, b, data: neuron_interpolation([a, b], data)),
    "pleas": (np_from_pleas, lambda a, b, data: pleas([a, b], data).model),
    "fisher": (np_from_fisher, lambda a, b, data: fisher(a, b, data, seed=0).model),
}


def close(one: nn.Module, other: nn.Module) -> bool:
    pairs = zip(one.parameters(), other.parameters(), strict=True)
    return all(torch.allclose(x, y, atol=1e-6) for x, y in pairs)


def test_two_models_are_moved_as_they_are_to_each_other() -> None:
    a, b, point = net(0), net(1), net(2)
    first, second = around(point, a, b)
    assert close(mean(first, second), point)
    for x, y, one, other in zip(
        a.parameters(), b.parameters(), first.parameters(), second.parameters(), strict=True
    ):
        assert torch.allclose(x - y, one - other, atol=1e-6)


@pytest.mark.parametrize("name", STARTS)
def test_nothing_learned_is_the_point_and_learning_leaves_it(name: str) -> None:
    method, made = STARTS[name]
    a, b = net(0, norm=False), net(1, norm=False)
    before = [Snapshot.of(a), Snapshot.of(b)]
    point = made(a, b, loader())
    start = method(a, b, loader(), epochs=0)
    assert close(start.model, point)
    assert not close(start.model, mean(a, b))
    learned = method(a, b, loader(), epochs=8, lr=0.05)
    assert learned.history[-1] < learned.history[0]
    theirs = dict(b.named_parameters())
    middle = dict(point.named_parameters())
    for key, parameter in learned.model.named_parameters():
        moved = (learned.alpha[key] - 0.5) * (a.get_parameter(key) - theirs[key])
        assert torch.allclose(parameter, middle[key] + moved, atol=1e-5), key
    for snapshot, model in zip(before, (a, b), strict=True):
        snapshot.assert_still(model)


def test_from_the_mean_it_is_np_merge() -> None:
    a, b = net(0), net(1)
    ours = np_merge(*around(mean(a, b), a, b), loader(), epochs=2, lr=0.1)
    assert ours.history == pytest.approx(
        np_merge(a, b, loader(), epochs=2, lr=0.1).history, rel=1e-3
    )
