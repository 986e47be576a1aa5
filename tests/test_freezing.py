"""Frozen weights: unchanged to the bit, the same ones in every model, and nothing else is different."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from cut_off import assert_resumes
from tiny import Snapshot, assert_same_state, images, loader, marked, net, same_parameters
from torch import nn

from npmerge.aggregate import finetune
from npmerge.aggregate.freezing import Frozen, frozen_finetune
from npmerge.aggregate.uniform_and_greedy import uniform_soup
from npmerge.data import Batches
from npmerge.training import Learning, fit

PLAIN = Learning(mixed_precision=False)


def trained(model: nn.Module, **ways: Any) -> nn.Module:
    """By SGD with momentum and weight decay, both of which would move weights without a gradient."""
    sgd = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=0.1)
    optimizer = Frozen(sgd, model, **ways) if ways else sgd
    fit(model, loader(24), optimizer, epochs=2, mixed_precision=False)
    return model


def unchanged(before: nn.Module, after: nn.Module) -> list[torch.Tensor]:
    pairs = zip(before.parameters(), after.parameters(), strict=True)
    return [x == y for x, y in pairs]


def test_frozen_weights_stay_to_the_bit_and_all_others_move() -> None:
    still = torch.cat([one.flatten() for one in unchanged(net(0), trained(net(0), share=0.4))])
    assert 0.35 < still.double().mean() < 0.45
    free = torch.cat([one.flatten() for one in unchanged(net(0), trained(net(0)))])
    assert not free.any()


def test_nothing_frozen_is_ordinary_training_and_all_frozen_is_none() -> None:
    assert same_parameters(trained(net(0), share=0.0), trained(net(0)))
    assert same_parameters(trained(net(0), share=1.0), net(0))


def test_models_of_one_seed_freeze_the_same_weights_at_the_same_values() -> None:
    start = net(5)
    one, two = (trained(net(s), share=0.4, seed=7, start=start) for s in range(2))
    for x, y, z in zip(
        unchanged(start, one), unchanged(start, two), unchanged(one, two), strict=True
    ):
        assert torch.equal(x, y)
        assert torch.equal(x, z)
    other = trained(net(1), share=0.4, seed=8, start=start)
    assert not all(map(torch.equal, unchanged(start, one), unchanged(start, other)))


def test_fine_tuning_leaves_a_share_of_the_mean_and_with_none_is_as_ever() -> None:
    models = [net(0), net(1)]
    found = frozen_finetune(models, loader(24), epochs=2, learning=PLAIN).model
    still = torch.cat([one.flatten() for one in unchanged(uniform_soup(models), found)])
    assert 0.35 < still.double().mean() < 0.45
    free = frozen_finetune(models, loader(24), share=0.0, epochs=2, learning=PLAIN).model
    ordinary = finetune(*models, loader(24), epochs=2, learning=PLAIN).model
    assert_same_state(free.state_dict(), ordinary.state_dict())


def test_what_is_given_stays() -> None:
    given = [marked(net(s)) for s in range(3)]
    before = [Snapshot.of(model) for model in given]
    result = frozen_finetune(given, loader(24), epochs=1, learning=PLAIN).model
    for snapshot, model in zip(before, given, strict=True):
        snapshot.assert_still(model)
    assert torch.equal(result[0].weight, uniform_soup(given)[0].weight)  # not learned, as A says


def test_learning_that_was_cut_off_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    def run(learning: Learning) -> nn.Module:
        data = Batches(images(24), 8, mean=(0.5,) * 3, std=(0.3,) * 3, shuffle=True)
        return frozen_finetune([net(0), net(1)], data, epochs=4, learning=learning).model

    assert_resumes(run, tmp_path)


def test_a_share_out_of_range_is_refused() -> None:
    with pytest.raises(ValueError, match=r"share is 1\.2: give a share of the weights"):
        frozen_finetune([net(0), net(1)], loader(), share=1.2)
