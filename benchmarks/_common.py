"""What the benchmarks share: the command line, interleaved timing, the tables and the record."""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any, TypeVar

import torch
from torch import nn

from npmerge.device import device_name, synchronize
from npmerge.models import MODELS, build
from npmerge.store.files import write_atomically
from npmerge.store.origins import provenance, revision

CLASSES = 100
CIFAR_SIZE = 32

Seconds = dict[str, list[float]]
"""Of each variant in each round."""
Rows = dict[str, dict[str, Any]]
"""A table: what :func:`summary` says of each variant, and under ``"extra"`` more numbers, by the column's name."""


@dataclass(frozen=True)
class Setting:
    """What every benchmark can be asked to vary."""

    device: str
    model: str
    width: float
    image_size: int
    batch_size: int
    repeats: int
    threads: int
    clock: str

    @property
    def network(self) -> str:
        """The network's name with its width."""
        return f"{self.model}x{self.width:g}"


AnySetting = TypeVar("AnySetting", bound=Setting)


@dataclass
class Report:
    """Prints tables and notes, and writes them down at the end if a folder was given."""

    setting: Setting
    folder: Path | None
    source: str = field(default_factory=revision)
    started: float = field(default_factory=time.perf_counter)
    tables: dict[str, Rows] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def table(self, title: str, rows: Rows, *, images: bool = True) -> None:
        """Print a table, with or without images a second; the first row is the baseline."""
        _show(title, rows, images)
        if not images:
            for row in rows.values():
                del row["images_per_second"]
        self.tables[title] = rows

    def note(self, text: str) -> None:
        """Print a sentence that belongs to the numbers."""
        self.notes.append(text)
        print(text)

    def write(self) -> None:
        """Write the record: setting, tables, notes, and where they come from."""
        if self.folder is None:
            return
        setting, name = self.setting, Path(sys.argv[0]).stem
        device = torch.device(setting.device)
        where = re.sub(r"[^a-z0-9]+", "-", (device_name(device) or "cpu").lower()).strip("-")
        size = "" if setting.image_size == CIFAR_SIZE else f"-{setting.image_size}px"
        path = self.folder / f"{name}-{setting.network}{size}-{where}.json"
        content = {
            "benchmark": name,
            "setting": asdict(setting),
            "tables": self.tables,
            "notes": self.notes,
            "provenance": provenance(
                device, seconds=time.perf_counter() - self.started, source=self.source
            ),
        }
        write_atomically(path, lambda part: part.write_text(json.dumps(content, indent=1) + "\n"))
        print(f"\n{path}")


def command_line(
    description: str | None, *, batch_size: int, repeats: int
) -> argparse.ArgumentParser:
    """The options that all benchmarks have."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--device", default="cpu", help="cpu, cuda, ...")
    parser.add_argument("--model", default="resnet20", choices=sorted(MODELS))
    parser.add_argument("--width", type=float, default=1, help="of the network")
    parser.add_argument("--image-size", type=int, default=CIFAR_SIZE, help="in pixels")
    parser.add_argument("--batch-size", type=int, default=batch_size)
    parser.add_argument("--repeats", type=int, default=repeats, help="rounds of the comparison")
    parser.add_argument("--threads", type=int, default=2, help="of PyTorch on the CPU")
    parser.add_argument(
        "--clock",
        choices=("wall", "cpu"),
        default="wall",
        help="cpu: this process's own time, for a CPU that is busy with other work (use one thread)",
    )
    parser.add_argument(
        "--record", type=Path, metavar="DIR", help="write a record into this folder too"
    )
    return parser


def begin(
    parser: argparse.ArgumentParser, kind: type[AnySetting], **defaults: Callable[[bool], Any]
) -> tuple[AnySetting, Report]:
    """Read the command line.

    Args:
        parser: with the benchmark's own options added.
        kind: the setting's class; a field an option.
        defaults: of options that are None, given whether the device is CUDA.
    """
    options = vars(parser.parse_args())
    folder = options.pop("record")
    cuda = torch.device(options["device"]).type == "cuda"
    for name, default in defaults.items():
        options[name] = default(cuda) if options[name] is None else options[name]
    setting = kind(**options)
    torch.set_num_threads(setting.threads)
    return setting, Report(setting, folder)


def network(setting: Setting, seed: int) -> nn.Module:
    """A network with random weights."""
    model = build(
        setting.model, CLASSES, width=setting.width, in_channels=3, image_size=setting.image_size,
        seed=seed,
    )  # fmt: skip
    return model.to(setting.device)


def random_batches(setting: Setting, count: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Batches of noise, on the device."""
    generator = torch.Generator().manual_seed(0)
    n, size = setting.batch_size, setting.image_size
    return [
        (
            torch.randn(n, 3, size, size, generator=generator).to(setting.device),
            torch.randint(CLASSES, (n,), generator=generator).to(setting.device),
        )
        for _ in range(count)
    ]


