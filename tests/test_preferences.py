"""A family of merged models, one for each preference between the two."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny import Snapshot, assert_same_state, loader, marked, net, same_parameters
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import npmerge as npm
from npmerge.aggregate.preferences import PreferredAlpha, pareto
from npmerge.training import Learning, fit

PLAIN = Learning(mixed_precision=False)


def likeness(model: nn.Module, teacher: nn.Module, data: list[tuple[Tensor, Tensor]]) -> float:
    """The cross-entropy to a model's predictions."""
    x = torch.cat([x for x, _ in data])
    with torch.no_grad():
        return float(cross_entropy(model(x), teacher(x).softmax(-1)))


def test_the_more_a_model_is_preferred_the_more_the_merged_one_answers_like_it() -> None:
    a, b, data = net(0, norm=False), net(1, norm=False), loader()
    found = pareto(a, b, data, epochs=40, lr=0.1, learning=PLAIN)
    family = [found.details["family"](share) for share in (0.0, 0.25, 0.5, 0.75, 1.0)]
    to_a, to_b = ([likeness(model, one, data) for model in family] for one in (a, b))
    assert to_a == sorted(to_a, reverse=True)
    assert to_b == sorted(to_b)
    assert to_a[-1] < to_a[0] - 0.01
    assert same_parameters(found.model, family[2])


def test_a_step_goes_against_autograd_s_gradient() -> None:
    a, b = net(0, norm=False).double(), net(1, norm=False).double()
    x = loader(8)[0][0].double()
    optimizer = PreferredAlpha(net(0, norm=False).double(), b, lr=0.1, level="model", seed=0)
    p = optimizer.preference
    ends = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    alpha = torch.sigmoid(p * ends[0] + (1 - p) * ends[1])
    theirs = b.state_dict()
    mixed = {n: alpha * v + (1 - alpha) * theirs[n] for n, v in a.state_dict().items()}
    torch.func.functional_call(a, mixed, x).square().mean().backward()

    model = net(0, norm=False).double()
    optimizer = PreferredAlpha(model, b, lr=0.1, level="model", seed=0)
    model(x).square().mean().backward()
    optimizer.step()
    (learned,) = optimizer._ends
    assert torch.allclose(learned.grad, ends.grad, rtol=1e-10)
    assert torch.allclose(learned, -0.1 * ends.grad.sign(), rtol=1e-4)  # Adam's first step
    assert optimizer.preference != p


def test_before_the_first_step_every_preference_is_the_mean() -> None:
    a, b = net(0), net(1)
    family = pareto(a, b, loader(), epochs=0).details["family"]
    for share in (0.0, 1.0):
        expected = npm.aggregate.mean(a, b)
        for mine, other in zip(family(share).parameters(), expected.parameters(), strict=True):
            assert torch.allclose(mine, other, rtol=1e-5, atol=1e-7)


def test_labels_make_no_difference_and_models_are_not_changed() -> None:
    a, b = marked(net(0)), marked(net(1))
    before = [Snapshot.of(model) for model in (a, b)]
    one = pareto(a, b, loader(), epochs=2)
    other = pareto(a, b, [(x, torch.zeros_like(y)) for x, y in loader()], epochs=2)
    assert_same_state(one.model.state_dict(), other.model.state_dict())
    for model, snapshot in zip((a, b), before, strict=True):
        snapshot.assert_still(model)
    made = one.details["family"](0.9)
    assert [p.requires_grad for p in made.parameters()] == [p.requires_grad for p in a.parameters()]
    assert one.details["coefficients"] == 2 * 6 - 2  # a layer's weight and bias, twice; one frozen


def test_it_goes_on_where_it_was_cut_off(tmp_path: Path) -> None:
    b = net(1, norm=False)

    def optimizer(model: nn.Module) -> PreferredAlpha:
        return PreferredAlpha(model, b, lr=0.1, level="layer", seed=3)

    whole, first, second = (net(0, norm=False) for _ in range(3))
    fit(whole, loader(), expected := optimizer(whole), epochs=4, mixed_precision=False)
    fit(first, loader(), begun := optimizer(first), epochs=2, mixed_precision=False)
    torch.save(begun.state_dict(), tmp_path / "state.pt")
    resumed = optimizer(second)
    resumed.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    fit(second, loader(), resumed, epochs=2, mixed_precision=False)
    assert resumed.preference == expected.preference
    assert same_parameters(whole, second)


def test_what_is_validated_is_the_model_of_the_preference() -> None:
    a, b, seen = net(0), net(1), []

    def validate(model: nn.Module) -> float:
        seen.append([p.detach().clone() for p in model.parameters()])
        return -len(seen)

    learning = Learning(mixed_precision=False, validate=validate)
    found = pareto(a, b, loader(), preference=0.2, epochs=2, learning=learning)
    assert all(map(torch.equal, seen[-1], found.model.parameters()))
    alone = pareto(a, b, loader(), preference=0.2, epochs=2, learning=PLAIN)
    assert same_parameters(found.model, alone.model)


def test_a_preference_beyond_the_two_models_is_refused() -> None:
    with pytest.raises(ValueError, match=r"preference is 1\.5: give a number from 0"):
        pareto(net(0), net(1), loader(), preference=1.5)
    family = pareto(net(0), net(1), loader(), epochs=0).details["family"]
    with pytest.raises(ValueError, match="preference is -1"):
        family(-1)


def test_it_is_a_method_like_any_other() -> None:
    merged = npm.merge([net(0), net(1)], loader(), aggregate="pareto")
    assert torch.isfinite(merged.model(torch.zeros(1, 3, 8, 8))).all()
    assert merged.alpha is not None
