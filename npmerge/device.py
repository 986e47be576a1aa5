"""What differs between devices, in one place: precision, kernels, threads, memory, random numbers.

Every function here does its work on a CPU too, by a plain path beside the CUDA one; the rest of the library names no
device.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from npmerge.prepare import checked


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
        torch.zeros(1, device=device).cpu()
    except (RuntimeError, AssertionError, ImportError) as error:
        reason = str(error).splitlines()[0].split(". ")[0]
        raise ValueError(f"device {name!r} is not here ({reason}): use 'auto' or 'cpu'") from error
    return device


def device_of(model: nn.Module) -> torch.device:
    """The device of a model's first parameter; the CPU for a model without parameters.

    Raises:
        ValueError: it is no model to compute with; see :func:`npmerge.prepare.checked`.
    """
    return next((p.device for p in checked(model).parameters()), torch.device("cpu"))


def channels_last(images: Tensor) -> Tensor:
    """Images ``(N, C, H, W)`` with their channels innermost in memory, as convolutions prefer; others as they are."""
    return images.contiguous(memory_format=torch.channels_last) if images.ndim == 4 else images


def gains_from_bfloat16(device: torch.device) -> bool:
    """Whether a device computes faster in bfloat16 than in float32: its hardware says so.

    Args:
        device: CUDA from Ampere on, or a CPU with AVX512-BF16 or AMX-BF16; others do not gain.
    """
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if device.type != "cpu":
        return False
    capabilities = getattr(torch.cpu, "get_capabilities", None)
    if capabilities is not None:
        found = capabilities()
        return bool(found.get("avx512_bf16") or found.get("amx_bf16"))
    questions = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")  # before PyTorch 2.12
    return any(getattr(torch.cpu, question, bool)() for question in questions)


def kernels_label(device: torch.device) -> str:
    """What decides, on equal versions and threads, which kernels run and so the last bits: ``"cpu-AVX2"``.

    Args:
        device: a CPU is named by its vector instructions, CUDA by its architecture, e.g. ``"cuda-sm_90"``.
    """
    if device.type == "cpu":
        return f"cpu-{torch.backends.cpu.get_cpu_capability().replace(' ', '-')}"
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        return f"cuda-sm_{major}{minor}"
    return device.type


@contextlib.contextmanager
def threads(count: int | None) -> Iterator[None]:
    """Compute on so many CPU threads for a while; the number decides the last bits of sums.

    Args:
        count: ``None`` leaves it as it is.

    Raises:
        ValueError: fewer than one.
    """
    if count is not None and count < 1:
        raise ValueError(f"threads is {count}: it must be at least 1")
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(before if count is None else count)
        yield
    finally:
        torch.set_num_threads(before)


def autocast(
    device: torch.device, enabled: bool | None = None
) -> contextlib.AbstractContextManager[None]:
    """bfloat16 autocast on ``device``.

    Args:
        device: where the model runs.
        enabled: by default where the device gains from it; see :func:`gains_from_bfloat16`.
    """
    if not (gains_from_bfloat16(device) if enabled is None else enabled):
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=torch.bfloat16)


@contextlib.contextmanager
def sound_convolutions(model: nn.Module) -> Iterator[None]:
    """Let a model learn in bfloat16 on a CPU: convolutions whose gradients would be wrong compute in float32.

    Where the stride is larger than the input, oneDNN's bfloat16 gradient of the weights is read from memory that nobody
    has written (seen with PyTorch 2.15).

    Args:
        model: its convolutions are modules.
    """
    left: list[Any] = []

    def before(
        stride: tuple[int, ...], _module: nn.Module, inputs: tuple[Tensor, ...]
    ) -> tuple[Tensor, ...] | None:
        first, *rest = inputs
        sizes = first.shape[-len(stride) :]
        if all(size >= step for size, step in zip(sizes, stride, strict=True)):
            return None
        left.append(torch.autocast(first.device.type, enabled=False))
        left[-1].__enter__()
        return (first.float(), *rest)

    def after(*_: object) -> None:
        if left:
            left.pop().__exit__(None, None, None)

    with contextlib.ExitStack() as hooks:
        for module in model.modules():
            if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d) and max(module.stride) > 1:
                hook = partial(before, module.stride)
                hooks.callback(module.register_forward_pre_hook(hook).remove)
                hooks.callback(module.register_forward_hook(after).remove)
        yield


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


def random_states(device: torch.device) -> list[Tensor]:
    """The states of PyTorch's own random generators, the CPU's and the device's.

    Args:
        device: where a model runs.
    """
    states = [torch.get_rng_state()]
    return [*states, torch.cuda.get_rng_state(device)] if device.type == "cuda" else states


def set_random_states(states: Sequence[Tensor], device: torch.device) -> None:
    """Put PyTorch's own random generators where they were.

    Args:
        states: from :func:`random_states`, of a device of that kind.
        device: where a model runs.
    """
    torch.set_rng_state(states[0])
    if device.type == "cuda":
        torch.cuda.set_rng_state(states[1], device)


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
