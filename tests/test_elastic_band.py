"""AutoNEB: on landscapes whose saddle is known, and by hand for a step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from cut_off import assert_resumes
from landscape import Place, ends, lowering, parabola, ticks
from tiny import Snapshot, images, loader, marked, net
from torch import Tensor, nn

import npmerge as npm
from npmerge.aggregate import mean
from npmerge.data import Batches
from npmerge.paths.connecting import Curve
from npmerge.paths.elastic_band import Band, auto_neb
from npmerge.training import Learning

PLAIN = Learning(mixed_precision=False)
VALLEY: dict[str, Any] = {"lr": 0.02, "weight_decay": 0.0, "learning": lowering()}


def heights(points: Any, a: nn.Module, b: nn.Module) -> list[float]:
    return [parabola(*Curve(a, b, points, "polychain").at(t / 50).place).item() for t in range(51)]


def test_the_highest_point_of_the_path_is_the_saddle_and_half_way_is_there() -> None:
    a, b = ends()
    found = auto_neb(a, b, ticks(40), epochs=12, **VALLEY)
    assert torch.allclose(found.model.place, torch.tensor([0.0, 1.0]).double(), atol=0.01)
    path = found.details["path"]
    assert max(loss for _, loss in path) == pytest.approx(1, abs=0.01)
    assert path[0] == (0.0, 0.0)
    assert path[-1] == (1.0, 0.0)
    assert max(heights(found.details["points"], a, b)) < 1.05
    assert parabola(*mean(a, b).place).item() == 5  # on the straight line


def test_a_saddle_that_is_not_half_way_is_found_too() -> None:
    def slanted(x: Tensor, y: Tensor) -> Tensor:
        """The valley's height is ``x^4 / 4 + x^3 / 6 - x^2 / 2 - x / 2``: minima at +-1, the saddle at -1/2."""
        return x**4 / 4 + x**3 / 6 - x**2 / 2 - x / 2 + 4 * (y - 1 + x**2) ** 2

    a, b = ends(slanted)
    found = auto_neb(a, b, ticks(40), epochs=20, **VALLEY)
    (saddle, height) = max(found.details["path"], key=lambda point: point[1])
    assert height == pytest.approx(1 / 64 - 1 / 48 - 1 / 8 + 1 / 4, abs=0.01)
    assert 0.2 < saddle < 0.4


def test_pivots_are_put_in_where_the_path_needs_them_and_only_there() -> None:
    def narrow(x: Tensor, y: Tensor) -> Tensor:
        """A hill at x = 0.4, on a straight path: highest between the pivots at 1/3 and the end."""
        return torch.exp(-(((x - 0.4) / 0.2) ** 2)) + y**2

    a, b = ends(narrow)
    found = auto_neb(a, b, ticks(30), pivots=2, insert=1, cycles=2, epochs=2, **VALLEY)
    xs = [point["place"][0].item() for point in found.details["points"]]
    assert xs == pytest.approx([-1 / 3, 1 / 3, 1 / 2], abs=1e-6)
    kept = auto_neb(a, b, ticks(30), pivots=2, insert=0, cycles=2, epochs=2, **VALLEY)
    assert len(kept.details["points"]) == 2


def test_a_step_takes_out_what_lies_along_the_path_and_spreads_the_pivots() -> None:
    """Two pivots of a straight band; the gradient (1, 1) has (0, 1) across it."""
    model = Place(0, 0, parabola)
    first, last = torch.tensor([[0.0, 0.0], [3.0, 0.0]]).double()
    band = Band(model, first, last, pivots=2, lr=0.5, momentum=0.0, weight_decay=0.0)
    assert model.place.tolist() == [1, 0]
    for loss, gradient in ((1.0, (1.0, -1.0)), (2.0, (1.0, 0.0))):
        band.note(torch.tensor(loss))
        model.place.grad = torch.tensor(gradient).double()
        band.step()
    one, two = (point["place"] for point in band.points())
    # (1, 0.5) and (2, 0), on a path that is 1.118 + 1.118 + 1 long: a third of it each
    part = (2 + 1.25**-0.5) / 3  # of the first segment; the second is as long
    assert one.tolist() == pytest.approx([part, part / 2])
    assert two.tolist() == pytest.approx([2 * part, 1 - part])
    assert model.place.tolist() == one.tolist()


def test_what_is_given_stays_and_what_is_frozen_is_the_mean() -> None:
    a, b = marked(net(0)), marked(net(1))
    before = Snapshot.of(a), Snapshot.of(b)
    found = auto_neb(a, b, loader(), epochs=2, cycles=2, lr=0.05, learning=PLAIN)
    for snapshot, model in zip(before, (a, b), strict=True):
        snapshot.assert_still(model)
    for point in found.details["points"]:
        assert torch.allclose(point["0.weight"], mean(a, b)[0].weight)
    assert torch.allclose(found.model[0].weight, mean(a, b)[0].weight)


def test_learning_that_was_cut_off_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    def run(learning: Learning) -> nn.Module:
        data = Batches(images(32), 8, mean=(0.5,) * 3, std=(0.3,) * 3, shuffle=True)
        return auto_neb(net(0), net(1), data, epochs=4, lr=0.1, learning=learning).model

    assert_resumes(run, tmp_path)


def test_it_merges_like_all_others_and_the_model_on_it_is_validated() -> None:
    held = loader(24, seed=1)
    merged = npm.merge(
        [net(0), net(1)], loader(24), aggregate="auto_neb", validation=held,
        aggregate_options={"epochs": 4, "lr": 0.05},
    )  # fmt: skip
    worth = min(row["validation"] for row in merged.epochs)
    assert npm.evaluate.score(merged.model, held).loss == pytest.approx(worth, rel=1e-4)


@pytest.mark.parametrize(
    ("ways", "message"),
    [
        ({"pivots": 0}, "pivots is 0: give at least 1"),
        ({"insert": -1}, "insert is -1: give at least 0"),
        ({"cycles": 0}, "cycles is 0: give at least 1"),
        ({"at": -0.1}, r"at is -0\.1: the path goes from 0, at A, to 1, at B"),
    ],
)
def test_wrong_options_are_refused(ways: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        auto_neb(net(0), net(1), loader(), **ways)


def test_a_model_and_itself_have_no_path() -> None:
    with pytest.raises(ValueError, match="the two models have the same parameters"):
        auto_neb(net(0), net(0), loader())
