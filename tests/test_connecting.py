"""Curves between two models: exact at their ends, straight before they learn, in the valley after."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from cut_off import assert_resumes
from landscape import ends, lowering, parabola, ticks
from tiny import Snapshot, assert_same_state, images, loader, marked, net
from torch import nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy

import npmerge as npm
from npmerge.aggregate import mean
from npmerge.data import Batches
from npmerge.paths.connecting import Curve, CurveSGD, bezier, curve, polychain
from npmerge.training import Learning

PLAIN = Learning(mixed_precision=False)
FORMS = pytest.mark.parametrize("form", ["bezier", "polychain"])


def test_what_points_weigh() -> None:
    assert bezier(3, 0.25) == pytest.approx([0.5625, 0.375, 0.0625])
    assert polychain(3, 0.25) == pytest.approx([0.5, 0.5, 0])
    assert polychain(4, 0.5) == pytest.approx([0, 0.5, 0.5, 0])
    for weigh in (bezier, polychain):
        for t in (0.0, 0.1, 0.9, 1.0):
            assert sum(weigh(5, t)) == pytest.approx(1)
        assert weigh(4, 0.0) == [1, 0, 0, 0]
        assert weigh(4, 1.0) == [0, 0, 0, 1]


@FORMS
def test_a_curve_that_has_not_learned_is_the_segment(form: str) -> None:
    a, b = net(0), net(1)
    found = curve(a, b, loader(), form=form, bends=2, epochs=0, learning=PLAIN)
    line = Curve(a, b, found.details["points"], form)
    for t in (0.2, 0.5, 0.9):
        for mine, value in zip(
            line.at(t).state_dict().values(), mean(a, b, alpha=1 - t).state_dict().values(),
            strict=True,
        ):  # fmt: skip
            assert torch.allclose(mine, value, atol=1e-6)


@FORMS
def test_its_ends_are_the_models_to_the_bit_and_these_stay(form: str) -> None:
    a, b = marked(net(0)), marked(net(1))
    before = Snapshot.of(a), Snapshot.of(b)
    found = curve(a, b, loader(), form=form, bends=2, epochs=3, lr=0.1, learning=PLAIN)
    for snapshot, model in zip(before, (a, b), strict=True):
        snapshot.assert_still(model)
    line = Curve(a, b, found.details["points"], form)
    for t, end in ((0.0, a), (1.0, b)):
        assert_same_state(line.at(t).state_dict(), end.state_dict())
    assert_same_state(line.at(0.5).state_dict(), found.model.state_dict())
    frozen, free = found.model[0].weight, found.model[3].weight
    assert torch.allclose(frozen, mean(a, b)[0].weight)  # as A says
    assert not torch.allclose(free, mean(a, b)[3].weight, atol=1e-5)


def test_in_a_curved_valley_it_finds_the_valley() -> None:
    """The valley is the Bezier curve whose bend is at (0, 2)."""
    a, b = ends()
    learning = lowering(schedule=lambda epoch: 1 - epoch / 2.1)
    ways: dict[str, Any] = {"epochs": 2, "lr": 0.01, "weight_decay": 0.0, "learning": learning}
    found = curve(a, b, ticks(200), **ways)
    (bend,) = found.details["points"]
    assert torch.allclose(bend["place"], torch.tensor([0.0, 2.0]).double(), atol=0.05)
    assert parabola(*mean(a, b).place).item() == 5
    assert parabola(*found.model.place).item() == pytest.approx(1, abs=0.03)
    chain = curve(a, b, ticks(200), form="polychain", bends=3, **ways)
    line = Curve(a, b, chain.details["points"], "polychain")
    heights = [parabola(*line.at(t / 20).place).item() for t in range(21)]
    assert max(heights) < 1.5


@FORMS
def test_a_step_is_one_of_autograd_through_the_curve(form: str) -> None:
    a, b = net(0).double().train(), net(1).double().train()
    data = loader(24, dtype=torch.float64)
    ways: dict[str, Any] = {"form": form, "bends": 2, "lr": 0.05, "momentum": 0.9, "seed": 3}
    model = net(0).double().train()
    optimizer = CurveSGD(model, b, weight_decay=0.01, **ways)
    weigh, generator = {"bezier": bezier, "polychain": polychain}[form], torch.Generator()
    generator.manual_seed(3)
    pairs = list(zip(a.parameters(), b.parameters(), strict=True))
    bends = [[torch.lerp(x, y, j / 3).detach().requires_grad_() for x, y in pairs] for j in (1, 2)]
    sgd = torch.optim.SGD([p for bend in bends for p in bend], lr=0.05, momentum=0.9)
    for inputs, labels in data:
        shares = weigh(4, float(torch.rand((), generator=generator)))
        weights = [
            shares[0] * x.detach() + shares[1] * p + shares[2] * q + shares[3] * y.detach()
            for (x, y), p, q in zip(pairs, *bends, strict=True)
        ]
        names = [name for name, _ in a.named_parameters()]
        outputs = functional_call(a, dict(zip(names, weights, strict=True)), (inputs,))
        decay = 0.005 * sum(w.square().sum() for w in weights)
        sgd.zero_grad()
        (cross_entropy(outputs, labels) + decay).backward()
        sgd.step()
        optimizer.zero_grad()
        cross_entropy(model(inputs), labels).backward()
        optimizer.step()
    for mine, theirs in zip(optimizer.points(), bends, strict=True):
        for x, y in zip(mine.values(), theirs, strict=True):
            assert torch.allclose(x, y, atol=1e-10)


def test_learning_that_was_cut_off_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    def run(learning: Learning) -> nn.Module:
        data = Batches(images(24), 8, mean=(0.5,) * 3, std=(0.3,) * 3, shuffle=True)
        return curve(net(0), net(1), data, bends=2, epochs=4, lr=0.1, learning=learning).model

    assert_resumes(run, tmp_path)


def test_it_merges_like_all_others_and_the_model_on_it_is_validated() -> None:
    held = loader(24, seed=1)
    merged = npm.merge(
        [net(0), net(1)], loader(24), aggregate="curve", validation=held,
        aggregate_options={"epochs": 4, "lr": 0.1, "at": 0.4},
    )  # fmt: skip
    worth = min(row["validation"] for row in merged.epochs)
    assert npm.evaluate.score(merged.model, held).loss == pytest.approx(worth, rel=1e-4)
    assert set(merged.details["points"][0]) == {name for name, _ in net(0).named_parameters()}


def test_after_learning_the_highest_loss_of_the_curve_is_lower_than_that_of_the_segment() -> None:
    data = loader(96, 16)
    a, b = net(0, norm=False), net(1, norm=False)
    for model in (a, b):
        adam = torch.optim.Adam(model.parameters(), lr=1e-2)
        npm.training.fit(model, data, adam, epochs=15, mixed_precision=False)
    points = curve(a, b, data, epochs=20, lr=0.02, learning=PLAIN).details["points"]
    line = Curve(a, b, points)

    def worst(on: Any) -> float:
        return max(npm.evaluate.score(on(t / 8), data).loss for t in range(9))

    assert worst(line.at) < worst(lambda t: mean(a, b, alpha=1 - t)) - 0.1


@pytest.mark.parametrize(
    ("ways", "message"),
    [
        ({"form": "circle"}, "unknown form 'circle': choose one of bezier, polychain"),
        ({"bends": 0}, "bends is 0: a curve has at least 1"),
        ({"at": 1.5}, r"at is 1\.5: a curve goes from 0, at A, to 1, at B"),
    ],
)
def test_wrong_options_are_refused(ways: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        curve(net(0), net(1), loader(), **ways)
    with pytest.raises(ValueError, match="t is -1: a curve goes from 0"):
        Curve(net(0), net(1), ()).at(-1)