def interleaved(variants: Mapping[str, Callable[[], object]], setting: Setting) -> Seconds:
    """Seconds of each variant in each round.

    A round runs every variant once, so that what else the machine does falls on all of them; the variant that goes
    first changes from round to round. One untimed round comes before.
    """
    clock = time.process_time if setting.clock == "cpu" else time.perf_counter
    names, device = list(variants), torch.device(setting.device)
    seconds: Seconds = {name: [] for name in names}
    for run in variants.values():
        run()
    for number in range(setting.repeats):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            synchronize(device)
            start = clock()
            variants[name]()
            synchronize(device)
            seconds[name].append(clock() - start)
    return seconds


def summary(seconds: Seconds, baseline: str, images: int | Mapping[str, int]) -> Rows:
    """The numbers of each variant, the baseline's first.

    Milliseconds, images per second, and the ratio to the baseline's time of the same round, an image.

    Args:
        seconds: from :func:`interleaved`.
        baseline: name of a variant.
        images: in one round; by variant where they differ.
    """
    of = images if isinstance(images, Mapping) else dict.fromkeys(seconds, images)
    rows: Rows = {}
    for name in sorted(seconds, key=lambda name: name != baseline):
        times, share = seconds[name], of[baseline] / of[name]
        ratios = _ratios(times, seconds[baseline], share)
        rows[name] = {
            "ms": 1e3 * median(times),
            "ms_range": [1e3 * min(times), 1e3 * max(times)],
            "images_per_second": of[name] / median(times),
            "ratio": median(ratios),
            "ratio_range": [min(ratios), max(ratios)],
            "ratio_of_fastest": min(times) / min(seconds[baseline]) * share,
        }
    return rows


def beside(seconds: Seconds, one: str, other: str) -> str:
    """How many times another variant's time one takes, for as much work: median (min-max) over the rounds."""
    ratios = _ratios(seconds[one], seconds[other], 1)
    return f"{median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})"


def _ratios(times: list[float], base: list[float], share: float) -> list[float]:
    return [share * t / b for t, b in zip(times, base, strict=True)]


def _show(title: str, rows: Rows, images: bool) -> None:
    rate = ["images/s"] if images else []
    header = ["", "ms: median (min-max)", *rate, "time ratio (min-max)", "of fastest"]
    extra = list(next(iter(rows.values())).get("extra", {}))
    table = [header + extra]
    for name, row in rows.items():
        low, high = row["ms_range"]
        ratio_low, ratio_high = row["ratio_range"]
        table.append(
            [
                name,
                f"{row['ms']:.1f} ({low:.1f}-{high:.1f})",
                *(f"{row['images_per_second']:,.0f}" for _ in rate),
                f"{row['ratio']:.3f} ({ratio_low:.2f}-{ratio_high:.2f})",
                f"{row['ratio_of_fastest']:.3f}",
                *(f"{row['extra'][key]:.2f}" for key in extra),
            ]
        )
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    print(f"\n{title}")
    for line in table:
        name, *cells = (cell.rjust(width) for cell, width in zip(line, widths, strict=True))
        print("  ".join([name.strip().ljust(widths[0]), *cells]))
