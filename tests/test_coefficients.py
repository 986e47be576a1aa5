"""Coefficients that parameters share, and Fisher weights: held against autograd and plain loops."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import assert_same_state, loader, net, same_parameters
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import npmerge as npm
from npmerge.aggregate import (
    SharedAlpha,
    diagonal_fisher,
    fisher,
    fisher_share,
    learned_soup,
    mean,
    np_merge,
)

LEVELS = ("model", "layer", "tensor", "channel", "parameter")


def test_with_a_coefficient_for_each_parameter_it_is_np_merge() -> None:
    a, b = net(0), net(1)
    ours, theirs = (
        merge(a, b, loader(), epochs=3, lr=0.05, **more)
        for merge, more in ((learned_soup, {"level": "parameter"}), (np_merge, {}))
    )
    assert ours.history == pytest.approx(theirs.history, rel=1e-5)
    for name, value in theirs.model.state_dict().items():
        assert torch.allclose(ours.model.state_dict()[name], value, atol=1e-5), name
    for name, value in theirs.alpha.items():
        assert torch.allclose(ours.alpha[name], value, atol=1e-4), name


@pytest.mark.parametrize("level", LEVELS)
def test_what_shares_a_coefficient_has_one_and_they_are_counted(level: str) -> None:
    a, b = net(0), net(1)
    result = learned_soup(a, b, loader(), level=level, epochs=2, lr=0.1)
    alpha, named = result.alpha, dict(a.named_parameters())
    assert {n: x.shape for n, x in alpha.items()} == {n: p.shape for n, p in named.items()}
    sizes = {
        "model": {"": list(named)},
        "layer": {layer: [n for n in named if n.startswith(f"{layer}.")] for layer in {n.split(".")[0] for n in named}},
    }.get(level, {name: [name] for name in named})  # fmt: skip
    distinct = 0
    for names in sizes.values():
        together = torch.cat([alpha[name].flatten() for name in names])
        if level in ("model", "layer", "tensor"):
            assert len(together.unique()) == 1
        distinct += len(together.unique())
    if level == "channel":
        assert all(len(x[0].unique()) == 1 for x in alpha.values())
    counts = {
        "channel": sum(len(p) for p in named.values()),
        "parameter": sum(p.numel() for p in named.values()),
    }
    assert result.details["coefficients"] == counts.get(level, len(sizes))
    assert distinct > 0.9 * result.details["coefficients"]
    for (name, own), other in zip(named.items(), b.parameters(), strict=True):
        expected = alpha[name] * own + (1 - alpha[name]) * other
        assert torch.allclose(dict(result.model.named_parameters())[name], expected, atol=1e-5)


@pytest.mark.parametrize("bounded", [True, False])
@pytest.mark.parametrize("level", LEVELS)
def test_a_step_is_that_of_adam_by_automatic_differentiation(level: str, bounded: bool) -> None:
    a, b = (net(seed).double() for seed in (0, 1))
    model = net(0).double()
    optimizer = SharedAlpha(model, b, lr=0.1, level=level, bounded=bounded)
    ours = {key: torch.zeros_like(pre, requires_grad=True) for key, pre in optimizer._pre.items()}
    adam = torch.optim.Adam(ours.values(), lr=0.1)
    named, theirs = dict(a.named_parameters()), dict(b.named_parameters())
    batch = next((x.double(), y) for x, y in loader())
    for _ in range(3):
        weights = {}
        for name, p in named.items():
            pre = ours[optimizer._of[name]]
            alpha = torch.sigmoid(pre) if bounded else 0.5 + pre / 4
            weights[name] = alpha * p.detach() + (1 - alpha) * theirs[name].detach()
        adam.zero_grad()
        net_of_a = net(0).double().train()
        cross_entropy(torch.func.functional_call(net_of_a, weights, batch[0]), batch[1]).backward()
        adam.step()
        model.train()
        optimizer.zero_grad()
        cross_entropy(model(batch[0]), batch[1]).backward()
        optimizer.step()
    for key, pre in ours.items():
        assert torch.allclose(optimizer._pre[key], pre, atol=1e-9), key


def test_unbounded_coefficients_leave_the_segment_and_bounded_ones_never_do() -> None:
    a, b = net(0), net(1)
    for bounded in (True, False):
        result = learned_soup(a, b, loader(), level="parameter", bounded=bounded, epochs=8, lr=0.5)
        every = torch.cat([x.flatten() for x in result.alpha.values()])
        assert bool(((every >= 0) & (every <= 1)).all()) is bounded


def test_it_starts_at_the_mean_or_at_the_share_of_the_fisher_information() -> None:
    a, b = net(0), net(1)
    half = learned_soup(a, b, loader(), epochs=0)
    assert same_parameters(half.model, mean(a, b))
    begun = learned_soup(a, b, loader(), epochs=0, level="parameter", start="fisher")
    known = [diagonal_fisher(model, loader(), expectation="sampled") for model in (a, b)]
    share = fisher_share(*known)
    for name, value in begun.alpha.items():
        assert torch.allclose(value, share[name].clamp(0.02, 0.98), atol=1e-5)
    coarse = learned_soup(a, b, loader(), epochs=0, level="tensor", start="fisher")
    for name, value in coarse.alpha.items():
        assert float(value.flatten()[0]) == pytest.approx(
            float(share[name].mean().clamp(0.02, 0.98)), abs=1e-5
        )


def test_frozen_parameters_are_averaged() -> None:
    a, b = net(0), net(1)
    frozen, parameter = next(a.named_parameters())
    parameter.requires_grad = False
    for result in (learned_soup(a, b, loader(), epochs=1), fisher(a, b, loader())):
        own = result.alpha[frozen]
        assert torch.equal(own, torch.full_like(own, 0.5))
        assert torch.allclose(next(result.model.parameters()), next(mean(a, b).parameters()))


@pytest.mark.parametrize("method", ["learned_soup", "fisher"])
def test_they_are_methods_like_any_other(method: str) -> None:
    options = {"epochs": 1} if method == "learned_soup" else {"examples": 16}
    merged = npm.merge([net(0), net(1)], loader(), aggregate=method, aggregate_options=options)
    again = npm.merge([net(0), net(1)], loader(), aggregate=method, aggregate_options=options)
    assert_same_state(merged.model.state_dict(), again.model.state_dict())
    assert merged.alpha is not None


def test_unknown_words_are_refused() -> None:
    for options, word in (
        (
            {"level": "neuron"},
            "unknown level 'neuron': choose one of model, layer, tensor, channel, parameter",
        ),
        ({"start": "zero"}, "unknown start 'zero': choose one of half, fisher"),
    ):
        with pytest.raises(ValueError, match=word):
            learned_soup(net(0), net(1), loader(), **options)
    with pytest.raises(
        ValueError, match="unknown expectation 'all': choose one of exact, sampled, empirical"
    ):
        diagonal_fisher(net(0), loader(), expectation="all")
    with pytest.raises(ValueError, match="examples is 0"):
        diagonal_fisher(net(0), loader(), examples=0)


def by_hand(model: nn.Module, examples: list[Any], expectation: str) -> dict[str, Tensor]:
    """Example by example and label by label."""
    model.eval()
    total = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for image, label in examples:
        log_p = model(image[None]).log_softmax(1)[0]
        for c, value in enumerate(log_p):
            weight = value.exp().item() if expectation == "exact" else float(c == int(label))
            if weight:
                found = torch.autograd.grad(value, list(model.parameters()), retain_graph=True)
                for sums, gradient in zip(total.values(), found, strict=True):
                    sums += weight * gradient**2
    return {name: value / len(examples) for name, value in total.items()}


@pytest.mark.parametrize("expectation", ["exact", "empirical"])
def test_fisher_information_is_the_mean_of_squares_of_each_example_s_own_gradient(
    expectation: str,
) -> None:
    model = net(0)
    examples = [one for x, y in loader() for one in zip(x, y, strict=True)]
    expected = by_hand(model, examples, expectation)
    found = diagonal_fisher(model, loader(), expectation=expectation)
    for name, value in found.items():
        assert torch.allclose(value, expected[name], rtol=1e-3, atol=1e-7), name
    few = diagonal_fisher(model, loader(), expectation=expectation, examples=9)
    expected = by_hand(model, examples[:9], expectation)
    assert all(torch.allclose(v, expected[n], rtol=1e-3, atol=1e-7) for n, v in few.items())


def test_sampled_labels_give_the_exact_information_on_average() -> None:
    model, data = net(0), loader()
    exact = diagonal_fisher(model, data)
    draws = [diagonal_fisher(model, data, expectation="sampled", seed=s) for s in range(60)]
    for name, value in exact.items():
        average = torch.stack([draw[name] for draw in draws]).mean(0)
        assert float(average.sum()) == pytest.approx(float(value.sum()), rel=0.15)


def test_the_surer_model_weighs_more_and_equal_ones_give_themselves() -> None:
    a, b = net(0), net(1)
    same = fisher(a, a, loader())
    assert same_parameters(same.model, a)
    result = fisher(a, b, loader(), expectation="exact")
    alpha = fisher_share(diagonal_fisher(a, loader()), diagonal_fisher(b, loader()))
    for (name, own), other in zip(a.named_parameters(), b.parameters(), strict=True):
        expected = alpha[name] * own + (1 - alpha[name]) * other
        assert torch.allclose(dict(result.model.named_parameters())[name], expected, atol=1e-5)


def test_a_model_of_dictionaries_has_fisher_information() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"logits": self.net(x)}

    torch.manual_seed(0)
    model, x, y = Named(), torch.randn(5, 4), torch.arange(5) % 3
    named = diagonal_fisher(model, [{"x": x, "labels": y}], expectation="empirical")
    plain = diagonal_fisher(model.net, [(x, y)], expectation="empirical")
    for name, value in plain.items():
        assert torch.allclose(named[f"net.{name}"], value)
