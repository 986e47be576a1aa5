"""How long a device takes for each kind of work: timed on networks of full size, or read off records."""

from __future__ import annotations

import copy
import csv
import io
import logging
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from functools import partial
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import nn

from npmerge.aggregate import learning_alpha
from npmerge.align import covariances, weight_matching
from npmerge.catalogue import profile_names
from npmerge.correct import reset_batchnorm
from npmerge.device import free_memory, kernels, pick_device, synchronize
from npmerge.evaluate import score
from npmerge.experiments import EXPERIMENTS
from npmerge.run.amounts import KINDS, Kind, Network, Part, parts, trained_images
from npmerge.run.work import base_models, mixed_precision
from npmerge.store.files import write_atomically
from npmerge.store.origins import device_label, revision
from npmerge.store.records import Cell, Record, Records
from npmerge.symmetry import find_symmetry
from npmerge.training import fit

log = logging.getLogger(__name__)

REPEATS, ENOUGH = 4, 5.0
"""How often a step is timed, or until it took so many seconds; the fastest counts."""
CPU_WORK = 1e10
"""FLOPs of a batch's forward pass on a CPU, whose speed hardly depends on the size of a batch."""
LEAST = 2
"""Images of a batch at least."""
SHORTEST = 0.2
"""Seconds that a part of a record must have taken to tell a rate."""


@dataclass(frozen=True)
class Timed:
    """Some work, and how long it took.

    Attributes:
        network: its name.
        kind: of the work.
        work: how much; see :meth:`Network.work`.
        seconds: that it took.
        device: what records call it.
        threads: of the CPU.
        precision: of learning.
        torch: its version.
        clock: whose seconds: of the wall, or on one thread of a CPU the process's own, which others do not disturb.
        revision: of the source, where it was timed and not taken from records.
        date: likewise.
    """

    network: str
    kind: Kind
    work: float
    seconds: float
    device: str
    threads: int
    precision: str
    torch: str
    clock: str = "wall"
    revision: str = ""
    date: str = ""


class Rates:
    """Seconds of work: at the median rate of its network, else of all networks.

    Args:
        timed: what is known of one device.
    """

    def __init__(self, timed: Iterable[Timed]) -> None:
        seen: defaultdict[tuple[str, str | None], list[float]] = defaultdict(list)
        for one in timed:
            for network in (one.network, None):
                seen[one.kind, network].append(one.seconds / one.work)
        self._seen = {key: median(values) for key, values in seen.items()}

    def seconds(self, kind: Kind, network: str, work: float) -> float | None:
        """Seconds of some work; ``None`` if nothing tells.

        Args:
            kind: of the work.
            network: its name.
            work: how much; see :meth:`Network.work`.
        """
        rate = self._seen.get((kind, network), self._seen.get((kind, None)))
        return None if rate is None else rate * work


def time_cells(cells: Sequence[Cell], device: str) -> Iterator[Timed]:
    """Time the networks of cells; see :func:`time_steps`.

    Args:
        cells: of one profile.
        device: name of the device; ``"auto"`` takes a GPU if there is one.

    Raises:
        ValueError: the device is not there.
    """
    where = pick_device(device)
    sizes: dict[Network, int] = {}
    for cell in cells:
        sizes.setdefault(Network.of(cell.config["setting"]), cell.config["data"]["batch_size"])
    mixed = mixed_precision(cells[0].config, where)
    for network, batch_size in sizes.items():
        yield from time_steps(network, where, batch_size=batch_size, mixed=mixed)


def time_steps(
    network: Network, device: torch.device, *, batch_size: int, mixed: bool
) -> Iterator[Timed]:
    """Time a step of every kind of work with a network: the library's own, on random images.

    Args:
        network: at its full size.
        device: where.
        batch_size: images a step; on a CPU as few as keep it busy.
        mixed: learn in bfloat16.
    """
    a, b = (network.build(seed).to(device).eval() for seed in (0, 1))
    fitting = batch_size if device.type != "cpu" else round(CPU_WORK / network.work("scoring"))
    images = max(LEAST, min(batch_size, fitting))
    data = [network.batch(images, device)]
    example = data[0][0]
    groups = find_symmetry(a, example)
    kinds: dict[Kind, Callable[[], Callable[[], object]]] = {
        "training": lambda: _learning(*_sgd(a), data, mixed),
        "learning": lambda: _learning(*learning_alpha(a, b, lr=1e-2), data, mixed),
        "reset": lambda: partial(reset_batchnorm, copy.deepcopy(a), data),
        "scoring": lambda: partial(score, a, data),
        "alignment": lambda: partial(covariances, a, b, data, groups=groups),
        "matching": lambda: partial(weight_matching, a, b, example, groups=groups),
    }
    for kind, prepare in kinds.items():
        if not network.work(kind):
            continue
        free_memory(device)
        with kernels(deterministic=False):
            seconds = _fastest(prepare(), device)
        work = network.work(kind) * (1 if kind == "matching" else images)
        precision = "bfloat16" if mixed else "float32"
        log.info("%s, %s: %.2f s", network.name, kind, seconds)
        yield Timed(
            network.name, kind, work, seconds, device_label(device), torch.get_num_threads(),
            precision, torch.__version__,
            "process" if _clock(device) is time.process_time else "wall",
            revision(), datetime.now(UTC).date().isoformat(),
        )  # fmt: skip


