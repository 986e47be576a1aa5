"""Surgery: features before the last layer, before and after."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from tiny import CLASSES, Snapshot, loader, marked, net
from torch import Tensor, nn

import npmerge as npm
from npmerge.aggregate import mean
from npmerge.correct import reset_batchnorm
from npmerge.correct.representation import Adapter, last_linear, surgery
from npmerge.symmetry import check_same_architecture


def gap(
    model: nn.Sequential, parents: list[nn.Sequential], data: list[tuple[Tensor, Tensor]]
) -> float:
    """How far what the last layer is given lies from the parents' mean."""
    x = torch.cat([x for x, _ in data])
    with torch.no_grad():
        wanted = torch.stack([parent.eval()[:-1](x) for parent in parents]).mean(0)
        last = model[-1]
        own = model.eval()[:-1](x)
        own = last[0](own) if isinstance(last, nn.Sequential) else own
    return float((own - wanted).abs().mean())


def test_features_come_nearer_to_the_parents_and_nothing_else_changes() -> None:
    a, b, data = net(0), net(1), loader(64)
    merged = mean(a, b)
    reset = reset_batchnorm(copy.deepcopy(merged), data)
    before = [Snapshot.of(parent) for parent in (a, b)]
    assert surgery(merged, data, parents=(a, b), rank=4, epochs=30, lr=0.01) is merged
    assert gap(merged, [a, b], data) < 0.7 * gap(reset, [a, b], data)
    for parent, snapshot in zip((a.train(), b.train()), before, strict=True):
        snapshot.assert_still(parent)
    state = merged.state_dict()
    for name, value in reset.state_dict().items():
        assert torch.equal(value, state[name.replace("10.", "10.1.")]), name
    assert (
        sum(v.numel() for v in state.values()) - sum(v.numel() for v in reset.state_dict().values())
        == 2 * 4 * 5
    )  # rank and features


def test_without_a_step_the_model_answers_as_before() -> None:
    a, b, data = net(0), net(1), loader()
    merged = mean(a, b)
    reset = reset_batchnorm(copy.deepcopy(merged), data).eval()
    surgery(merged, data, parents=(a, b), epochs=0).eval()
    assert torch.equal(merged(data[0][0]), reset(data[0][0]))


def test_labels_make_no_difference_and_a_seed_decides() -> None:
    a, b, data = net(0), net(1), loader()
    other = [(x, torch.zeros_like(y)) for x, y in data]
    one, two, three = (
        surgery(mean(a, b), batches, parents=(a, b), seed=seed)(data[0][0])
        for batches, seed in ((data, 0), (other, 0), (data, 1))
    )
    assert torch.equal(one, two)
    assert not torch.equal(one, three)


def test_the_model_can_be_copied_and_saved_and_modes_stay(tmp_path: Path) -> None:
    a, b, data = net(0).double(), net(1).double(), [(x.double(), y) for x, y in loader()]
    merged = surgery(marked(mean(a, b)), data, parents=(a, b), epochs=1)
    assert not merged[0].training
    assert all(module.training for module in merged[-1].modules())
    assert {p.dtype for p in merged.parameters()} == {torch.float64}
    torch.save(merged.state_dict(), tmp_path / "state.pt")
    again = copy.deepcopy(merged)
    again[-1][0].up.weight.data.zero_()
    again.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert torch.equal(again(data[0][0]), merged(data[0][0]))


def test_surgery_can_be_done_twice_and_such_models_can_be_merged() -> None:
    data, models = loader(), [net(seed) for seed in range(2)]
    for model in models:
        surgery(model, data, parents=(net(2), net(3)), epochs=1)
    check_same_architecture(*models)
    merged = npm.merge(models, data, aggregate="mean", correct="surgery").model
    assert isinstance(merged[-1][0], Adapter)
    assert isinstance(merged[-1][1][0], Adapter)
    assert torch.isfinite(merged(data[0][0])).all()


class Named(nn.Module):
    """Takes and gives dictionaries; its head is not the last module that is written down."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.head, self.first = nn.Linear(5, CLASSES), nn.Linear(3, 5)

    def forward(self, pixels: Tensor) -> Mapping[str, Tensor]:
        return {"logits": self.head(self.first(pixels.mean((2, 3))).relu())}


def test_the_last_layer_is_the_one_that_runs_last() -> None:
    a, b = Named(0), Named(1)
    data = [{"pixels": x, "labels": y} for x, y in loader()]
    assert last_linear(a, data) == "head"
    surgery(merged := mean(a, b), data, parents=(a, b), epochs=1)
    assert list(merged.state_dict())[:2] == ["head.0.down.weight", "head.0.up.weight"]
    assert merged(data[0]["pixels"])["logits"].shape == (8, CLASSES)


def test_it_is_a_correction_like_any_other_in_half_precision_too() -> None:
    models = [net(seed).bfloat16() for seed in range(3)]
    merged = npm.merge(models, loader(), aggregate="uniform_soup", correct="surgery").model
    assert {p.dtype for p in merged.parameters()} == {torch.bfloat16}


def test_what_is_missing_is_named() -> None:
    with pytest.raises(ValueError, match="0 parents"):
        surgery(net(0), loader())
    with pytest.raises(ValueError, match="rank 0"):
        surgery(net(0), loader(), parents=(net(1),), rank=0)
    flat = [(x.flatten(1), y) for x, y in loader()]
    with pytest.raises(ValueError, match="no linear layer runs inside the Linear"):
        surgery(nn.Linear(192, CLASSES), flat, parents=(nn.Linear(192, CLASSES),))
