"""Results on disk: one record file a unit, written atomically, with where its numbers come from."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import pandas as pd
import torch

from npmerge._version import __version__
from npmerge.device import device_name, peak_memory
from npmerge.zoo import config_hash, write_atomically

log = logging.getLogger(__name__)

State = Literal["done", "missing", "stale", "damaged"]
"""What a unit's record file is; stale if it was made under another configuration."""

COLUMNS = [
    "table",
    "dataset",
    "model",
    "setting",
    "method",
    "examples_per_class",
    "metric",
    "value",
]
"""The columns of a record: those of the paper's table of numbers, so that a comparison is a join."""


@dataclass(frozen=True)
class Unit:
    """The smallest piece of work that leaves a record: an experiment in one setting with one seed.

    Attributes:
        profile: name of the parameter set.
        experiment: name of the experiment, e.g. ``"same_data"``.
        setting: name of the setting within it, e.g. ``"cifar100-resnet20x1"``.
        seed: of everything random in it.
        config: all that its numbers are a function of, JSON-serialisable.
    """

    profile: str
    experiment: str
    setting: str
    seed: int
    config: dict[str, Any]

    @property
    def config_hash(self) -> str:
        """Stands for the configuration."""
        return config_hash(self.config)

    @property
    def name(self) -> str:
        """Where the record is, below the results folder and without its ending."""
        return f"{self.profile}/{self.label}"

    @property
    def label(self) -> str:
        """The name below the profile, e.g. ``"same_data/cifar100-resnet20x1-seed0"``."""
        return f"{self.experiment}/{self.setting}-seed{self.seed}"


@dataclass(frozen=True)
class Outcome:
    """What running a unit gives.

    Attributes:
        records: one a number, each with the keys of :data:`COLUMNS`.
        details: what figures need beyond the table: curves, histograms, chosen hyper-parameters, seconds.
    """

    records: list[dict[str, Any]]
    details: dict[str, Any]


class Results:
    """A folder of record files.

    Args:
        folder: where they are; made when the first one is written.
    """

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)

    def path(self, unit: Unit) -> Path:
        """The unit's record file."""
        return self.folder / f"{unit.name}.json"

    def finished(self, unit: Unit) -> bool:
        """Whether the unit has a whole record made under its present configuration; says why if not."""
        state = self.state(unit)
        if state == "damaged":
            log.warning("%s is damaged: making it again", self.path(unit))
        if state == "stale":
            log.warning("%s was made under another configuration: making it again", self.path(unit))
        return state == "done"

    def state(self, unit: Unit) -> State:
        """What the unit's record file is."""
        path = self.path(unit)
        if not path.exists():
            return "missing"
        content = _read(path)
        if content is None:
            return "damaged"
        return "done" if content["config_hash"] == unit.config_hash else "stale"

    @contextlib.contextmanager
    def running(self, unit: Unit) -> Iterator[None]:
        """Show others that this process is at work on a unit, by a hidden file beside the record.

        It keeps nobody from doing the same: two processes may run one unit, and the last record stays.

        Args:
            unit: what is run.
        """
        path = self.path(unit)
        for lock in self._locks(unit):  # of processes that were killed
            if _since(lock) is None:
                lock.unlink(missing_ok=True)
        lock = path.with_name(f".{path.stem}.{platform.node()}-{os.getpid()}.running")
        content = {"host": platform.node(), "pid": os.getpid(), "start": time.time()}
        text = json.dumps(content | {"born": _born(os.getpid())}) + "\n"
        write_atomically(lock, lambda part: part.write_text(text))
        try:
            yield
        finally:
            lock.unlink(missing_ok=True)

    def started(self, unit: Unit) -> float | None:
        """When the processes that are at work on the unit began (``time.time()``); ``None`` if there are none."""
        starts = [_since(lock) for lock in self._locks(unit)]
        return min((start for start in starts if start is not None), default=None)

    def _locks(self, unit: Unit) -> list[Path]:
        path = self.path(unit)
        return list(path.parent.glob(f".{path.stem}.*.running"))

    def write(self, unit: Unit, outcome: Outcome, provenance: dict[str, Any]) -> Path:
        """Write the unit's record file in one piece.

        Args:
            unit: what was run.
            outcome: what it gave.
            provenance: see :func:`provenance`.

        Returns:
            The file.
        """
        path = self.path(unit)
        content = {
            "unit": {key: value for key, value in asdict(unit).items() if key != "config"},
            "config": unit.config,
            "config_hash": unit.config_hash,
            "records": outcome.records,
            "details": outcome.details,
            "provenance": provenance,
        }
        text = json.dumps(content, indent=1) + "\n"
        write_atomically(path, lambda part: part.write_text(text))
        return path

    def read(
        self, profile: str, experiment: str, units: Sequence[Unit] | None = None
    ) -> list[dict[str, Any]]:
        """The contents of an experiment's record files, in the order of setting and seed.

        Args:
            profile: name of the parameter set.
            experiment: name of the experiment.
            units: only these; all that are there by default.

        Raises:
            FileNotFoundError: a unit asked for has no record.
            ValueError: a record file is damaged.
        """
        asked = None if units is None else [self.path(unit) for unit in units]
        found = []
        for path in self._paths(profile, experiment) if asked is None else asked:
            if not path.exists():
                raise FileNotFoundError(
                    f"{path} is missing: run `npmerge run {experiment} --profile {profile}`"
                )
            content = _read(path)
            if content is None:
                raise ValueError(
                    f"{path} is damaged: run `npmerge run {experiment} --profile {profile}` to make it again"
                )
            found.append(content)
        return found

    def whole(self, profile: str, experiment: str) -> Iterator[dict[str, Any]]:
        """The contents of an experiment's record files but for damaged ones, stale ones included.

        Args:
            profile: name of the parameter set.
            experiment: name of the experiment.
        """
        for path in self._paths(profile, experiment):
            content = _read(path)
            if content is not None:
                yield content

    def _paths(self, profile: str, experiment: str) -> list[Path]:
        return sorted((self.folder / profile / experiment).glob("[!.]*-seed*.json"))


