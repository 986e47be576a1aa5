"""AlphaAdam: the chain rule and Adam by hand, against autograd through the re-parametrised weights."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import assert_same_state, loader, net
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy

from npmerge.aggregate import AlphaAdam
from npmerge.models import resnet20, vgg11

Batch = tuple[Tensor, Tensor]


def networks(dtype: torch.dtype, device: str = "cpu") -> tuple[nn.Module, nn.Module]:
    """Convolution, batch norm and linear layers."""
    return tuple(net(seed).to(device, dtype).train() for seed in (0, 10))


def explicit_loss(
    model: nn.Module, a: nn.Module, b: nn.Module, pre: dict[str, Tensor], batch: Batch
) -> Tensor:
    """Eq. 2 as written: every weight re-parametrised, autograd all the way."""
    weights = {
        name: torch.sigmoid(pre[name]) * x.detach()
        + (1 - torch.sigmoid(pre[name])) * b.get_parameter(name).detach()
        for name, x in a.named_parameters()
    }
    return cross_entropy(functional_call(model, weights, (batch[0],)), batch[1])


def backward(model: nn.Module, optimizer: AlphaAdam, batch: Batch) -> None:
    optimizer.zero_grad()
    cross_entropy(model(batch[0]), batch[1]).backward()


def steps(model: nn.Module, optimizer: AlphaAdam, data: list[Batch]) -> None:
    for batch in data:
        backward(model, optimizer, batch)
        optimizer.step()


def by_autograd(
    a: nn.Module, b: nn.Module, data: list[Batch], lr: Callable[[int], float]
) -> tuple[dict[str, Tensor], nn.Module]:
    """alpha by torch.optim.Adam on alpha_pre, and the model with its buffers."""
    model = copy.deepcopy(a)
    pre = {name: torch.zeros_like(p, requires_grad=True) for name, p in a.named_parameters()}
    adam = torch.optim.Adam(pre.values(), lr=lr(0))
    for index, batch in enumerate(data):
        adam.param_groups[0]["lr"] = lr(index)
        adam.zero_grad()
        explicit_loss(model, a, b, pre, batch).backward()
        adam.step()
    return {name: torch.sigmoid(x.detach()) for name, x in pre.items()}, model


def falling(index: int) -> float:
    return 0.1 * 0.8**index


@pytest.mark.parametrize(
    ("device", "dtype", "tolerance"),
    [
        ("cpu", torch.float64, 1e-10),
        ("cpu", torch.float32, 2e-4),
        pytest.param("cuda", torch.float64, 1e-8, marks=pytest.mark.gpu),
    ],
    ids=str,
)
@pytest.mark.parametrize("lr", [lambda _: 0.05, falling], ids=["constant", "set between steps"])
def test_a_trajectory_is_that_of_adam_on_alpha_pre_through_autograd(
    lr: Callable[[int], float], device: str, dtype: torch.dtype, tolerance: float
) -> None:
    a, b = networks(dtype, device)
    data = [(x.to(device), y.to(device)) for x, y in loader(24, dtype=dtype) * 5]
    expected, reference = by_autograd(a, b, data, lr)
    model = copy.deepcopy(a)
    optimizer = AlphaAdam(model, b, lr=lr(0))
    for index, batch in enumerate(data):
        optimizer.param_groups[0]["lr"] = lr(index)
        steps(model, optimizer, [batch])
    found = optimizer.alpha()
    assert found.keys() == expected.keys()
    for name, alpha in expected.items():
        assert torch.allclose(found[name], alpha, rtol=0, atol=tolerance)
        mixed = alpha * a.get_parameter(name) + (1 - alpha) * b.get_parameter(name)
        assert torch.allclose(model.get_parameter(name), mixed, rtol=0, atol=tolerance)
    assert any(float((x - 0.5).abs().max()) > 0.05 for x in found.values())
    for name, buffer in model.named_buffers():
        assert torch.allclose(buffer, reference.get_buffer(name), atol=10 * tolerance)


@pytest.mark.parametrize("seed", range(3))
def test_the_hand_written_gradient_is_autograd_s(seed: int) -> None:
    """In float64, at an alpha that is not 0.5."""
    a, b = (net(s).double().train() for s in (seed, seed + 10))
    first, second = loader(16, dtype=torch.float64)
    model = copy.deepcopy(a)
    optimizer = AlphaAdam(model, b, lr=0.5)
    steps(model, optimizer, [first])
    alpha = optimizer.alpha()
    assert all(float((x - 0.5).abs().max()) > 0.1 for x in alpha.values())

    pre = {name: torch.logit(x).requires_grad_() for name, x in alpha.items()}
    loss = explicit_loss(copy.deepcopy(a), a, b, pre, second)
    expected = dict(zip(pre, torch.autograd.grad(loss, list(pre.values())), strict=True))
    backward(model, optimizer, second)
    plain = {name: p.grad.clone() for name, p in model.named_parameters()}
    moment = optimizer.state_dict()["state"]["exp_avg"]
    before = moment.clone()
    optimizer.step()
    used = optimizer._views((moment - 0.9 * before) / 0.1)  # what Adam was given
    for name, gradient in zip(expected, used, strict=True):
        assert torch.allclose(gradient, expected[name], rtol=1e-8, atol=1e-12)
        difference = a.get_parameter(name) - b.get_parameter(name)
        assert not torch.allclose(plain[name] * difference, expected[name])  # alpha' left out


def test_a_network_of_several_pieces_is_learned_everywhere() -> None:
    """A piece ends inside a parameter."""
    a, b = (
        vgg11(4, 0.25, image_size=8, generator=torch.Generator().manual_seed(seed)).double()
        for seed in range(2)
    )
    assert sum(p.numel() for p in a.parameters()) > 2 * 2**18
    data = loader(16, dtype=torch.float64)
    expected, _ = by_autograd(a, b, data, lambda _: 0.05)
    optimizer = AlphaAdam(a, b, lr=0.05)
    steps(a, optimizer, data)
    for name, alpha in optimizer.alpha().items():
        assert torch.allclose(alpha, expected[name], rtol=0, atol=1e-8)


def channels_last(model: nn.Module) -> nn.Module:
    return model.to(memory_format=torch.channels_last)


def one_layer_channels_last(model: nn.Module) -> nn.Module:
    model[3].to(memory_format=torch.channels_last)
    return model


@pytest.mark.parametrize("of_a", [channels_last, one_layer_channels_last, lambda model: model])
@pytest.mark.parametrize("of_b", [channels_last, lambda model: model])
def test_the_memory_format_of_the_parameters_does_not_matter(
    of_a: Callable[[Any], nn.Module], of_b: Callable[[Any], nn.Module]
) -> None:
    a, b = networks(torch.float64)
    data = loader(24, dtype=torch.float64)
    expected, _ = by_autograd(a, b, data, lambda _: 0.05)
    model = of_a(copy.deepcopy(a))
    optimizer = AlphaAdam(model, of_b(copy.deepcopy(b)), lr=0.05)
    steps(model, optimizer, data)
    for name, alpha in optimizer.alpha().items():
        assert torch.allclose(alpha, expected[name], rtol=0, atol=1e-10)


def test_bfloat16_parameters_are_learned_in_bfloat16() -> None:
    a, b = networks(torch.bfloat16)
    model = copy.deepcopy(a)
    optimizer = AlphaAdam(model, b, lr=0.05)
    steps(model, optimizer, loader(24, dtype=torch.bfloat16))
    for name, alpha in optimizer.alpha().items():
        assert alpha.dtype == model.get_parameter(name).dtype == torch.bfloat16
        x, y = a.get_parameter(name), b.get_parameter(name)
        mixed = (alpha.float() * x.float() + (1 - alpha.float()) * y.float()).bfloat16()
        assert torch.allclose(model.get_parameter(name), mixed, atol=2e-2)
        assert not torch.equal(alpha, torch.full_like(alpha, 0.5))


def test_a_parameter_without_a_gradient_keeps_its_alpha() -> None:
    a, b = networks(torch.float32)
    for model in (a, b):
        model.register_parameter("unused", nn.Parameter(torch.randn(5)))
    optimizer = AlphaAdam(a, b, lr=0.05)
    steps(a, optimizer, loader())
    alpha = optimizer.alpha()
    assert torch.equal(alpha["unused"], torch.full((5,), 0.5))
    assert not torch.equal(alpha["0.weight"], torch.full_like(alpha["0.weight"], 0.5))


def test_a_step_uses_the_gradient_up_and_zero_grad_forgets_what_came_after_it() -> None:
    model, (first, second) = net(0).train(), loader(16)
    optimizer = AlphaAdam(model, net(1), lr=0.1)
    steps(model, optimizer, [first])
    assert not any(p.grad.any() for p in model.parameters())
    cross_entropy(model(second[0]), second[1]).backward()
    assert any(p.grad.any() for p in model.parameters())
    optimizer.zero_grad()
    assert not any(p.grad.any() for p in model.parameters())


def test_a_gradient_that_zero_grad_dropped_does_not_count() -> None:
    a, b = networks(torch.float32)
    first, second, *_ = loader()
    results = []
    for dropped in (False, True):
        model = copy.deepcopy(a)
        optimizer = AlphaAdam(model, b, lr=0.05)
        state = copy.deepcopy(model.state_dict())
        if dropped:
            backward(model, optimizer, second)
            for name, buffer in model.named_buffers():
                buffer.copy_(state[name])
        steps(model, optimizer, [first])
        results.append(model.state_dict())
    assert_same_state(*results)


# Saving


def test_a_resumed_training_is_the_uninterrupted_one_bit_for_bit(tmp_path: Path) -> None:
    a, b = resnet20(4, 0.25), resnet20(4, 0.25, generator=torch.Generator().manual_seed(1))
    data = loader(48)
    model = copy.deepcopy(a)
    optimizer = AlphaAdam(model, b, lr=0.05)
    steps(model, optimizer, data[:3])
    optimizer.param_groups[0]["lr"] = 0.02
    torch.save((model.state_dict(), optimizer.state_dict()), tmp_path / "saved.pt")
    steps(model, optimizer, data[3:])

    again = copy.deepcopy(a)
    resumed = AlphaAdam(again, b, lr=0.05)
    weights, state = torch.load(tmp_path / "saved.pt")
    again.load_state_dict(weights)
    resumed.load_state_dict(state)
    assert resumed.param_groups[0]["lr"] == 0.02
    assert_same_state(again.state_dict(), weights)
    steps(again, resumed, data[3:])
    assert_same_state(again.state_dict(), model.state_dict())
    assert_same_state(resumed.alpha(), optimizer.alpha())
    assert_same_state(resumed.state_dict()["state"], optimizer.state_dict()["state"])


def test_a_loaded_state_sets_the_weights_and_is_not_shared() -> None:
    a, b = networks(torch.float32)
    model, other = copy.deepcopy(a), copy.deepcopy(a)
    optimizer, loaded = AlphaAdam(model, b, lr=0.05), AlphaAdam(other, b, lr=0.1)
    steps(model, optimizer, loader())
    loaded.load_state_dict(optimizer.state_dict())
    assert_same_state(dict(other.named_parameters()), dict(model.named_parameters()))
    alpha = optimizer.alpha()
    steps(other, loaded, loader())
    loaded.param_groups[0]["lr"] = 1.0
    assert_same_state(optimizer.alpha(), alpha)
    assert optimizer.param_groups[0]["lr"] == 0.05


def test_a_state_of_another_network_is_refused() -> None:
    wide, narrow = (
        AlphaAdam(net(width=7), net(1, width=7), lr=0.1),
        AlphaAdam(net(), net(1), lr=0.1),
    )
    with pytest.raises(
        ValueError, match=r"is of a model with 7\d\d parameters, this one has 5\d\d"
    ):
        narrow.load_state_dict(wide.state_dict())


# Memory


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
    steps(model, optimizer, [batch] * 2)
    buffers = live_storages(bytes_of_parameters) - before
    assert len(buffers) == len(["weight", "gradient", "first moment", "second moment"]) + 3


# Bad input


def test_parameters_of_several_types_are_refused() -> None:
    model = net()
    model[0].double()
    with pytest.raises(ValueError, match=r"one floating-point type on one device, got .*float32"):
        AlphaAdam(model, net(1), lr=0.1)
