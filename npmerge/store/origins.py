"""Where a record's numbers come from: the source, the machine, the versions, and what they cost."""

from __future__ import annotations

import math
import os
import platform
import subprocess
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from npmerge._version import __version__
from npmerge.device import device_name, kernels_label, peak_memory

PACKAGE = Path(__file__).resolve().parents[1]
"""The folder of the source whose revision is said."""


def provenance(
    device: torch.device,
    *,
    seconds: float,
    source: str,
    precision: str = "float32",
    deterministic: bool = False,
    base_models: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Where a record's numbers come from.

    Args:
        device: where the cell ran.
        seconds: wall-clock time it took.
        source: :func:`revision` when it began.
        precision: of learning; measuring is in float32.
        deterministic: whether the kernels were.
        base_models: where they come from, by name; see :meth:`npmerge.store.zoo.Zoo.provenance`.

    Returns:
        What :class:`npmerge.store.records.Provenance` holds.
    """
    used = peak_memory(device)
    peak = _resident_mib() if used is None else used / 2**20
    return {
        "revision": source,
        "device": device_label(device),
        "kernels": kernels_label(device),
        "threads": torch.get_num_threads(),
        "precision": precision,
        "python": platform.python_version(),
        "versions": {"npmerge": __version__}
        | {
            name: version(name)
            for name in ("torch", "torchvision", "numpy", "scipy", "scikit-learn")
        },
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "seconds": round(seconds, 1),
        "peak_memory_mib": round(peak) if math.isfinite(peak) else None,
        "base_models": dict(base_models or {}),
        "deterministic": deterministic,
    }


def device_label(device: torch.device) -> str:
    """What records call a kind of device."""
    return device_name(device) or f"CPU ({platform.machine()})"


def revision() -> str:
    """The git revision of the source, ``+`` behind it if it was changed.

    A copy without git's folder can say what it is a copy of in the environment variable ``NPMERGE_REVISION``; otherwise
    the package's version has to do.
    """
    try:
        # Not just inside somebody else's repository.
        _git("ls-files", "--error-unmatch", f"store/{Path(__file__).name}")
        head = _git("rev-parse", "HEAD")
        return head + ("+" if _git("status", "--porcelain", "--", ".") else "")
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("NPMERGE_REVISION") or f"version {__version__}"


def _git(*words: str) -> str:
    done = subprocess.run(  # noqa: S603
        ["git", "-C", str(PACKAGE), *words],  # noqa: S607
        check=True,
        capture_output=True,
        text=True,
    )
    return done.stdout.strip()


def _resident_mib() -> float:
    """Peak resident memory of this process; not a number where the system does not tell (Windows)."""
    try:
        import resource
    except ImportError:
        return math.nan
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)
