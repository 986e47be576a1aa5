"""RegMean and SLERP: held against least squares by hand and against the geometry of the sphere."""

from __future__ import annotations

import copy

import pytest
import torch
from tiny import loader, net, same_parameters
from torch import nn

import npmerge as npm
from npmerge.aggregate import mean, regmean, slerp


def linear(seed: int, *, bias: bool = True) -> nn.Linear:
    torch.manual_seed(seed)
    return nn.Linear(5, 3, bias=bias).double()


def test_one_linear_layer_is_the_least_squares_of_both_models_answers() -> None:
    a, b = linear(0), linear(1)
    torch.manual_seed(2)
    x = torch.randn(40, 5, dtype=torch.float64)
    x[:, 1] = x[:, 0] + 0.1 * x[:, 1]  # correlated
    merged = regmean(a, b, [(x, torch.zeros(40, dtype=torch.long))], shrink=1)
    rows = torch.cat([x, torch.ones(40, 1, dtype=torch.float64)], 1)
    answers = torch.cat([a(x), b(x)]).detach()
    expected = torch.linalg.lstsq(torch.cat([rows, rows]), answers).solution
    assert torch.allclose(merged.weight, expected[:5].T, atol=1e-4)
    assert torch.allclose(merged.bias, expected[5], atol=1e-4)


class Fed(nn.Module):
    """Its second layer meets other inputs in each model."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.first = nn.Conv2d(2, 4, 3, stride=2, padding=1).double()
        self.second = nn.Linear(4 * 9, 3, bias=False).double()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.second(self.first(x).relu().flatten(1))
        return out


def test_each_layer_minimises_the_squares_over_both_models_own_inputs() -> None:
    a, b = Fed(0), Fed(1)
    torch.manual_seed(2)
    x = torch.randn(60, 2, 6, 6, dtype=torch.float64)
    merged = regmean(a, b, [(x, torch.zeros(60, dtype=torch.long))], shrink=1)
    for place in ("first", "second"):
        layer = copy.deepcopy(getattr(merged, place))
        loss = torch.zeros((), dtype=torch.float64)
        for model in (a, b):
            inputs = x if place == "first" else model.first(x).relu().flatten(1)
            loss = loss + (layer(inputs) - getattr(model, place)(inputs)).square().mean()
        loss.backward()
        assert all(p.grad.abs().max() < 1e-4 for p in layer.parameters()), place
        plain = getattr(mean(a, b), place)
        loss = loss.detach()
        other = sum(
            (plain(i) - getattr(m, place)(i)).square().mean()
            for m in (a, b)
            for i in [x if place == "first" else m.first(x).relu().flatten(1)]
        )
        assert loss < other + 1e-12 if place == "first" else loss < 0.95 * other


def test_equal_models_and_equal_inputs_give_themselves_and_the_mean() -> None:
    a = net(0)
    assert same_parameters(regmean(a, a, loader()), a)
    first, second = linear(0, bias=False), linear(1, bias=False)
    torch.manual_seed(3)
    x = torch.randn(50, 5, dtype=torch.float64)
    merged = regmean(first, second, [(x, torch.zeros(50, dtype=torch.long))], shrink=0.9)
    assert torch.allclose(merged.weight, (first.weight + second.weight) / 2, atol=1e-5)


def test_without_other_entries_each_input_channel_is_weighed_by_its_size() -> None:
    class Scaled(nn.Module):
        def __init__(self, seed: int, scale: float) -> None:
            super().__init__()
            self.scale, self.layer = scale, linear(seed, bias=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = self.layer(self.scale * x)
            return out

    a, b = Scaled(0, 1.0), Scaled(1, 3.0)
    torch.manual_seed(2)
    x = torch.randn(50, 5, dtype=torch.float64)
    merged = regmean(a, b, [(x, torch.zeros(50, dtype=torch.long))], shrink=0)
    assert torch.allclose(
        merged.layer.weight, (a.layer.weight + 9 * b.layer.weight) / 10, atol=1e-4
    )


def test_shared_weights_and_grouped_convolutions_are_averaged() -> None:
    class Odd(nn.Module):
        def __init__(self, seed: int) -> None:
            super().__init__()
            torch.manual_seed(seed)
            self.conv = nn.Conv2d(4, 4, 3, groups=2)
            self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 4)
            self.two.weight = self.one.weight

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = self.two(self.one(self.conv(x).mean((2, 3))))
            return out

    a, b = Odd(0), Odd(1)
    data = [(torch.randn(8, 4, 5, 5), torch.zeros(8, dtype=torch.long))]
    assert same_parameters(regmean(a, b, data), mean(a, b))
    with pytest.raises(ValueError, match="examples is 0"):
        regmean(a, b, data, examples=0)


def test_an_arc_keeps_the_norm_and_ends_at_the_models() -> None:
    a, b = net(0), net(1)
    for own, other in zip(a.parameters(), b.parameters(), strict=True):
        other.data.mul_(own.data.norm() / other.data.norm().clamp(min=1e-12))
    merged = slerp(a, b)
    for m, own, plain in zip(
        merged.parameters(), a.parameters(), mean(a, b).parameters(), strict=True
    ):
        if m.ndim > 1:
            assert float(m.detach().norm()) == pytest.approx(float(own.detach().norm()), rel=1e-4)
            assert plain.norm() < 0.95 * own.norm()
    assert same_parameters(slerp(a, b, alpha=1.0), a)
    assert same_parameters(slerp(a, b, alpha=0.0), b)


def test_where_there_is_no_arc_it_is_the_mean() -> None:
    a = net(0)
    assert same_parameters(slerp(a, a), a)
    b = copy.deepcopy(a)
    for parameter in b.parameters():
        parameter.data.zero_()
    assert same_parameters(slerp(a, b), mean(a, b))


@pytest.mark.parametrize("name", ["regmean", "slerp"])
def test_they_are_methods_like_any_other(name: str) -> None:
    merged = npm.merge([net(0), net(1)], loader(), aggregate=name)
    assert torch.isfinite(merged.model(torch.zeros(1, 3, 8, 8))).all()
