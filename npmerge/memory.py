"""How much memory a piece of work takes, on a CPU as on a GPU."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from npmerge.device import free_memory, peak_memory, synchronize


@dataclass(frozen=True)
class Memory:
    """Bytes that PyTorch allocated on top of what there was before.

    Attributes:
        held: afterwards, for what the work returned.
        peak: the most at one time.
    """

    held: int
    peak: int


def allocated(work: Callable[[], object], device: torch.device) -> Memory:
    """Do some work and count the memory it takes.

    On a CPU every allocation is recorded, which takes time and memory of its own: let the work be a few steps. The
    device's own count of its peak begins anew.

    Args:
        work: what it returns is held until it is counted, and then given up.
        device: where it works.
    """
    gc.collect()  # what is freed meanwhile must have been allocated meanwhile
    free_memory(device)
    before = peak_memory(device)
    if before is None:
        return _profiled(work)
    kept = work()
    synchronize(device)
    peak = (peak_memory(device) or before) - before
    gc.collect()
    free_memory(device)  # the peak is now what is still there
    held = (peak_memory(device) or before) - before
    del kept
    return Memory(int(held), int(peak))


def _profiled(work: Callable[[], object]) -> Memory:
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler's own messages
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        kept = work()
        gc.collect()
    recorded: Any = profiler.profiler
    events = [e for e in recorded.kineto_results.events() if e.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    del kept
    return Memory(now, peak)
