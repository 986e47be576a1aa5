"""What differs between devices, in one place: precision, recorded steps, streams, compilation, memory, determinism.

Every function here does its work on a CPU too, by a plain path beside the CUDA one; the rest of the library names no
device.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

log = logging.getLogger(__name__)

T = TypeVar("T")


def pick_device(name: str) -> torch.device:
    """The device of a name.

    Args:
        name: ``"auto"`` takes CUDA if it is there, else the CPU.

    Raises:
        ValueError: no such device here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(
            f"device {name!r} is not here ({str(error).splitlines()[0]}): use 'auto' or 'cpu'"
        ) from error
    return device


def device_of(model: nn.Module) -> torch.device:
    """The device of a model's first parameter; the CPU for a model without parameters."""
    return next((p.device for p in model.parameters()), torch.device("cpu"))


def channels_last(images: Tensor) -> Tensor:
    """Images ``(N, C, H, W)`` with their channels innermost in memory, as convolutions prefer; others as they are."""
    return images.contiguous(memory_format=torch.channels_last) if images.ndim == 4 else images


def gains(device: torch.device) -> bool:
    """Whether mixed precision, compilation and recorded steps are worth their cost by default: on CUDA."""
    return device.type == "cuda"


def models_at_once(device: torch.device) -> int:
    """How many models to train together by default: one on a CPU, which a single one keeps busy; 16 on CUDA."""
    return 16 if device.type == "cuda" else 1


def autocast(
    device: torch.device, enabled: bool | None = None
) -> contextlib.AbstractContextManager[None]:
    """bfloat16 autocast on ``device``.

    Args:
        device: where the model runs.
        enabled: by default where the device gains from it (CUDA).
    """
    if not (gains(device) if enabled is None else enabled):
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=torch.bfloat16)


@contextlib.contextmanager
def float32(device: torch.device) -> Iterator[None]:
    """Measure in true float32: no autocast, and no TensorFloat-32 in convolutions and matrix products.

    Args:
        device: where the model runs.
    """
    backends: list[Any] = [torch.backends.cudnn, torch.backends.cuda.matmul]
    before = [backend.allow_tf32 for backend in backends]
    try:
        for backend in backends:
            backend.allow_tf32 = False
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        for backend, allowed in zip(backends, before, strict=True):
            backend.allow_tf32 = allowed


@contextlib.contextmanager
def measuring(model: nn.Module) -> Iterator[torch.device]:
    """Measure a model: in evaluation mode and true float32; every module's mode is restored.

    Args:
        model: the model.

    Yields:
        Its device.
    """
    device = device_of(model)
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with float32(device):
            yield device
    finally:
        for module, mode in modes.items():
            module.training = mode


@contextlib.contextmanager
def kernels(*, deterministic: bool) -> Iterator[None]:
    """Choose between the fastest kernels and deterministic ones.

    Deterministic ones give the same bits in every run on the same device and versions. On a CPU with a fixed number
    of threads training has them anyway; on CUDA convolutions are no longer chosen by timing them, and scattered sums
    are ordered.

    Args:
        deterministic: an operation without a deterministic kernel is then an error that names it.
    """
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.backends.cudnn.benchmark,
        torch.backends.cudnn.deterministic,
    )
    if deterministic:  # read when cuBLAS starts, so it stays
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    try:
        torch.use_deterministic_algorithms(deterministic)
        torch.backends.cudnn.benchmark = not deterministic
        torch.backends.cudnn.deterministic = deterministic
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic = before[1:]


def record(
    step: Callable[..., Tensor], inputs: Sequence[Tensor], device: torch.device
) -> Callable[[], Tensor]:
    """Record the kernels of one call, to launch them again all at once (a CUDA graph).

    Args:
        step: works on its inputs in place of fresh ones; must not wait for the device.
        inputs: to be filled anew before each call of the result.
        device: where they are.

    Returns:
        Does what ``step(*inputs)`` does, and returns the same tensor every time. On a CPU it simply calls ``step``.
    """
    if device.type != "cuda":
        return lambda: step(*inputs)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):  # records, and does not run
        output = step(*inputs)

    def replay() -> Tensor:
        graph.replay()
        return output

    return replay


def side_by_side(jobs: Sequence[Callable[[], T]], device: torch.device) -> list[T]:
    """Call some independent jobs; on CUDA each on a stream of its own, so that small kernels fill the device together.

    Args:
        jobs: may use what was made on the current stream before.
        device: where they run.

    Returns:
        Their results, for use on the current stream.
    """
    if device.type != "cuda" or len(jobs) < 2:
        return [job() for job in jobs]
    here = torch.cuda.current_stream(device)
    new_stream: Callable[[torch.device], torch.cuda.Stream] = torch.cuda.Stream
    streams = [new_stream(device) for _ in jobs]
    results = []
    for job, stream in zip(jobs, streams, strict=True):
        stream.wait_stream(here)
        with torch.cuda.stream(stream):
            results.append(job())
    for stream in streams:
        here.wait_stream(stream)
    return results


def compiled(
    function: Callable[..., Tensor], example: Callable[[], Sequence[Any]]
) -> Callable[..., Tensor]:
    """``torch.compile`` a differentiable function, once it has been seen to work here.

    Args:
        function: returns a loss, or losses.
        example: makes arguments to try it on, forward and backward; what is written into them is of no interest.

    Returns:
        The compiled function, or with a warning the function itself where compiling fails, for want of a compiler say.
    """
    fast: Callable[..., Tensor] = torch.compile(function)
    try:
        torch.autograd.backward(fast(*example()).sum())
    except Exception as error:  # noqa: BLE001 - whatever a tool chain can raise; the plain function is as good
        first = str(error).strip().splitlines()[:1]
        log.warning(
            "torch.compile does not work here (%s: %s): going on without it",
            type(error).__name__,
            *(first or [""]),
        )
        return function
    return fast


def synchronize(device: torch.device) -> None:
    """Wait until the device has done all it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def free_memory(device: torch.device) -> None:
    """Give what PyTorch keeps for later back to the device, and count the peak of its memory anew."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def peak_memory(device: torch.device) -> float | None:
    """The most bytes of device memory in use since :func:`free_memory`; ``None`` where nobody counts (a CPU)."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None


def device_name(device: torch.device) -> str | None:
    """What the device's maker calls it; ``None`` for a CPU."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else None
