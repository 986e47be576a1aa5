"""Devices: each CUDA path has a CPU path beside it, and both pass here."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from tiny import images, loader, net
from torch import Tensor, nn

from npmerge import align
from npmerge.batchnorm import reset_batchnorm
from npmerge.data import Batches
from npmerge.device import (
    autocast,
    compiled,
    float32,
    free_memory,
    kernels,
    peak_memory,
    record,
    side_by_side,
)
from npmerge.evaluate import score

CPU = torch.device("cpu")
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.param)


def test_a_recorded_step_works_on_what_its_inputs_hold_now(device: torch.device) -> None:
    kept, total = torch.ones(3, device=device), torch.zeros(3, device=device)

    def step(x: Tensor) -> Tensor:
        total.add_(x)
        return 2 * total

    replay = record(step, [kept], device)
    total.zero_()
    assert replay().tolist() == [2, 2, 2]
    kept.fill_(5)
    assert replay().tolist() == [12, 12, 12]


def test_jobs_side_by_side_see_what_came_before_and_their_results_are_seen_after(
    device: torch.device,
) -> None:
    base = torch.arange(1000.0, device=device).square()
    found = side_by_side([lambda k=k: base + k for k in range(5)], device)
    assert [int(x[3]) for x in found] == [9, 10, 11, 12, 13]
    assert torch.equal(torch.stack(found).sum(0), 5 * base + 10)


def test_a_function_that_cannot_be_compiled_is_used_as_it_is_with_a_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def no_compiler(_: Any) -> Any:
        def call(_: Tensor) -> Tensor:
            raise RuntimeError("no C compiler found\nlong explanation")

        return call

    def double(x: Tensor) -> Tensor:
        return 2 * x

    monkeypatch.setattr(torch, "compile", no_compiler)
    with caplog.at_level(logging.WARNING, logger="npmerge"):
        assert compiled(double, lambda: [torch.ones(2, requires_grad=True)]) is double
    (line,) = caplog.messages
    assert "torch.compile does not work here (RuntimeError: no C compiler found)" in line


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
