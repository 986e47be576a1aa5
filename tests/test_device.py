"""Devices: each CUDA path has a CPU path beside it, and both pass here."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from tiny import images, loader, net
from torch import Tensor, nn

from npmerge import align
from npmerge.correct import reset_batchnorm
from npmerge.data import Batches
from npmerge.device import (
    autocast,
    float32,
    free_memory,
    gains_from_bfloat16,
    kernels,
    kernels_label,
    peak_memory,
    random_states,
    set_random_states,
    sound_convolutions,
    threads,
)
from npmerge.evaluate import score

CPU = torch.device("cpu")
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.param)


@pytest.mark.parametrize(
    ("found", "gains"),
    [
        ({"avx2": True, "avx512_bf16": False, "amx_bf16": False}, False),
        ({"avx2": True, "avx512_bf16": True, "amx_bf16": False}, True),
        ({"avx512_bf16": False, "amx_bf16": True}, True),
        ({"architecture": "aarch64", "sve": True}, False),
    ],
)
def test_a_cpu_gains_from_bfloat16_if_it_has_instructions_for_it(
    found: dict[str, Any], gains: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: found, raising=False)
    assert gains_from_bfloat16(CPU) is gains
    with autocast(CPU):
        assert torch.is_autocast_enabled("cpu") is gains


@pytest.mark.parametrize("gains", [True, False])
def test_an_older_pytorch_is_asked_in_its_own_way(
    gains: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: gains, raising=False)
    monkeypatch.delattr(torch.cpu, "_is_avx512_bf16_supported", raising=False)
    assert gains_from_bfloat16(CPU) is gains
    monkeypatch.delattr(torch.cpu, "_is_amx_tile_supported")
    assert not gains_from_bfloat16(CPU)


def test_a_device_nobody_has_measured_does_not_gain_from_bfloat16() -> None:
    assert not gains_from_bfloat16(torch.device("meta"))


@pytest.mark.parametrize(("size", "stride", "count"), [(1, 2, 4), (1, 2, 9), (3, 4, 9)])
def test_convolutions_that_step_over_their_input_learn_the_right_weights(
    size: int, stride: int, count: int
) -> None:
    """Their gradients in bfloat16 are garbage on CPUs that compute in it."""
    conv = nn.Conv2d(64, 64, 3, stride=stride, padding=1)
    pixels, weighed = torch.randn(count, 64, size, size), torch.randn(count, 64, 1, 1)

    def gradient(enabled: bool) -> Tensor:
        with sound_convolutions(conv), autocast(CPU, enabled):
            outputs = conv(pixels)
            assert torch.is_autocast_enabled("cpu") is enabled
        (found,) = torch.autograd.grad((outputs * weighed).sum(), [conv.weight])
        return found

    right = gradient(enabled=False)
    assert (gradient(enabled=True) - right).abs().max() < 0.05 * right.abs().max()
    with autocast(CPU, enabled=True):
        assert conv(pixels).dtype == torch.bfloat16  # nothing is left behind


def test_other_convolutions_stay_in_bfloat16() -> None:
    conv = nn.Conv2d(3, 4, 3, stride=2)
    with sound_convolutions(conv), autocast(CPU, enabled=True):
        assert conv(torch.randn(2, 3, 8, 8)).dtype == torch.bfloat16


def test_the_kernels_of_a_device_have_a_label_fit_for_a_file_name(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind, _, which = kernels_label(device).partition("-")
    assert kind == device.type
    assert which.replace("_", "").isalnum()
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "NO AVX")
    assert kernels_label(CPU) == "cpu-NO-AVX"
    assert kernels_label(torch.device("meta")) == "meta"


def test_threads_are_set_for_a_while() -> None:
    before = torch.get_num_threads()
    for count in (before + 1, None):
        with threads(count):
            assert torch.get_num_threads() == (count or before)
        assert torch.get_num_threads() == before
    with pytest.raises(KeyError), threads(before + 1):
        raise KeyError
    assert torch.get_num_threads() == before
    with pytest.raises(ValueError, match="threads is 0: it must be at least 1"), threads(0):
        pass


def test_random_numbers_go_on_where_the_states_say(device: torch.device) -> None:
    states = random_states(device)
    first = [torch.rand(5), torch.rand(5, device=device)]
    set_random_states(states, device)
    assert all(map(torch.equal, first, [torch.rand(5), torch.rand(5, device=device)]))


@pytest.fixture
def tensor_float32() -> Iterator[None]:
    """As PyTorch has it on a GPU by default, and more."""
    backends: list[Any] = [torch.backends.cudnn, torch.backends.cuda.matmul]
    before = [backend.allow_tf32 for backend in backends]
    for backend in backends:
        backend.allow_tf32 = True
    yield
    for backend, allowed in zip(backends, before, strict=True):
        backend.allow_tf32 = allowed


class Spy(nn.Module):
    """Notes the precision it is run in."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = net().eval()
        self.seen: list[tuple[bool, bool, bool, torch.dtype]] = []

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.inner(x)
        self.seen.append((
            torch.is_autocast_enabled("cpu"), torch.backends.cudnn.allow_tf32,
            torch.backends.cuda.matmul.allow_tf32, logits.dtype,
        ))  # fmt: skip
        return logits


@pytest.mark.usefixtures("tensor_float32")
def test_scores_and_batch_norm_are_measured_in_true_float32_even_under_autocast() -> None:
    with autocast(CPU, enabled=True):
        measures: list[Callable[..., object]] = [score, reset_batchnorm]
        for measure in measures:
            spy = Spy()
            measure(spy, loader())
            assert set(spy.seen) == {(False, False, False, torch.float32)}
        assert torch.is_autocast_enabled("cpu")
    assert torch.backends.cudnn.allow_tf32
    assert torch.backends.cuda.matmul.allow_tf32


@pytest.mark.usefixtures("tensor_float32")
def test_alignment_statistics_do_not_depend_on_autocast_or_tensor_float32() -> None:
    a, b = net(0).eval(), net(1).eval()
    with autocast(CPU, enabled=True):
        found = align.covariances(a, b, loader())
        with float32(CPU):
            plain = align.covariances(a, b, loader())
    for x, y in zip(found.xy, plain.xy, strict=True):
        assert torch.equal(x, y)
    assert torch.backends.cudnn.allow_tf32


def test_deterministic_kernels_are_chosen_for_a_while() -> None:
    before = torch.backends.cudnn.benchmark
    with kernels(deterministic=True):
        assert torch.are_deterministic_algorithms_enabled()
        assert not torch.backends.cudnn.benchmark
    assert not torch.are_deterministic_algorithms_enabled()
    with kernels(deterministic=False):
        assert torch.backends.cudnn.benchmark
    assert torch.backends.cudnn.benchmark == before


def test_memory_is_counted_where_the_device_counts_it(device: torch.device) -> None:
    free_memory(device)
    assert (peak_memory(device) is None) == (device.type == "cpu")
    batches = Batches(images(8), 4, mean=(0.5,) * 3, std=(0.25,) * 3, device=device)
    assert len(list(batches)) == 2
    assert device.type == "cpu" or (peak_memory(device) or 0) > 0
