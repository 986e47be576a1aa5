"""Merging without labels: by the entropy of predictions, and by how little they change."""

from __future__ import annotations

import copy
import logging
from typing import Any

import pytest
import torch
from tiny import CLASSES, Snapshot, assert_same_state, loader, marked, net
from torch import Tensor, nn

import npmerge as npm
from npmerge.aggregate import Aggregated, SharedAlpha, mean
from npmerge.aggregate.entropy import _entropy, adamerging
from npmerge.aggregate.label_free import consistency_alpha, predictions
from npmerge.data.streams import first_examples
from npmerge.training import Learning

PLAIN = Learning(mixed_precision=False)


def relabelled(data: list[tuple[Tensor, Tensor]]) -> list[tuple[Tensor, Tensor]]:
    return [(x, (y + 1) % CLASSES) for x, y in data]


def entropy(model: nn.Module, data: list[tuple[Tensor, Tensor]]) -> float:
    outputs = torch.cat([model(x) for x, _ in data]).softmax(-1).detach()
    return float(torch.special.entr(outputs).sum(-1).mean())


@pytest.mark.parametrize("name", ["adamerging", "consistency_alpha"])
def test_labels_make_no_difference_and_models_are_not_changed(name: str) -> None:
    a, b = marked(net(0)), marked(net(1))
    before = [Snapshot.of(model) for model in (a, b)]
    function: Any = {"adamerging": adamerging, "consistency_alpha": consistency_alpha}[name]
    one, other = function(a, b, loader()), function(a, b, relabelled(loader()))
    assert_same_state(one.model.state_dict(), other.model.state_dict())
    for model, snapshot in zip((a, b), before, strict=True):
        snapshot.assert_still(model)


@pytest.mark.parametrize("level", ["model", "layer", "tensor", "parameter"])
def test_the_entropy_falls_and_alpha_stays_between_zero_and_one(level: str) -> None:
    a, b, data = net(0, norm=False), net(1, norm=False), loader()
    found = adamerging(a, b, data, level=level, lr=0.1, learning=PLAIN)
    assert found.history[-1] < found.history[0]
    assert found.alpha is not None
    assert all(0 < float(v.min()) <= float(v.max()) < 1 for v in found.alpha.values())
    assert entropy(found.model, data) < entropy(mean(a, b), data)


def test_the_first_step_goes_against_autograd_s_gradient_of_the_entropy() -> None:
    a, b, data = net(0, norm=False).double(), net(1, norm=False).double(), loader(8)
    data = [(x.double(), y) for x, y in data]
    pre = torch.zeros((), dtype=torch.float64, requires_grad=True)
    mixed = {
        name: torch.sigmoid(pre) * value + (1 - torch.sigmoid(pre)) * b.state_dict()[name]
        for name, value in a.state_dict().items()
    }
    outputs = torch.func.functional_call(a, mixed, data[0][0]).softmax(-1)
    torch.special.entr(outputs).sum(-1).mean().backward()

    model = copy.deepcopy(a)
    optimizer = SharedAlpha(model, b, lr=0.0, level="model", bounded=True)
    _entropy(model(data[0][0]), data[0]).backward()
    optimizer.step()
    (learned,) = optimizer._pre.values()
    assert torch.allclose(learned.grad, pre.grad, rtol=1e-10)


def test_it_is_told_how_often_each_class_is_predicted_and_warned_of_a_collapse(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The mean of two opposite classifiers knows nothing, and says the first class of all."""
    a, b = nn.Linear(1, 2, bias=False), nn.Linear(1, 2, bias=False)
    a.weight.data = torch.tensor([[5.0], [-5.0]])
    b.weight.data = -a.weight.data
    data = [(torch.tensor([[-1.0], [1.0], [2.0], [-2.0]]), torch.zeros(4, dtype=torch.long))]
    with caplog.at_level(logging.WARNING):
        calm = adamerging(a, a, data, epochs=1)
        assert (calm.details["classes"], calm.details["moved"]) == ([2, 2], 0)
        assert not caplog.text
        found = adamerging(a, b, data, epochs=0)
    assert (found.details["classes"], found.details["moved"]) == ([4, 0], 0.5)
    assert "50% of the predictions are of other classes than the models'" in caplog.text


class Threshold(nn.Module):
    """Class 1 where an input is above its parameter."""

    def __init__(self, at: float) -> None:
        super().__init__()
        self.at = nn.Parameter(torch.tensor(at))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([torch.zeros_like(x), x - self.at], 1)


def chosen(points: list[float], **options: Any) -> Aggregated:
    x = torch.tensor(points)[:, None]
    data = [(x, torch.zeros(len(x), dtype=torch.long))]
    return consistency_alpha(Threshold(1.0), Threshold(0.0), data, points=11, **options)


def test_alpha_is_where_the_fewest_answers_change() -> None:
    """With alpha the threshold moves over the inputs: they lie apart between 0.6 and 0.8 alone."""
    dense = [i / 50 + 0.003 for i in range(50) if not 0.55 < i / 50 < 0.75]
    found = chosen(dense, window=0)
    assert found.details["chosen"] == pytest.approx(0.6, abs=0.11)
    assert len(found.details["changed"]) == len(found.details["alphas"]) == 11
    place = found.details["alphas"].index(found.details["chosen"])
    assert found.details["changed"][place] == min(found.details["changed"][2:-2])
    assert found.model.at.item() == pytest.approx(found.details["chosen"], abs=1e-6)


def test_changes_are_counted_as_by_hand() -> None:
    found = chosen([0.05, 0.15, 0.17, 0.95], window=0, margin=0.0)
    # Between 0 and 0.1 one answer changes, between 0.1 and 0.2 two, between 0.9 and 1 one.
    assert found.details["changed"] == [0, 3, 2, 0, 0, 0, 0, 0, 0, 1, 0]
    assert found.details["chosen"] == 0.5  # the nearest to the middle of all without a change


def test_of_predictions_that_never_change_the_middle_is_taken() -> None:
    assert chosen([5.0, 6.0]).details["chosen"] == 0.5


def test_a_window_prefers_the_middle_of_a_calm_stretch() -> None:
    noisy = [0.22, 0.24, 0.26, 0.45, 0.51]  # nothing changes from 0.6 on
    assert chosen(noisy, window=0, margin=0.1).details["chosen"] == pytest.approx(0.7)
    assert chosen(noisy, window=1, margin=0.1).details["chosen"] == pytest.approx(0.8)


def test_a_grid_that_makes_no_sense_is_refused() -> None:
    for wrong in ({"window": -1}, {"margin": 0.6}, {"examples": 0}):
        with pytest.raises(ValueError, match="give at least 3 points"):
            chosen([0.0], **wrong)
    with pytest.raises(ValueError, match="leaves none of 4 points"):
        consistency_alpha(net(0), net(1), loader(), points=4, margin=0.5)
    with pytest.raises(ValueError, match="unknown level 'neuron'"):
        adamerging(net(0), net(1), loader(), level="neuron")


def test_the_first_examples_are_those_of_the_first_batches() -> None:
    held = list(first_examples(loader(24, 8), 13, "cpu"))
    assert [len(batch[0]) for batch in held] == [8, 5]
    assert torch.equal(held[1][0], loader(24, 8)[1][0][:5])
    assert predictions(net(0), loader(24, 8)).shape == (24,)


@pytest.mark.parametrize("name", ["adamerging", "consistency_alpha"])
def test_they_are_methods_like_any_other(name: str) -> None:
    merged = npm.merge([net(0), net(1)], loader(), aggregate=name)
    assert torch.isfinite(merged.model(torch.zeros(1, 3, 8, 8))).all()
