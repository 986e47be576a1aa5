"""PAPA: models that train on together, against models that train on alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from cut_off import assert_resumes
from tiny import (
    Snapshot,
    assert_same_state,
    images,
    loader,
    marked,
    net,
    same_parameters,
)
from torch import nn
from torch.utils.data import DataLoader

import npmerge as npm
from npmerge.aggregate.population import papa
from npmerge.data import Batches
from npmerge.data.batches import child_seed
from npmerge.training import Learning, fit

FINE = {"epochs": 2, "lr": 0.05, "learning": Learning(mixed_precision=False)}


def batches(seed: int = 0) -> Batches:
    return Batches(
        images(24), 8, mean=(0.5,) * 3, std=(0.3,) * 3, shuffle=True, flip=True, seed=seed
    )


def alone(model: nn.Module, data: Any) -> nn.Module:
    """What SGD makes of a model by itself."""
    sgd = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-4)
    fit(model, data, sgd, epochs=2, mixed_precision=False)
    return model


def test_without_a_pull_each_model_is_trained_by_itself_bit_for_bit_in_an_order_of_its_own() -> (
    None
):
    found = papa([net(s) for s in range(3)], batches(), pull=0.0, every=1, seed=5, **FINE)
    for number, member in enumerate(found.details["population"]):
        own = alone(net(number), batches(child_seed(5, number)))
        assert_same_state(member.state_dict(), own.state_dict())
    members = found.details["population"]
    for name, value in found.model.named_parameters():
        every = torch.stack([member.get_parameter(name) for member in members])
        assert torch.allclose(value, every.mean(0), atol=1e-7)


def test_a_list_gives_all_models_the_same_batches_and_a_loader_that_shuffles_does_not() -> None:
    data = loader(24)
    twins = papa([net(0), net(0)], data, pull=0.0, **FINE).details["population"]
    assert same_parameters(*twins)
    assert same_parameters(twins[0], alone(net(0), data))
    torch.manual_seed(0)
    shuffled = DataLoader([(x, y) for xs, ys in data for x, y in zip(xs, ys)], 8, shuffle=True)  # noqa: B905
    assert not same_parameters(
        *papa([net(0), net(0)], shuffled, pull=0.0, **FINE).details["population"]
    )


def test_a_full_pull_makes_all_models_their_mean() -> None:
    for ways in ({"pull": 1.0}, {"variant": "all"}):
        found = papa([net(s) for s in range(3)], loader(24), every=3, **FINE, **ways)
        first, second, third = found.details["population"]
        assert same_parameters(first, second)
        assert same_parameters(first, third)
        apart = papa([net(s) for s in range(3)], loader(24), every=4, **FINE, **ways)
        assert not same_parameters(*apart.details["population"][:2])  # two steps later


def test_one_push_by_hand_falls_with_the_learning_rate() -> None:
    """One step of two one-weight models whose loss is the weight itself: its gradient is 1."""

    class Weight(nn.Module):
        def __init__(self, value: float) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.tensor([value], dtype=torch.float64))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.w.expand(len(x), 1)

    data = [(torch.zeros(2, 1), torch.zeros(2))]
    learning = Learning(
        loss=lambda outputs, _: outputs.mean(),
        schedule=lambda _: 0.5,
        mixed_precision=False,
    )
    found = papa(
        [Weight(1.0), Weight(3.0)], data, epochs=1, lr=0.2, momentum=0.0, weight_decay=0.0,
        every=1, pull=0.4, learning=learning,
    )  # fmt: skip
    members = [model.w.item() for model in found.details["population"]]
    assert members == pytest.approx([0.9 + 0.2 * 1, 2.9 - 0.2 * 1])  # 0.4 * 0.5 of the way to 1.9
    assert found.model.w.item() == pytest.approx(1.9)


def test_pairs_share_a_mean_and_the_mean_of_all_stays() -> None:
    data, models = loader(8), [net(s) for s in range(3)]
    still = {"epochs": 1, "lr": 1e-12, "weight_decay": 0.0, "every": 1}
    found = papa(models, data, variant="pairs", **still)
    name = "0.weight"
    before = torch.stack([model.get_parameter(name) for model in models])
    after = torch.stack([model.get_parameter(name) for model in found.details["population"]])
    pairs = {(i, j): (before[i] + before[j]) / 2 for i, j in ((0, 1), (0, 2), (1, 2))}
    met = [[k for k, v in pairs.items() if torch.allclose(v, one, atol=1e-6)] for one in after]
    assert sorted(key for (key,) in met) == sorted(pairs)
    assert all(number in key for number, (key,) in enumerate(met))
    assert torch.allclose(after.mean(0), before.mean(0), atol=1e-6)


def test_one_model_is_trained_as_ever_and_what_is_given_stays() -> None:
    found = papa([net(0)], loader(24), **FINE)
    assert same_parameters(found.model, alone(net(0), loader(24)))
    given = [marked(net(s)) for s in range(2)]
    before = [Snapshot.of(model) for model in given]
    result = papa(given, loader(24), **FINE).model
    for snapshot, model in zip(before, given, strict=True):
        snapshot.assert_still(model)
    assert [m.training for m in result.modules()] == [m.training for m in given[0].modules()]
    frozen = (given[0][0].weight + given[1][0].weight) / 2
    assert torch.allclose(result[0].weight, frozen)


def test_training_that_was_cut_off_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    def run(learning: Learning) -> nn.Module:
        ways: dict[str, Any] = {"every": 2, "pull": 0.3, "lr": 0.05, "variant": "pairs"}
        return papa(
            [net(s) for s in range(3)], batches(), epochs=4, learning=learning, **ways
        ).model

    assert_resumes(run, tmp_path)


def test_it_merges_like_all_others_and_validates_the_mean() -> None:
    merged = npm.merge(
        [net(s) for s in range(3)], loader(24), aggregate="papa",
        aggregate_options={"epochs": 3, "lr": 0.02}, validation=loader(24, seed=1),
    )  # fmt: skip
    assert len(merged.history) == 3
    assert {"validation", "loss"} <= set(merged.epochs[0])
    again = npm.merge(
        [net(s) for s in range(3)], loader(24), aggregate="papa",
        aggregate_options={"epochs": 3, "lr": 0.02}, validation=loader(24, seed=1),
    )  # fmt: skip
    assert_same_state(merged.model.state_dict(), again.model.state_dict())
    worth = [row["validation"] for row in merged.epochs]
    found = npm.evaluate.score(merged.model, loader(24, seed=1)).loss
    assert found == pytest.approx(min(worth), rel=1e-4)


@pytest.mark.parametrize(
    ("ways", "message"),
    [
        ({"variant": "mama"}, "unknown variant 'mama': choose one of papa, all, pairs"),
        ({"every": 0}, "every is 0: give at least 1 step"),
        ({"pull": 1.5}, r"pull is 1\.5: give a share of the mean"),
    ],
)
def test_wrong_options_are_refused(ways: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        papa([net(0), net(1)], loader(), **ways)


def test_no_models_and_one_shot_data_are_refused() -> None:
    with pytest.raises(ValueError, match="no models: give at least one"):
        papa([], loader())
    with pytest.raises(ValueError, match="one-shot"):
        papa([net(0), net(1)], iter(loader()))
