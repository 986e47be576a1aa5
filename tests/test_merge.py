"""The front door: the steps of the README, one call for all, and models that are never changed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny import CLASSES, Snapshot, assert_same_state, loader, marked, net, same_parameters
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import npmerge as npm
from npmerge.evaluate import Ensemble, path, score

EXAMPLE = torch.zeros(1, 3, 8, 8)


def test_the_steps_of_the_front_door_work_together() -> None:
    a, b = net(0), net(1)
    pixels, labels = (torch.cat(part) for part in zip(*loader(), strict=True))
    data = DataLoader(TensorDataset(pixels, labels), batch_size=8)
    groups = npm.symmetry(a, EXAMPLE)
    assert [group.size for group in groups] == [6, 6, 5]
    alignment = npm.align.permute(a, b, data)
    assert alignment.groups == groups
    aligned = alignment.apply(b)
    assert torch.allclose(aligned.eval()(pixels), net(1).eval()(pixels), atol=1e-4)
    result = npm.aggregate.np_merge(a, aligned, data, epochs=2, lr=1e-2)
    npm.reset_batchnorm(result.model, data)
    assert set(npm.evaluate.accuracy(result.model, data, topk=(1, 2))) == {1, 2}


@pytest.mark.parametrize("align", ["identity", "permute", "weight_matching", "cca"])
@pytest.mark.parametrize("aggregate", ["mean", "np", "finetune"])
def test_one_call_is_align_aggregate_and_reset(align: str, aggregate: str) -> None:
    a, b, data = net(0), net(1), loader()
    merged = npm.merge(a, b, data, align=align, aggregate=aggregate, epochs=2, lr=0.05)
    aligned = npm.align.METHODS[align](a, b, data).apply(b)
    by_hand = {
        "mean": lambda: npm.aggregate.mean(a, aligned),
        "np": lambda: npm.aggregate.np_merge(a, aligned, data, epochs=2, lr=0.05).model,
        "finetune": lambda: npm.aggregate.finetune(a, aligned, data, epochs=2, lr=0.05).model,
    }[aggregate]()
    assert_same_state(merged.model.state_dict(), npm.reset_batchnorm(by_hand, data).state_dict())
    assert not any(module.training for module in merged.model.modules())
    assert (merged.alpha is not None) == (aggregate == "np")
    assert merged.alignment.is_permutation == (align != "cca")


@pytest.mark.parametrize("align", ["identity", "permute", "weight_matching"])
@pytest.mark.parametrize("aggregate", ["mean", "np"])
@pytest.mark.parametrize("norm", [True, False])
def test_merging_a_model_with_itself_gives_itself(align: str, aggregate: str, norm: bool) -> None:
    data = loader()
    a = npm.reset_batchnorm(net(norm=norm), data)
    merged = npm.merge(a, a, data, align=align, aggregate=aggregate, epochs=2, lr=0.1)
    assert_same_state(merged.model.state_dict(), a.state_dict())
    other = npm.merge(a, net(1, norm=norm), data, align=align, aggregate=aggregate, epochs=1)
    assert not same_parameters(other.model, a)


PUBLIC: dict[str, Callable[[nn.Module, nn.Module, Any], object]] = {
    "symmetry": lambda a, *_: npm.symmetry(a, EXAMPLE),
    "align.identity": lambda a, b, _: npm.align.identity(a, b, EXAMPLE),
    "align.permute": lambda a, b, data: npm.align.permute(a, b, data),
    "align.weight_matching": lambda a, b, _: npm.align.weight_matching(a, b, EXAMPLE),
    "align.cca": lambda a, b, data: npm.align.cca(a, b, data, ridge=0.1),
    "Alignment.apply": lambda a, b, _: npm.align.identity(a, b, EXAMPLE).apply(b),
    "mean": lambda a, b, _: npm.aggregate.mean(a, b),
    "np_merge": lambda a, b, data: npm.aggregate.np_merge(a, b, data, epochs=1, lr=0.1),
    "finetune": lambda a, b, data: npm.aggregate.finetune(a, b, data, epochs=1),
    "finetune_tuned": lambda a, b, data: npm.aggregate.finetune_tuned(
        a, b, data, kept=data, validate=lambda _: 1.0, lrs=(0.1,), trial_epochs=1, epochs=1
    ),
    "evaluate.accuracy": lambda a, b, data: [npm.evaluate.accuracy(m, data) for m in (a, b)],
    "evaluate.Ensemble": lambda a, b, data: score(Ensemble([a, b]), data),
    "evaluate.path": lambda a, b, data: path(a, b, data, points=3, reset_data=data),
    "merge": lambda a, b, data: npm.merge(a, b, data, epochs=1),
}


@pytest.mark.parametrize("name", PUBLIC)
def test_a_and_b_are_never_changed(name: str) -> None:
    """Not their parameters, buffers, modes, requires_grad or gradients."""
    a, b = marked(net(0)), marked(net(1))
    before = Snapshot.of(a), Snapshot.of(b)
    PUBLIC[name](a, b, loader())
    before[0].assert_still(a)
    before[1].assert_still(b)


@pytest.mark.parametrize("name", PUBLIC)
def test_results_share_no_memory_with_a_and_b(name: str) -> None:
    a, b = net(0), net(1)
    result = PUBLIC[name](a, b, loader())
    model = getattr(result, "model", result)
    if not isinstance(model, nn.Module):
        return
    mine = {tensor.data_ptr() for m in (a, b) for tensor in m.state_dict().values()}
    assert not mine & {tensor.data_ptr() for tensor in model.state_dict().values()}


BAD: dict[str, tuple[Callable[[], object], str]] = {
    "alignment": (
        lambda: npm.merge(net(0), net(1), loader(), align="magic"),
        "unknown alignment 'magic': choose one of identity, permute, weight_matching, cca",
    ),
    "aggregation": (
        lambda: npm.merge(net(0), net(1), loader(), aggregate="sum"),
        "unknown aggregation 'sum': choose one of mean, np, finetune",
    ),
    "shape": (
        lambda: npm.merge(net(0), net(1, width=7), loader()),
        r"has shape \(6, 3, 3, 3\) in the first model and \(7, 3, 3, 3\) in the second",
    ),
    "architecture": (lambda: npm.merge(net(0), net(1, norm=False), loader()), "one architecture"),
    "empty": (lambda: npm.merge(net(0), net(1), []), "the data is empty"),
    "one-shot": (lambda: npm.merge(net(0), net(1), iter(loader())), "one-shot list_iterator"),
    "labels": (
        lambda: npm.merge(net(0), net(1), [(torch.zeros(4, 3, 8, 8), torch.full((4,), CLASSES))]),
        "label 4 is out of range: the model has 4 outputs",
    ),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_input_is_one_line_that_names_it(kind: str) -> None:
    call, message = BAD[kind]
    with pytest.raises(ValueError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)


def test_progress_is_shown_only_when_asked_for(capfd: pytest.CaptureFixture[str]) -> None:
    npm.merge(net(0), net(1), loader(), epochs=1)
    assert capfd.readouterr() == ("", "")
    npm.merge(net(0), net(1), loader(), epochs=1, progress=True)
    assert "NP Merge" in capfd.readouterr().err


def test_everything_exported_is_there_and_documented() -> None:
    for name in npm.__all__:
        assert (getattr(npm, name).__doc__ or "").strip(), name
