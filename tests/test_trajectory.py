"""SWA, EMA and FGE: averages along a trajectory, against the steps by hand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from cut_off import assert_resumes
from tiny import (
    Snapshot,
    images,
    loader,
    marked,
    net,
    same_parameters,
)
from torch import Tensor, nn

import npmerge as npm
from npmerge.aggregate import Aggregated, finetune
from npmerge.aggregate.trajectory import ema, fge, swa
from npmerge.aggregate.uniform_and_greedy import uniform_soup
from npmerge.data import Batches
from npmerge.training import Learning, fit

PLAIN = Learning(mixed_precision=False)
METHODS: dict[str, Any] = {"swa": swa, "ema": ema, "fge": fge}


def pair() -> list[nn.Module]:
    return [net(0).double(), net(1).double()]


def exact() -> list[Any]:
    return loader(24, dtype=torch.float64)


def passed(epochs: int, data: list[Any]) -> list[list[Tensor]]:
    """The weights of fine-tuning after every step, by a loop of its own."""
    model = uniform_soup(pair()).train()
    adam = torch.optim.Adam(model.parameters(), lr=1e-2, fused=True)
    steps = []
    for _ in range(epochs):
        for inputs, labels in data:
            adam.zero_grad()
            nn.functional.cross_entropy(model(inputs), labels).backward()
            adam.step()
            steps.append([p.detach().clone() for p in model.parameters()])
    return steps


def test_swa_is_the_mean_of_the_weights_after_the_last_epochs() -> None:
    data = exact()
    steps = passed(4, data)
    found = swa(pair(), data, epochs=4, start=0.5, learning=PLAIN).model
    for parameter, third, fourth in zip(found.parameters(), steps[8], steps[11], strict=True):
        assert torch.allclose(parameter, (third + fourth) / 2, atol=1e-9)


def test_swa_of_one_epoch_and_ema_that_forgets_at_once_are_fine_tuning() -> None:
    data = exact()
    expected = finetune(*pair(), data, epochs=3, learning=PLAIN).model
    assert same_parameters(swa(pair(), data, epochs=3, start=0.67, learning=PLAIN).model, expected)
    assert same_parameters(ema(pair(), data, epochs=3, decay=0.0, learning=PLAIN).model, expected)


def test_ema_follows_every_step_the_first_ones_faster() -> None:
    data = exact()
    average, *steps = passed(2, data)
    for kept, step in zip((2 / 11, 3 / 12, 0.3, 0.3, 0.3), steps, strict=True):
        average = [kept * old + (1 - kept) * new for old, new in zip(average, step, strict=True)]
    found = ema(pair(), data, epochs=2, decay=0.3, learning=PLAIN).model
    for parameter, value in zip(found.parameters(), average, strict=True):
        assert torch.allclose(parameter, value, atol=1e-9)


def test_swa_keeps_the_learning_rate_where_the_schedule_was_when_the_average_began() -> None:
    asked: list[float] = []

    def schedule(epoch: float) -> float:
        asked.append(epoch)
        return 1 / (1 + epoch)

    swa(pair(), exact(), epochs=4, learning=replace(PLAIN, schedule=schedule))
    assert asked[:12] == pytest.approx([*(n / 3 for n in range(1, 7)), *[2.0] * 6])


def test_the_rate_of_fge_is_a_triangle_and_snapshots_are_taken_at_its_minima() -> None:
    data, rates = exact(), []
    sgd_step = torch.optim.SGD.step

    def noted(self: torch.optim.SGD, *args: Any) -> Any:
        rates.append(self.param_groups[0]["lr"])
        return sgd_step(self, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim.SGD, "step", noted)
        found = fge(pair(), data, cycle=4, epochs=8, lr=0.1, lowest_lr=0.01, learning=PLAIN)
    at_epochs = [0.055, 0.01, 0.055, 0.1]
    assert rates[2::3] == pytest.approx(at_epochs * 2)
    snapshots = found.details["snapshots"]
    assert len(snapshots) == 2
    assert not same_parameters(*snapshots)

    early = uniform_soup(pair())
    sgd = torch.optim.SGD(early.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)
    fit(
        early, data, sgd, epochs=2, mixed_precision=False,
        schedule=lambda epoch: 1 - 0.9 * epoch / 2,
    )  # fmt: skip
    for mine, value in zip(snapshots[0].parameters(), early.parameters(), strict=True):
        assert torch.allclose(mine, value, atol=1e-9)
    for mine, first, second in zip(
        found.model.parameters(), *(s.parameters() for s in snapshots), strict=True
    ):
        assert torch.allclose(mine, (first + second) / 2, atol=1e-9)


@pytest.mark.parametrize("name", METHODS)
def test_what_is_given_stays_and_frozen_parameters_are_averaged(name: str) -> None:
    given = [marked(net(s)) for s in range(3)]
    before = [Snapshot.of(model) for model in given]
    result: Aggregated = METHODS[name](given, loader(24), epochs=2, learning=PLAIN)
    for snapshot, model in zip(before, given, strict=True):
        snapshot.assert_still(model)
    frozen = torch.stack([model[0].weight for model in given]).mean(0)
    assert torch.allclose(result.model[0].weight, frozen)
    assert not torch.allclose(result.model[3].weight, uniform_soup(given)[3].weight)
    assert [m.training for m in result.model.modules()] == [m.training for m in given[0].modules()]


@pytest.mark.parametrize("name", METHODS)
def test_learning_that_was_cut_off_goes_on_to_the_same_bits(name: str, tmp_path: Path) -> None:
    def run(learning: Learning) -> nn.Module:
        data = Batches(images(24), 8, mean=(0.5,) * 3, std=(0.3,) * 3, shuffle=True)
        ways = {"swa": {"start": 0.25}, "fge": {"cycle": 2, "lr": 0.02}}.get(name, {})
        model: nn.Module = METHODS[name](pair(), data, epochs=4, learning=learning, **ways).model
        return model

    assert_resumes(run, tmp_path)


@pytest.mark.parametrize("name", METHODS)
def test_it_is_the_average_that_is_validated_and_kept(name: str) -> None:
    held = loader(24, seed=1)
    merged = npm.merge(
        pair(), loader(24), aggregate=name, aggregate_options={"epochs": 4, "lr": 0.02},
        validation=held,
    )  # fmt: skip
    worth = min(row["validation"] for row in merged.epochs)
    assert npm.evaluate.score(merged.model, held).loss == pytest.approx(worth, rel=1e-4)


@pytest.mark.parametrize(
    ("name", "ways", "message"),
    [
        ("swa", {"start": 1.0}, r"start is 1\.0: give a share of the epochs"),
        ("ema", {"decay": 1.0}, r"decay is 1\.0: give a number"),
        ("fge", {"cycle": 3}, "cycle is 3: give an even number"),
        ("fge", {"epochs": 1}, "epochs is 1: the first snapshot is taken after 2"),
    ],
)
def test_wrong_options_are_refused(name: str, ways: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        METHODS[name](pair(), loader(), **ways)
