"""The straight-through estimator: weight matching that is never made worse, and how it moves."""

from __future__ import annotations

import copy
import importlib
from typing import Any

import pytest
import torch
from architectures import Attention, images, plain, random_alignment, randomised
from tiny import Snapshot, loader, marked, net
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from npmerge.aggregate import mean
from npmerge.align import Alignment, weight_matching
from npmerge.align.judging import corrected_loss, fixed_batches
from npmerge.align.straight_through import ste
from npmerge.data.streams import Batch, example_of
from npmerge.symmetry import symmetry_on
from npmerge.training import Learning

module = importlib.import_module("npmerge.align.straight_through")


def loss_of(a: nn.Module, b: nn.Module, alignment: Alignment, count: int = 1024) -> float:
    return corrected_loss(mean(a, alignment.apply(b)), fixed_batches(loader(), count))


def same_maps(x: Alignment, y: Alignment) -> bool:
    return all(map(torch.equal, x.maps, y.maps))


@pytest.mark.parametrize("norm", [True, False])
def test_it_starts_at_weight_matching_and_is_never_worse_on_the_fixed_batches(norm: bool) -> None:
    a, b = net(0, norm=norm), net(1, norm=norm)
    matched = weight_matching(a, b, example_of(loader()))
    assert same_maps(ste(a, b, loader(), epochs=0), matched)
    found = [ste(a, b, loader(), epochs=4, match_every=1, lr=lr) for lr in (0.01, 1.0, 30.0)]
    losses = [loss_of(a, b, one) for one in found]
    assert all(one.is_permutation for one in found)
    assert max(losses) <= loss_of(a, b, matched)
    assert min(losses) < loss_of(a, b, matched)


def test_the_target_moves_against_half_the_gradient_at_the_average() -> None:
    a, b = net(0, norm=False).double(), net(1, norm=False).double()
    data = loader(dtype=torch.float64)
    groups = symmetry_on(a, example_of(data))
    target = module._Target(a, b, groups, data, None, lr=0.5, momentum=0.0, match_every=100, seed=0)
    average = mean(a, weight_matching(a, b, example_of(data)).apply(b))
    for x, y in data[:2]:  # the average stays until B is matched again
        average.zero_grad()
        cross_entropy(average(x), y).backward()
        for own, parameter in zip(a.parameters(), average.parameters(), strict=True):
            own.data = own.data.clone() - 0.5 * parameter.grad / 2
        target.zero_grad()
        cross_entropy(target.average(x), y).backward()
        target.step()
    for name, own in a.named_parameters():
        assert torch.allclose(target._target[name], own, rtol=0, atol=1e-12)


def test_a_planted_permutation_is_found_and_kept() -> None:
    a = randomised(plain(16))
    planted = random_alignment(symmetry_on(a, images()))
    data = [(images(8), torch.arange(8) % 4)]
    found = ste(a, planted.apply(a), data, epochs=2, match_every=1, lr=1e-3)
    assert same_maps(found, planted.inverse())


def test_heads_are_matched_too() -> None:
    a, b = randomised(Attention()), randomised(Attention(), 1)
    x = torch.randn(16, 5, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    data = [{"x": x, "labels": torch.arange(16) % 4}]
    matched, found = weight_matching(a, b, x), ste(a, b, data, epochs=20, match_every=1, lr=10.0)
    losses = [corrected_loss(mean(a, one.apply(b)), data) for one in (matched, found)]
    assert losses[1] < losses[0]


def test_models_stay_and_frozen_parameters_learn_all_the_same() -> None:
    a, b = marked(net(0)), marked(net(1))
    before = [Snapshot.of(a), Snapshot.of(b)]
    found = ste(a, b, loader(), epochs=2, match_every=1)
    before[0].assert_still(a)
    before[1].assert_still(b)
    still = (copy.deepcopy(one).requires_grad_(requires_grad=False) for one in (a, b))
    assert same_maps(ste(*still, loader(), epochs=2, match_every=1), found)


def test_it_depends_on_its_seed_only() -> None:
    a, b = (nn.Sequential(net(seed)[:9], nn.Dropout(0.9), net(seed)[9:]) for seed in (0, 1))
    torch.manual_seed(0)
    first = ste(a, b, loader(), epochs=2, match_every=1, lr=30.0, seed=3)
    assert torch.initial_seed() == 0
    torch.manual_seed(1)
    assert same_maps(ste(a, b, loader(), epochs=2, match_every=1, lr=30.0, seed=3), first)


def test_a_loss_of_one_s_own_is_what_is_learned_and_judged() -> None:
    a, b = net(0), net(1)

    def loss(outputs: Tensor, batch: Batch) -> Tensor:
        return outputs.square().mean()

    own = ste(a, b, loader(), epochs=4, match_every=1, learning=Learning(loss=loss))
    losses = [
        corrected_loss(mean(a, one.apply(b)), loader(), loss)
        for one in (weight_matching(a, b, example_of(loader())), own)
    ]
    assert losses[1] < losses[0]


def test_it_goes_on_from_a_saved_state_to_the_same_bits() -> None:
    a, b = net(0), net(1)
    groups = symmetry_on(a, example_of(loader()))

    def target() -> Any:
        return module._Target(
            a, b, groups, loader(), None, lr=1.0, momentum=0.9, match_every=2, seed=0
        )

    def learn(one: Any, passes: int) -> None:
        one.average.train()
        for x, y in passes * loader():
            one.zero_grad()
            cross_entropy(one.average(x), y).backward()
            one.step()

    whole, first, second = target(), target(), target()
    learn(whole, 4)
    learn(first, 1)
    saved = copy.deepcopy((first.state_dict(), first.average.state_dict()))
    learn(first, 1)  # the state that was saved is a copy
    second.load_state_dict(saved[0])
    second.average.load_state_dict(saved[1])
    learn(second, 3)
    assert same_maps(second.best, whole.best)
    for name, value in whole._target.items():
        assert torch.equal(second._target[name], value)


def test_the_fixed_batches_are_the_first_ones() -> None:
    assert len(fixed_batches(loader(24, 8), 9)) == 2
    assert len(fixed_batches(loader(24, 8), 1000)) == 3


def test_senseless_options_are_named() -> None:
    with pytest.raises(ValueError, match="match_every is 0"):
        ste(net(0), net(1), loader(), match_every=0)
    with pytest.raises(ValueError, match="examples is 0"):
        ste(net(0), net(1), loader(), examples=0)
