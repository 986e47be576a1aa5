"""Uniform and greedy soups: means, who joins them, and what never gets worse."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import pytest
import torch
from tiny import Snapshot, assert_same_state, loader, marked, net, same_parameters
from torch import Tensor, nn

import npmerge as npm
from npmerge.aggregate import mean
from npmerge.aggregate.uniform_and_greedy import greedy_soup, uniform_soup
from npmerge.correct import reset_batchnorm
from npmerge.evaluate import score


def test_a_soup_is_the_weighted_mean_of_parameters_and_of_statistics() -> None:
    models = [net(seed).double() for seed in range(3)]
    soup = uniform_soup(models, weights=[1, 2, 5])
    for name, value in soup.state_dict().items():
        a, b, c = (model.state_dict()[name] for model in models)
        expected = (a + 2 * b + 5 * c) / 8 if value.is_floating_point() else a
        assert torch.allclose(value, expected, rtol=1e-12, atol=1e-15), name


def test_of_two_it_is_the_mean_and_of_equal_models_the_model() -> None:
    a, b = net(0), net(1)
    soup = uniform_soup([a, b])
    for mine, expected in zip(soup.parameters(), mean(a, b).parameters(), strict=True):
        assert torch.allclose(mine, expected, rtol=1e-6)
    assert_same_state(uniform_soup([a, a, a]).state_dict(), a.state_dict())


def test_models_are_not_changed_and_shared_parameters_stay_shared() -> None:
    a, b = marked(net(0)), marked(net(1))
    for model in (a, b):
        model[3].weight = nn.Parameter(model[0].weight[:, :1].repeat(1, 6, 1, 1))
        model[3].bias = model[1].bias
    before = [Snapshot.of(model) for model in (a, b)]
    soup = uniform_soup([a, b])
    greedy_soup([a, b], loader())
    for model, snapshot in zip((a, b), before, strict=True):
        snapshot.assert_still(model)
    assert soup[3].bias is soup[1].bias
    assert [p.requires_grad for p in soup.parameters()] == [p.requires_grad for p in a.parameters()]


@pytest.mark.parametrize("weights", [[1.0], [1.0, float("nan")], [1.0, -1.0]])
def test_weights_that_do_not_fit_are_refused(weights: Sequence[float]) -> None:
    with pytest.raises(ValueError, match="one finite number for each of the 2 models"):
        uniform_soup([net(0), net(1)], weights=weights)


def test_who_makes_the_mean_better_joins_and_who_only_keeps_it_does_not() -> None:
    data = [(torch.tensor([[1.0], [2.0], [-1.0], [-2.0]]), torch.tensor([1, 1, 0, 0]))]

    def threshold(at: float) -> nn.Linear:
        """Class 1 from a point on."""
        model = nn.Linear(1, 2)
        with torch.no_grad():
            model.weight.copy_(torch.tensor([[0.0], [1.0]]))
            model.bias.copy_(torch.tensor([0.0, -at]))
        return model

    models = [threshold(-5), threshold(1.5), threshold(-1.7), threshold(0.3)]
    found = greedy_soup(models[:3], data)
    assert found.details["alone"] == [50, 75, 75]
    assert found.details["chosen"] == [1, 2]
    assert found.details["accuracy"] == [75, 100]
    assert same_parameters(found.model, uniform_soup([models[1], models[2]]))
    assert greedy_soup(models, data).details["chosen"] == [3]  # nothing is better than all


def test_a_greedy_soup_is_never_less_accurate_than_its_best_member_where_it_was_chosen() -> None:
    models, data = [net(seed) for seed in range(4)], loader(64)
    found = greedy_soup(models, data)
    alone = [score(reset_batchnorm(copy.deepcopy(model), data), data).top1 for model in models]
    soup = score(reset_batchnorm(copy.deepcopy(found.model), data), data).top1
    assert found.details["alone"] == alone
    assert soup == found.details["accuracy"][-1] >= max(alone)
    worst = [net(seed) for seed in range(2)]
    worst[1][-1].bias.data[0] = 1e4  # always the same answer
    assert greedy_soup(worst, batch_of(worst[0], data)).details["chosen"] == [0]


def batch_of(model: nn.Module, data: list[tuple[Tensor, Tensor]]) -> list[tuple[Tensor, Tensor]]:
    """The data with what a model answers as its labels."""
    model = reset_batchnorm(copy.deepcopy(model), data).eval()
    return [(x, model(x).argmax(1).detach()) for x, _ in data]


@pytest.mark.parametrize("name", ["uniform_soup", "greedy_soup"])
def test_they_are_methods_like_any_other_of_any_number(name: str) -> None:
    models = [net(seed) for seed in range(3)]
    for count in (2, 3):
        merged = npm.merge(models[:count], loader(), aggregate=name)
        assert torch.isfinite(merged.model(torch.zeros(1, 3, 8, 8))).all()


def test_no_models_and_no_data_are_refused() -> None:
    with pytest.raises(ValueError, match="no models"):
        uniform_soup([])
    with pytest.raises(ValueError, match="the data is empty"):
        greedy_soup([net(0, norm=False), net(1, norm=False)], [])
