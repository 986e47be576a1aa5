"""Neuron interpolation: layers solved front to back, on the merged network's own activations."""

from __future__ import annotations

import copy

import pytest
import torch
from tiny import Snapshot, assert_same_state, loader, marked, net
from torch import Tensor, nn

import npmerge as npm
from npmerge.aggregate import mean, regmean
from npmerge.aggregate.interpolated_neurons import neuron_interpolation


def batch(x: Tensor) -> list[tuple[Tensor, Tensor]]:
    return [(x, torch.zeros(len(x), dtype=torch.long))]


def linear(seed: int) -> nn.Linear:
    torch.manual_seed(seed)
    return nn.Linear(5, 3).double()


class Deep(nn.Module):
    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.first = nn.Conv2d(2, 6, 3, stride=2, padding=1)
        self.relu = nn.ReLU(inplace=True)
        self.second = nn.Conv2d(6, 6, 3, bias=False)
        self.third = nn.Linear(6, 3)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.third(self.at_third(x))
        return out

    def at_third(self, x: Tensor) -> Tensor:
        out: Tensor = self.relu(self.second(self.at_second(x))).mean((2, 3))
        return out

    def at_second(self, x: Tensor) -> Tensor:
        out: Tensor = self.relu(self.first(x))
        return out


def test_one_layer_of_any_number_of_models_is_least_squares_and_regmean_s() -> None:
    models = [linear(seed) for seed in range(3)]
    torch.manual_seed(3)
    data = batch(torch.randn(40, 5, dtype=torch.float64))
    merged = neuron_interpolation(models, data, ridge=0.0)
    rows = torch.cat([data[0][0], torch.ones(40, 1, dtype=torch.float64)], 1)
    answers = sum(model(data[0][0]).detach() for model in models) / 3
    expected = torch.linalg.lstsq(rows, answers).solution
    assert torch.allclose(merged.weight, expected[:5].T)
    assert torch.allclose(merged.bias, expected[5])
    pair = neuron_interpolation(models[:2], data)
    assert torch.allclose(pair.weight, regmean(*models[:2], data, shrink=1).weight, atol=1e-5)


def test_each_layer_is_best_behind_those_that_are_solved_already() -> None:
    models = [Deep(0), Deep(1)]
    torch.manual_seed(2)
    x = torch.randn(60, 2, 6, 6, dtype=torch.float64)
    merged = neuron_interpolation(models, batch(x), ridge=0.0)
    for place, inputs in (
        ("first", lambda _, x: x), ("second", Deep.at_second), ("third", Deep.at_third),
    ):  # fmt: skip
        layer = copy.deepcopy(getattr(merged, place))
        targets = sum(getattr(m, place)(inputs(m, x)) for m in models) / 2
        loss = (layer(inputs(merged, x).detach()) - targets.detach()).square().sum()
        loss.backward()
        assert all(p.grad.abs().max() < 1e-8 for p in layer.parameters()), place


def test_it_is_nearer_to_the_models_answers_than_what_solves_each_layer_by_itself() -> None:
    models = [Deep(0), Deep(1)]
    torch.manual_seed(2)
    x = torch.randn(200, 2, 6, 6, dtype=torch.float64)
    answers = sum(model(x) for model in models) / 2

    def error(merged: nn.Module) -> float:
        return float((merged(x) - answers).detach().square().mean())

    whole = error(neuron_interpolation(models, batch(x)))
    assert whole < 0.7 * error(regmean(*models, batch(x), shrink=1))
    assert whole < 0.7 * error(mean(*models))


def test_equal_models_give_themselves_and_so_does_what_came_out() -> None:
    a = net(0, norm=False)
    assert_same_state(neuron_interpolation([a, a], loader()).state_dict(), a.state_dict())
    merged = neuron_interpolation([net(0), net(1)], loader())
    again = neuron_interpolation([merged, merged], loader())
    assert_same_state(again.state_dict(), merged.state_dict())


def test_statistics_of_batch_norm_are_those_of_the_merged_network() -> None:
    data = [(torch.cat([x for x, _ in loader()]), torch.cat([y for _, y in loader()]))]
    merged = neuron_interpolation([net(0), net(1)], data)
    for norm in (1, 4):
        inputs = merged[:norm].eval()(data[0][0]).detach()
        found = merged[norm].state_dict()
        assert torch.allclose(found["running_mean"], inputs.mean((0, 2, 3)), atol=1e-5)
        assert torch.allclose(found["running_var"], inputs.var((0, 2, 3)), rtol=1e-4)


def test_weights_that_inputs_say_nothing_about_stay_at_the_mean() -> None:
    a, b = linear(0), linear(1)
    x = torch.randn(40, 5, dtype=torch.float64)
    x[:, 2] = 0
    merged = neuron_interpolation([a, b], batch(x))
    assert torch.allclose(merged.weight[:, 2], mean(a, b).weight[:, 2])


def test_layers_that_share_weights_or_run_twice_are_averaged() -> None:
    class Odd(nn.Module):
        def __init__(self, seed: int) -> None:
            super().__init__()
            torch.manual_seed(seed)
            self.one, self.two, self.twice = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
            self.two.weight = self.one.weight

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.twice(self.twice(self.two(self.one(x)).relu()).relu())
            return out

    a, b = Odd(0), Odd(1)
    merged = neuron_interpolation([a, b], batch(torch.randn(20, 4)))
    assert merged.two.weight is merged.one.weight
    for name, value in mean(a, b).state_dict().items():
        assert torch.allclose(merged.state_dict()[name], value), name


def test_the_models_stay_as_they_are_and_no_hook_is_left() -> None:
    models = [marked(net(0)), marked(net(1))]
    before = [Snapshot.of(model) for model in models]
    merged = neuron_interpolation(models, loader())
    for model, snapshot in zip(models, before, strict=True):
        snapshot.assert_still(model)
    assert not any(m._forward_hooks for model in (*models, merged) for m in model.modules())


def test_wrong_options_and_models_are_refused() -> None:
    with pytest.raises(ValueError, match=r"ridge is -1\.0: it must not be negative"):
        neuron_interpolation([net(0), net(1)], loader(), ridge=-1.0)
    with pytest.raises(ValueError, match="examples is 0"):
        neuron_interpolation([net(0), net(1)], loader(), examples=0)
    with pytest.raises(ValueError, match="merge two models of one architecture"):
        neuron_interpolation([net(0), net(0, norm=False)], loader())


@pytest.mark.parametrize("count", [2, 3])
def test_it_is_a_method_like_any_other(count: int) -> None:
    merged = npm.merge([net(s) for s in range(count)], loader(), aggregate="neuron_interpolation")
    assert torch.isfinite(merged.model(torch.zeros(1, 3, 8, 8))).all()
