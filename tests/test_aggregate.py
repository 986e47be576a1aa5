"""Agg: the mean, NP Merge and fine-tuning, held against plain implementations."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import CLASSES, Snapshot, assert_same_state, loader, marked, net, same_parameters
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from npmerge.aggregate import Aggregated, finetune, mean, np_merge
from npmerge.data import Batch, Batches
from npmerge.methods import of_kind
from npmerge.models import resnet20, vgg11
from npmerge.training import Learning, TrainingError

few = settings(max_examples=15, deadline=None)


# The mean


def test_half_of_each_is_the_mean() -> None:
    a, b = net(0).state_dict(), net(1).state_dict()
    for name, value in mean(net(0), net(1)).state_dict().items():
        if value.is_floating_point():
            assert torch.equal(value, (a[name] + b[name]) / 2)


@few
@given(st.floats(-1, 2))
def test_alpha_is_the_share_of_model_a_statistics_included(alpha: float) -> None:
    a, b = net(0).state_dict(), net(1).state_dict()
    for name, value in mean(net(0), net(1), alpha=alpha).state_dict().items():
        if value.is_floating_point():
            assert torch.allclose(value, alpha * a[name] + (1 - alpha) * b[name])


def test_the_ends_are_the_models_themselves() -> None:
    a, b = net(0), net(1)
    assert_same_state(mean(a, b, alpha=1).state_dict(), a.state_dict())
    assert_same_state(mean(a, b, alpha=0).state_dict(), b.state_dict())


def test_integer_buffers_are_a_s() -> None:
    a, b = net(0), net(1)
    a[1].num_batches_tracked.fill_(7)
    assert int(mean(a, b)[1].num_batches_tracked) == 7


def test_a_parameter_that_two_layers_share_is_averaged_once() -> None:
    def tied(seed: int) -> nn.Sequential:
        model = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 3))
        nn.init.normal_(model[0].weight, generator=torch.Generator().manual_seed(seed))
        model[2].weight = model[0].weight
        return model

    a, b = tied(0), tied(1)
    merged = mean(a, b)
    assert merged[0].weight is merged[2].weight
    assert torch.equal(merged[0].weight, (a[0].weight + b[0].weight) / 2)


# A model with itself


@pytest.mark.parametrize("norm", [True, False])
def test_merging_a_model_with_itself_gives_itself(norm: bool) -> None:
    a = net(norm=norm)
    assert_same_state(mean(a, a).state_dict(), a.state_dict())
    result = np_merge(a, a, loader(), epochs=2, lr=0.1)
    assert same_parameters(result.model, a)
    assert all(torch.equal(x, torch.full_like(x, 0.5)) for x in result.alpha.values())
    assert not same_parameters(finetune(a, a, loader(), epochs=1).model, a)  # is free to leave


# NP Merge: alpha


def test_alpha_starts_at_one_half_and_has_the_parameters_names_and_shapes() -> None:
    a, b = net(0), net(1)
    result = np_merge(a, b, loader(), epochs=0)
    assert {n: x.shape for n, x in result.alpha.items()} == {
        n: p.shape for n, p in a.named_parameters()
    }
    assert all(torch.equal(x, torch.full_like(x, 0.5)) for x in result.alpha.values())
    for merged, averaged in zip(result.model.parameters(), mean(a, b).parameters(), strict=True):
        assert torch.allclose(merged, averaged, atol=1e-7)


@pytest.mark.parametrize("lr", [1e-2, 1.0, 1e3, 1e6])
def test_alpha_lies_in_the_open_interval_whatever_the_learning_rate(lr: float) -> None:
    a, b = net(0), net(1)
    result = np_merge(a, b, loader(), epochs=3, lr=lr)
    for name, merged in result.model.named_parameters():
        alpha = result.alpha[name]
        assert float(alpha.min()) > 0
        assert float(alpha.max()) < 1
        low, high = torch.aminmax(
            torch.stack([a.get_parameter(name), b.get_parameter(name)]), dim=0
        )
        assert bool(((merged >= low - 1e-6) & (merged <= high + 1e-6)).all())
    if lr >= 1e3:
        assert max(float(x.max()) for x in result.alpha.values()) > 0.999  # it did go far


def test_the_merged_weights_are_what_alpha_says() -> None:
    a, b = net(0), net(1)
    result = np_merge(a, b, loader(), epochs=3, lr=0.1)
    assert any(float((x - 0.5).abs().max()) > 0.05 for x in result.alpha.values())
    for name, merged in result.model.named_parameters():
        alpha, x, y = result.alpha[name], a.get_parameter(name), b.get_parameter(name)
        assert torch.allclose(merged, alpha * x + (1 - alpha) * y, atol=1e-6)


def test_learning_alpha_lowers_the_loss() -> None:
    result = np_merge(net(0), net(1), loader(64), epochs=10, lr=0.1)
    assert len(result.history) == 10
    assert result.history[-1] < result.history[0]


def test_the_result_has_a_s_mode_and_requires_grad() -> None:
    a, b = net(0).eval(), net(1)
    a[0].weight.requires_grad_(requires_grad=False)
    result = np_merge(a, b, loader(), epochs=2, lr=0.1)
    assert not result.model.training
    assert [p.requires_grad for p in result.model.parameters()] == [
        p.requires_grad for p in a.parameters()
    ]


# NP Merge: data


def test_batches_a_data_loader_and_a_list_give_the_same_result() -> None:
    batches = Batches(tiny.images(40), 16, mean=(0.5,) * 3, std=(0.25,) * 3)
    listed = list(batches)
    pixels, labels = (torch.cat(part) for part in zip(*listed, strict=True))
    data_loader = DataLoader(TensorDataset(pixels, labels), batch_size=16)
    results = [
        np_merge(net(0), net(1), data, epochs=2, lr=0.1) for data in (batches, listed, data_loader)
    ]
    for other in results[1:]:
        assert_same_state(other.model.state_dict(), results[0].model.state_dict())
        assert_same_state(other.alpha, results[0].alpha)
        assert other.history == results[0].history


# Fine-tuning


def test_fine_tuning_is_adam_on_the_mean() -> None:
    a, b = net(0).eval(), net(1)
    result = finetune(a, b, loader(), epochs=2, lr=0.02)
    by_hand = mean(a, b).train()
    adam = torch.optim.Adam(by_hand.parameters(), lr=0.02, fused=True)
    for pixels, labels in loader() * 2:
        adam.zero_grad()
        images = pixels.contiguous(memory_format=torch.channels_last)
        cross_entropy(by_hand(images), labels).backward()
        adam.step()
    assert_same_state(result.model.state_dict(), by_hand.state_dict())
    assert (len(result.history), result.details, result.alpha) == (2, {}, None)
    assert not result.model.training


# What both have in common


LEARNING: dict[str, Callable[..., Aggregated]] = {"np_merge": np_merge, "finetune": finetune}


@pytest.mark.parametrize("name", LEARNING)
def test_frozen_parameters_are_averaged_and_the_others_learned(name: str) -> None:
    a, b = net(0), net(1)
    a[0].weight.requires_grad_(requires_grad=False)
    result = LEARNING[name](a, b, loader(), epochs=2, lr=0.1)
    averaged = mean(a, b)
    assert torch.equal(result.model[0].weight, averaged[0].weight)
    assert not torch.allclose(result.model[3].weight, averaged[3].weight, atol=1e-3)
    if result.alpha is not None:
        assert result.alpha.keys() == dict(a.named_parameters()).keys()
        assert torch.equal(result.alpha["0.weight"], torch.full_like(a[0].weight, 0.5))
    with pytest.raises(ValueError, match="every parameter of the model is frozen"):
        LEARNING[name](a.requires_grad_(requires_grad=False), b, loader())


@pytest.mark.parametrize("name", LEARNING)
def test_the_best_epoch_is_kept_and_learning_stops_when_patience_ends(name: str) -> None:
    """What validation says here: 5, 3, 4, 3, and then it would get better."""
    values, seen = [5.0, 3.0, 4.0, 3.0, 1.0], []

    def validate(model: nn.Module) -> float:
        seen.append({name: p.detach().clone() for name, p in model.named_parameters()})
        return values[len(seen) - 1]

    options = {"epochs": 5, "lr": 0.1}
    patient = Learning(validate=validate, patience=2)
    result = LEARNING[name](net(0), net(1), loader(), learning=patient, **options)
    assert len(result.history) == len(seen) == 4
    assert_same_state(dict(result.model.named_parameters()), seen[1])
    assert not torch.equal(seen[1]["0.weight"], seen[3]["0.weight"])
    if result.alpha is not None:  # it is alpha of that epoch too
        for key, alpha in result.alpha.items():
            x, y = net(0).get_parameter(key), net(1).get_parameter(key)
            assert torch.allclose(seen[1][key], alpha * x + (1 - alpha) * y, atol=1e-6), key
        assert len(result.details["spread"]) == 4
    seen.clear()
    endless = LEARNING[name](
        net(0), net(1), loader(), learning=Learning(validate=validate), **options
    )
    assert len(endless.history) == 5
    for wrong in ({"patience": 2}, {"patience": 0, "validate": validate}):
        with pytest.raises(
            ValueError, match=r"patience is .: give at least 1, and validation data"
        ):
            LEARNING[name](net(0), net(1), loader(), learning=Learning(**wrong))


@pytest.mark.parametrize("name", LEARNING)
def test_a_schedule_multiplies_the_learning_rate(name: str) -> None:
    held = Learning(schedule=lambda _: 0.0)
    still = LEARNING[name](net(0), net(1), loader(), epochs=2, lr=0.1, learning=held)
    assert same_parameters(still.model, mean(net(0), net(1)))


@pytest.mark.parametrize("name", LEARNING)
def test_labels_may_be_probabilities_or_one_for_each_position(name: str) -> None:
    pairs = loader()
    hard = LEARNING[name](net(0), net(1), pairs, epochs=2)
    soft = [(x, torch.nn.functional.one_hot(y, CLASSES).float()) for x, y in pairs]
    assert LEARNING[name](net(0), net(1), soft, epochs=2).history == pytest.approx(hard.history)


@pytest.mark.parametrize("name", LEARNING)
def test_what_is_learned_shares_no_memory_with_the_models_which_stay_as_they_are(name: str) -> None:
    models = [marked(net(seed)) for seed in range(2)]
    before = [Snapshot.of(model) for model in models]
    result = LEARNING[name](*models, loader(), epochs=1)
    mine = {tensor.data_ptr() for model in models for tensor in model.state_dict().values()}
    assert not mine & {tensor.data_ptr() for tensor in result.model.state_dict().values()}
    for snapshot, model in zip(before, models, strict=True):
        snapshot.assert_still(model)
    found = Snapshot.of(result.model)
    assert (found.modes, found.requires_grad) == (before[0].modes, before[0].requires_grad)


@pytest.mark.parametrize("name", LEARNING)
def test_every_epoch_is_told(name: str) -> None:
    told: list[tuple[int, float]] = []
    telling = Learning(on_epoch=lambda *epoch: told.append(epoch))
    result = LEARNING[name](net(0), net(1), loader(), epochs=2, learning=telling)
    assert told == list(enumerate(result.history, start=1))


@pytest.mark.parametrize("name", LEARNING)
def test_a_loss_of_one_s_own_over_dictionaries_equals_the_cross_entropy_of_pairs(name: str) -> None:
    def loss(outputs: Tensor, batch: Batch) -> Tensor:
        assert isinstance(batch, dict)
        return cross_entropy(outputs.float(), batch["labels"])

    pairs = loader()
    named = [{"labels": labels, "input": pixels} for pixels, labels in pairs]
    plain = LEARNING[name](net(0), net(1), pairs, epochs=2)
    own = LEARNING[name](net(0), net(1), named, epochs=2, learning=Learning(loss=loss))
    assert own.history == plain.history
    assert_same_state(own.model.state_dict(), plain.model.state_dict())


@pytest.mark.parametrize("name", LEARNING)
def test_a_learning_rate_that_diverges_is_an_error(name: str) -> None:
    a, b = net(0, norm=False), net(1, norm=False)
    b[8].weight.data.mul_(float("inf"))
    with pytest.raises(TrainingError, match="the loss is nan in epoch 1, step 1"):
        LEARNING[name](a, b, loader(), epochs=2)


def test_the_registry_lists_averaging_then_fine_tuning_then_np_merge() -> None:
    found = of_kind("aggregate")
    assert list(found)[:3] == ["mean", "finetune", "np_merge"]
    assert found["np_merge"].needs == found["finetune"].needs == ("data", "labels")
    assert set(found["np_merge"].options) == set(found["finetune"].options) == {"epochs", "lr"}
    assert set(found["mean"].options) == {"alpha"}
    assert [one.row for one in found.values()][:3] == ["{align}", "Finetune-{align}", "NP-{align}"]


# Bad input


@pytest.mark.parametrize("name", LEARNING)
@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], "the data is empty"),
        (iter(loader()), "one-shot list_iterator"),
        ([(torch.zeros(2, 3, 8, 8), torch.tensor([0, CLASSES]))], "label 4 is out of range"),
        ([(torch.zeros(2, 3, 8, 8), torch.tensor([0, -1]))], "label -1 is out of range"),
    ],
)
def test_bad_data_is_refused(name: str, data: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LEARNING[name](net(0), net(1), data, epochs=1)


@pytest.mark.parametrize("name", ["mean", *LEARNING])
def test_models_of_different_architecture_or_shape_are_refused(name: str) -> None:
    def merge(a: nn.Module, b: nn.Module) -> object:
        return mean(a, b) if name == "mean" else LEARNING[name](a, b, loader(), epochs=1)

    with pytest.raises(
        ValueError, match=r"has shape \(6, 3, 3, 3\) in the first .* \(7, 3, 3, 3\)"
    ):
        merge(net(), net(width=7))
    with pytest.raises(ValueError, match="merge two models of one architecture"):
        merge(net(), net(norm=False))
    with pytest.raises(ValueError, match="merge two models of one architecture"):
        merge(resnet20(CLASSES, 0.125), vgg11(CLASSES, 0.125, image_size=8))


def test_parameters_of_several_types_are_refused_with_the_types() -> None:
    a, b = net(0), net(1)
    a[8].half()
    with pytest.raises(
        ValueError, match=r"one floating-point type .* got torch.float16 on cpu, torch.float32"
    ):
        np_merge(a, b, loader(), epochs=1)


@pytest.mark.gpu
def test_np_merge_on_a_gpu_follows_the_cpu() -> None:
    found = []
    for device in ("cpu", "cuda"):
        a, b = net(0).to(device), net(1).to(device)
        result = np_merge(
            a, b, loader(), epochs=3, lr=0.05, learning=Learning(mixed_precision=False)
        )
        assert {x.device.type for x in result.alpha.values()} == {device}
        found.append(result)
    assert found[1].history == pytest.approx(found[0].history, rel=1e-3)
    for name, alpha in found[0].alpha.items():
        assert torch.allclose(found[1].alpha[name].cpu(), alpha, atol=1e-2)
