"""What the benchmarks share: the command line, interleaved timing and the table."""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import nn

from npmerge.models import resnet20

CLASSES = 100


@dataclass(frozen=True)
class Setting:
    """What every benchmark can be asked to vary."""

    device: str
    batch_size: int
    width: float
    image_size: int
    repeats: int
    threads: int
    clock: str


def read_setting(
    description: str | None, *, batch_size: int, repeats: int
) -> tuple[Setting, Path | None]:
    """The command line: the setting, and the file to write the numbers to."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--device", default="cpu", help="cpu, cuda, ...")
    parser.add_argument("--batch-size", type=int, default=batch_size)
    parser.add_argument("--width", type=float, default=1, help="of ResNet20")
    parser.add_argument("--image-size", type=int, default=32, help="in pixels")
    parser.add_argument("--repeats", type=int, default=repeats, help="rounds of the comparison")
    parser.add_argument("--threads", type=int, default=2, help="of PyTorch on the CPU")
    parser.add_argument(
        "--clock",
        choices=("wall", "cpu"),
        default="wall",
        help="cpu: this process's own time, for a CPU that is busy with other work (use one thread)",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers there too")
    options = vars(parser.parse_args())
    file = options.pop("json")
    setting = Setting(**options)
    torch.set_num_threads(setting.threads)
    return setting, file


def network(setting: Setting, seed: int) -> nn.Module:
    """A ResNet20 with random weights."""
    generator = torch.Generator().manual_seed(seed)
    model = resnet20(CLASSES, setting.width, image_size=setting.image_size, generator=generator)
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


def interleaved(
    variants: dict[str, Callable[[], object]], setting: Setting
) -> dict[str, list[float]]:
    """Seconds of each variant in each round.

    A round runs every variant once, so that what else the machine does falls on all of them; the variant that goes
    first changes from round to round. One untimed round comes before.
    """
    clock = time.process_time if setting.clock == "cpu" else time.perf_counter
    names = list(variants)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for run in variants.values():
        run()
    for number in range(setting.repeats):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            _wait(setting.device)
            start = clock()
            variants[name]()
            _wait(setting.device)
            seconds[name].append(clock() - start)
    return seconds


def summary(
    seconds: dict[str, list[float]], baseline: str, images: int
) -> dict[str, dict[str, Any]]:
    """Per variant: milliseconds, images per second, and the ratio to the baseline's time of the same round."""
    rows: dict[str, dict[str, Any]] = {}
    for name, times in seconds.items():
        ratios = [t / base for t, base in zip(times, seconds[baseline], strict=True)]
        rows[name] = {
            "ms": 1e3 * median(times),
            "ms_range": [1e3 * min(times), 1e3 * max(times)],
            "images_per_second": images / median(times),
            "ratio": median(ratios),
            "ratio_range": [min(ratios), max(ratios)],
            "ratio_of_fastest": min(times) / min(seconds[baseline]),
        }
    return rows


def show(title: str, rows: dict[str, dict[str, Any]]) -> None:
    """Print the table; a row's ``memory`` (already text) is a last column."""
    header = ["", "ms: median (min-max)", "images/s", "time ratio (min-max)", "of fastest"]
    extra = list(next(iter(rows.values())).get("memory", {}))
    table = [header + extra]
    for name, row in rows.items():
        low, high = row["ms_range"]
        ratio_low, ratio_high = row["ratio_range"]
        table.append(
            [
                name,
                f"{row['ms']:.1f} ({low:.1f}-{high:.1f})",
                f"{row['images_per_second']:,.0f}",
                f"{row['ratio']:.3f} ({ratio_low:.2f}-{ratio_high:.2f})",
                f"{row['ratio_of_fastest']:.3f}",
                *(f"{row['memory'][key]:.2f}" for key in extra),
            ]
        )
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    print(f"\n{title}")
    for line in table:
        name, *cells = (cell.rjust(width) for cell, width in zip(line, widths, strict=True))
        print("  ".join([name.strip().ljust(widths[0]), *cells]))


def machine(setting: Setting) -> dict[str, str]:
    """Where the numbers are from."""
    device = torch.device(setting.device)
    cuda = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if cuda else platform.machine(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def write(file: Path | None, setting: Setting, tables: dict[str, Any]) -> None:
    """Write the tables with their setting as JSON, if a file is asked for."""
    if file:
        content = {"setting": vars(setting), "machine": machine(setting), **tables}
        file.write_text(json.dumps(content, indent=1) + "\n")


def _wait(device: str) -> None:
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