def table(contents: Sequence[dict[str, Any]]) -> pd.DataFrame:
    """All records of some record files as one table.

    Args:
        contents: from :meth:`Results.read`.

    Returns:
        :data:`COLUMNS` and ``seed``; one row a number.
    """
    rows = [
        record | {"seed": content["unit"]["seed"]}
        for content in contents
        for record in content["records"]
    ]
    return pd.DataFrame(rows, columns=[*COLUMNS, "seed"])


def provenance(device: torch.device, seconds: float, source: str) -> dict[str, Any]:
    """Where a record's numbers come from.

    Args:
        device: where the unit ran.
        seconds: wall-clock time it took.
        source: :func:`revision` when it began.

    Returns:
        Revision of the source, device, versions, threads, time, seconds and peak memory in MiB.
    """
    used = peak_memory(device)
    peak = _resident_mib() if used is None else used / 2**20
    return {
        "revision": source,
        "device": device_label(device),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "versions": {"npmerge": __version__}
        | {
            name: version(name)
            for name in ("torch", "torchvision", "numpy", "scipy", "scikit-learn")
        },
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "seconds": round(seconds, 1),
        "peak_memory_mib": round(peak) if math.isfinite(peak) else None,
    }


def device_label(device: torch.device) -> str:
    """What records call a kind of device."""
    return device_name(device) or f"CPU ({platform.machine()})"


def revision() -> str:
    """The git revision of the source, ``+`` behind it if it was changed.

    A copy without git's folder can say what it is a copy of in the environment variable ``NPMERGE_REVISION``; otherwise
    the package's version has to do.
    """
    here = Path(__file__).resolve().parent
    try:
        _git(
            here, "ls-files", "--error-unmatch", Path(__file__).name
        )  # not just inside somebody else's repository
        head = _git(here, "rev-parse", "HEAD")
        return head + ("+" if _git(here, "status", "--porcelain", "--", str(here)) else "")
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("NPMERGE_REVISION") or f"version {__version__}"


def _git(folder: Path, *words: str) -> str:
    done = subprocess.run(  # noqa: S603
        ["git", "-C", str(folder), *words],  # noqa: S607
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


def _read(path: Path) -> dict[str, Any] | None:
    """The content of a record file, or None if it is damaged."""
    try:
        content = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError):
        return None
    keys = {"unit", "config", "config_hash", "records", "details", "provenance"}
    return content if isinstance(content, dict) and keys <= content.keys() else None


BELIEVED = 24 * 60 * 60.0
"""Seconds for which another machine's word that a unit is running is believed: its processes cannot be asked."""


def _since(lock: Path) -> float | None:
    """When the process that wrote the file began the unit, or None if it is no more."""
    try:
        content = json.loads(lock.read_text())
        start = float(content["start"])
        if content["host"] != platform.node():
            return start if time.time() - start < BELIEVED else None
        born = _born(content["pid"])
        return start if born is not None and born == content["born"] else None
    except (OSError, ValueError, KeyError, TypeError):  # removed in the meantime, or damaged
        return None


def _born(pid: int) -> str | None:
    """When a process of this machine began, as the kernel says it where it does; None if there is none."""
    if Path("/proc/self/stat").exists():
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            return None
        return None if state[0] == "Z" else state[19]
    if os.name == "nt":  # where os.kill with signal 0 is no question
        return ""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except PermissionError:
        pass
    return ""