def _sgd(a: nn.Module) -> tuple[nn.Module, torch.optim.Optimizer]:
    model = copy.deepcopy(a)
    return model, torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9, weight_decay=5e-4)


def _learning(model: nn.Module, optimizer: Any, data: Any, mixed: bool) -> Callable[[], object]:
    return partial(fit, model, data, optimizer, epochs=1, mixed_precision=mixed)


def _fastest(work: Callable[[], object], device: torch.device) -> float:
    clock, took = _clock(device), list[float]()
    least = 1 if device.type == "cpu" else 2  # a GPU looks for its kernels first
    while len(took) < least or (len(took) < REPEATS and sum(took) < ENOUGH):
        synchronize(device)
        start = clock()
        work()
        synchronize(device)
        took.append(clock() - start)
    return min(took)


def _clock(device: torch.device) -> Callable[[], float]:
    one = device.type == "cpu" and torch.get_num_threads() == 1
    return time.process_time if one else time.perf_counter


def times_of(records: Iterable[Record]) -> Iterator[Timed]:
    """The parts of records that are of one kind of work.

    Args:
        records: of any profile and device.
    """
    seen = set()
    for record in records:
        cell, origin = cell_of(record), record.provenance
        network = Network.of(cell.config["setting"])

        def timed(kind: Kind, times: float, took: float, device: str) -> Timed:
            return Timed(
                network.name, kind, times * network.work(kind), took, device, origin.threads,  # noqa: B023
                origin.precision or "float32", origin.versions.get("torch", ""),  # noqa: B023
            )  # fmt: skip

        for base in base_models(cell):
            made = origin.base_models.get(base.name, {})
            times = trained_images(base)
            if made.get("seconds", 0) > SHORTEST and made["file"] not in seen and times:
                seen.add(made["file"])
                yield timed("training", times, made["seconds"], made["device"])
        stages: defaultdict[str, list[Part]] = defaultdict(list)
        for part in parts(cell) or ():
            stages[part.stage].append(part)
        for stage, (first, *others) in stages.items():
            took = getattr(record.seconds, stage, 0.0)
            if not others and took > SHORTEST and network.work(first.kind):
                yield timed(first.kind, first.times, took, origin.device)


def records_on(device: str, folder: Path | str) -> list[Record]:
    """The records of all profiles that were made on a device.

    Args:
        device: what they call it.
        folder: of the records.
    """
    records = Records(folder)
    every = (records.whole(*names) for names in product(profile_names(), EXPERIMENTS))
    return [one for found in every for one in found if one.provenance.device == device]


def write_timed(path: Path, timed: Iterable[Timed]) -> None:
    """Write a table that :func:`read_timed` reads.

    Args:
        path: a file of comma-separated values.
        timed: its rows.
    """
    text = io.StringIO()
    writer = csv.DictWriter(text, [field.name for field in fields(Timed)], lineterminator="\n")
    writer.writeheader()
    writer.writerows(asdict(one) for one in timed)
    write_atomically(path, lambda part: part.write_text(text.getvalue(), encoding="utf-8"))


def read_timed(path: Path | str) -> list[Timed]:
    """The table of a file.

    Args:
        path: that :func:`write_timed` wrote.

    Raises:
        ValueError: it is no such file, or holds two devices.
        OSError: it cannot be read.
    """
    try:
        with Path(path).open(encoding="utf-8", newline="") as file:
            rows = [_timed(row) for row in csv.DictReader(file)]
    except (KeyError, TypeError, ValueError, csv.Error):
        rows = []
    if len({(one.device, one.threads, one.precision) for one in rows}) != 1:
        raise ValueError(
            f"{path} is no table of times on one device: make it with `npmerge plan --measure {path}`"
        )
    return rows


def _timed(row: Mapping[str, Any]) -> Timed:
    numbers = {"threads": int(row["threads"])} | {n: float(row[n]) for n in ("work", "seconds")}
    one = Timed(**{**row, **numbers})
    if one.kind not in KINDS or not (0 < one.work < 1e30 and 0 < one.seconds < 1e9):
        raise ValueError(one)
    return one


def cell_of(record: Record) -> Cell:
    """The cell that a record is of, under the configuration that it had."""
    return Cell(**record.cell.model_dump(), config=record.config)
