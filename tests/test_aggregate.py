"""Agg: the mean, NP Merge and fine-tuning, held against plain implementations."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable

import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import CLASSES, assert_same_state, loader, net, same_parameters
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from npmerge.aggregate import AlphaAdam, finetune, finetune_tuned, mean, np_merge
from npmerge.data import Batches
from npmerge.models import resnet20, vgg11
from npmerge.training import TrainingError

few = settings(max_examples=15, deadline=None)


def double(seed: int) -> nn.Module:
    return net(seed).double().train()


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


def test_the_result_has_a_s_mode_and_requires_grad_though_every_alpha_is_learned() -> None:
    a, b = net(0).eval(), net(1)
    a[0].weight.requires_grad_(requires_grad=False)
    result = np_merge(a, b, loader(), epochs=2, lr=0.1)
    assert not result.model.training
    assert [p.requires_grad for p in result.model.parameters()] == [
        p.requires_grad for p in a.parameters()
    ]
    assert float((result.alpha["0.weight"] - 0.5).abs().max()) > 0.01


# NP Merge: the gradient and Adam, against the explicit re-parametrisation


def explicit_loss(
    model: nn.Module, a: nn.Module, b: nn.Module, pre: dict[str, Tensor], batch: tuple[Tensor, ...]
) -> Tensor:
    """Eq. 2 as written: every weight re-parametrised, autograd all the way."""
    weights = {
        name: torch.sigmoid(pre[name]) * x.detach()
        + (1 - torch.sigmoid(pre[name])) * b.get_parameter(name).detach()
        for name, x in a.named_parameters()
    }
    return cross_entropy(functional_call(model, weights, (batch[0],)), batch[1])


def backward(model: nn.Module, optimizer: AlphaAdam, batch: tuple[Tensor, Tensor]) -> None:
    optimizer.zero_grad()
    cross_entropy(model(batch[0]), batch[1]).backward()


@pytest.mark.parametrize("seed", range(3))
def test_the_hand_written_gradient_is_autograd_s_through_the_explicit_parametrisation(
    seed: int,
) -> None:
    """Convolution, batch norm and linear layers, in float64, at an alpha that is not 0.5."""
    a, b = double(seed), double(seed + 10)
    first, second = loader(16, dtype=torch.float64)
    model = copy.deepcopy(a)
    optimizer = AlphaAdam(model, b, lr=0.5)
    backward(model, optimizer, first)
    optimizer.step()
    alpha = optimizer.alpha()
    assert all(float((x - 0.5).abs().max()) > 0.1 for x in alpha.values())

    pre = {name: torch.logit(x).requires_grad_() for name, x in alpha.items()}
    loss = explicit_loss(copy.deepcopy(a), a, b, pre, second)
    expected = dict(zip(pre, torch.autograd.grad(loss, list(pre.values())), strict=True))
    backward(model, optimizer, second)
    plain = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    optimizer.step()  # turns dL/dW into dL/d(alpha_pre), in place
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        assert torch.allclose(parameter.grad, expected[name], rtol=1e-8, atol=1e-12)
        difference = a.get_parameter(name) - b.get_parameter(name)
        assert not torch.allclose(plain[name] * difference, expected[name])  # alpha' left out


def test_a_whole_trajectory_equals_adam_on_the_explicit_parametrisation() -> None:
    a, b = double(0), double(1)
    data = loader(24, dtype=torch.float64)
    model, reference = copy.deepcopy(a), copy.deepcopy(a)
    optimizer = AlphaAdam(model, b, lr=0.05)
    pre = {name: torch.zeros_like(p, requires_grad=True) for name, p in a.named_parameters()}
    adam = torch.optim.Adam(pre.values(), lr=0.05)
    for batch in data * 5:
        adam.zero_grad()
        explicit_loss(reference, a, b, pre, batch).backward()
        adam.step()
        backward(model, optimizer, batch)
        optimizer.step()
        for name, alpha in optimizer.alpha().items():
            assert torch.allclose(alpha, torch.sigmoid(pre[name]), rtol=1e-9, atol=1e-11)
    assert any(float((x - 0.5).abs().max()) > 0.1 for x in optimizer.alpha().values())
    for name, buffer in model.named_buffers():
        assert torch.allclose(buffer, reference.get_buffer(name))


def live_storages(at_least: int) -> set[int]:
    """Addresses of all memory of at least so many bytes that a tensor holds."""
    gc.collect()
    tensors = [x for x in gc.get_objects() if type(x) in (Tensor, nn.Parameter)]
    storages = {x.untyped_storage() for x in tensors}
    return {s.data_ptr() for s in storages if s.nbytes() >= at_least}


def test_three_buffers_of_the_parameters_size_beyond_weight_gradient_and_adam_s_two() -> None:
    a, b = vgg11(10, 0.125), vgg11(10, 0.125)
    bytes_of_parameters = 4 * sum(p.numel() for p in a.parameters())
    batch = (torch.randn(4, 3, 32, 32), torch.arange(4))
    before = live_storages(bytes_of_parameters)
    model = copy.deepcopy(a)
    optimizer = AlphaAdam(model, b, lr=0.01)
    for _ in range(2):
        backward(model, optimizer, batch)
        optimizer.step()
    buffers = live_storages(bytes_of_parameters) - before
    assert len(buffers) == len(["weight", "gradient", "first moment", "second moment"]) + 3


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
    assert (len(result.history), result.lr, result.trials) == (2, 0.02, {})
    assert not result.model.training


def test_frozen_parameters_are_fine_tuned_too() -> None:
    a, b = net(0), net(1)
    a[0].weight.requires_grad_(requires_grad=False)
    tuned = finetune(a, b, loader(), epochs=1).model
    assert not torch.equal(tuned[0].weight, mean(a, b)[0].weight)


def test_the_tuned_control_takes_the_learning_rate_that_validates_best() -> None:
    a, b = net(0), net(1)
    scores = {0.001: 50.0, 0.01: 70.0, 0.1: 60.0}
    given = iter(scores.values())
    result = finetune_tuned(
        a, b, loader(), kept=loader(8), validate=lambda _: next(given), lrs=tuple(scores),
        trial_epochs=1, epochs=2,
    )  # fmt: skip
    assert (result.lr, result.trials) == (0.01, scores)
    direct = finetune(a, b, loader(), epochs=2, lr=0.01).model
    assert_same_state(result.model.state_dict(), direct.state_dict())


def test_a_learning_rate_that_diverges_is_not_chosen() -> None:
    options = {"kept": loader(), "validate": lambda _: 10.0, "trial_epochs": 2, "epochs": 1}
    a, b = net(0, norm=False), net(1, norm=False)
    result = finetune_tuned(a, b, loader(), lrs=(1e30, 0.001), **options)
    assert result.lr == 0.001
    assert result.trials[1e30] == -float("inf")
    with pytest.raises(TrainingError, match=r"every learning rate of \(1e\+30,\) diverged"):
        finetune_tuned(a, b, loader(), lrs=(1e30,), **options)
    with pytest.raises(ValueError, match="lrs is empty: give at least one"):
        finetune_tuned(a, b, loader(), lrs=(), **options)


# Bad input


AGGREGATE: dict[str, Callable[..., object]] = {"np": np_merge, "finetune": finetune}


@pytest.mark.parametrize("name", AGGREGATE)
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
        AGGREGATE[name](net(0), net(1), data, epochs=1)


@pytest.mark.parametrize("name", ["mean", *AGGREGATE])
def test_models_of_different_architecture_or_shape_are_refused(name: str) -> None:
    def merge(a: nn.Module, b: nn.Module) -> object:
        return mean(a, b) if name == "mean" else AGGREGATE[name](a, b, loader(), epochs=1)

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
        result = np_merge(a, b, loader(), epochs=3, lr=0.05, mixed_precision=False)
        assert {x.device.type for x in result.alpha.values()} == {device}
        found.append(result)
    assert found[1].history == pytest.approx(found[0].history, rel=1e-3)
    for name, alpha in found[0].alpha.items():
        assert torch.allclose(found[1].alpha[name].cpu(), alpha, atol=1e-2)
