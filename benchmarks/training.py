"""Training with npmerge beside a standard DataLoader with torchvision transforms and a plain loop.

Images per second of one model in steady state: what a training does once, such as choosing kernels and compiling, is
in the first pass, which has a column of its own. Every round also times a large square matrix product; its rate is
what the share of the device is counted against.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from statistics import median

import torch
from _common import Report, Setting, begin, beside, command_line, interleaved, network, summary
from batches import augmented, loader, random_images
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.flop_counter import FlopCounterMode

from npmerge.data import Batches, Data
from npmerge.device import gains_from_bfloat16, kernels, synchronize
from npmerge.training import fit

BASELINE = "DataLoader, plain loop"
EAGER, DETERMINISTIC = "npmerge", "npmerge, deterministic"
COMPILED, HALF = "npmerge, compiled", "npmerge, bfloat16"
BOTH = "npmerge, compiled, bfloat16"
MATRICES = "matrix products"
LR = 1e-3


@dataclass(frozen=True)
class Training(Setting):
    """What this benchmark can be asked to vary too."""

    steps: int
    workers: int

    @property
    def cuda(self) -> bool:
        return torch.device(self.device).type == "cuda"


def prepared(setting: Training) -> tuple[nn.Module, torch.optim.Optimizer]:
    """A base model and its optimiser, as the zoo makes them."""
    model = network(setting, 0).to(memory_format=torch.channels_last)
    return model, torch.optim.SGD(
        model.parameters(), lr=LR, momentum=0.9, weight_decay=5e-4, fused=True
    )


def plain(setting: Training, data: Data, *, bfloat16: bool) -> Callable[[], None]:
    """One pass of the loop that one would write without npmerge."""
    model = network(setting, 0)
    optimizer = torch.optim.SGD(model.parameters(), lr=LR, momentum=0.9, weight_decay=5e-4)
    device = torch.device(setting.device)

    def one_pass() -> None:
        for images, labels in data:
            inputs = images.to(device, non_blocking=True)
            targets = labels.to(device, non_blocking=True)
            with torch.autocast(device.type, torch.bfloat16) if bfloat16 else nullcontext():
                loss = cross_entropy(model(inputs), targets)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    return one_pass


def own(setting: Training, *, deterministic: bool = False, **options: bool) -> Callable[[], None]:
    """One pass of npmerge's loop."""
    model, optimizer = prepared(setting)
    images = random_images(setting, setting.steps * setting.batch_size)
    one_pass = partial(
        fit, model, Batches(images, **augmented(setting)), optimizer, epochs=1, **options
    )

    def with_kernels() -> None:
        with kernels(deterministic=deterministic):
            one_pass()

    return with_kernels


def trainings(setting: Training) -> dict[str, Callable[[], None]]:
    """What to compare."""
    images = random_images(setting, setting.steps * setting.batch_size)
    standard = loader(setting, images, setting.workers)
    return {
        BASELINE: plain(setting, standard, bfloat16=False),
        f"{BASELINE}, bfloat16": plain(setting, standard, bfloat16=True),
        EAGER: own(setting, mixed_precision=False),
        DETERMINISTIC: own(setting, deterministic=True, mixed_precision=False),
        COMPILED: own(setting, mixed_precision=False, compile=True),
        HALF: own(setting, mixed_precision=True),
        BOTH: own(setting, mixed_precision=True, compile=True),
    }


def matrices(setting: Training) -> tuple[Callable[[], object], float]:
    """Products of large square matrices, and how many floating-point operations they are."""
    size, times = (8192, 50) if setting.cuda else (2048, 1)
    x = torch.randn(size, size, device=setting.device)
    return lambda: [x @ x for _ in range(times)][-1], 2.0 * times * size**3


def flop(setting: Training) -> int:
    """Floating-point operations of a training step an image, forward and backward."""
    (images, labels), *_ = Batches(random_images(setting, 2), **augmented(setting))
    model = network(setting, 0)
    with FlopCounterMode(display=False) as counter:
        cross_entropy(model(images), labels).backward()
    return counter.get_total_flops() // len(labels)


def compare(setting: Training, report: Report) -> None:
    """Time every way to train, and say what each costs beside the plain one of npmerge."""
    variants, first = trainings(setting), {}
    for name, run in variants.items():
        start = time.perf_counter()
        run()
        synchronize(torch.device(setting.device))
        first[name] = time.perf_counter() - start
    product, operations = matrices(setting)
    seconds = interleaved({**variants, MATRICES: product}, setting)
    rates = [operations / t for t in seconds.pop(MATRICES)]
    images = setting.steps * setting.batch_size
    rows, work = summary(seconds, BASELINE, images), flop(setting)
    for name, row in rows.items():
        done = [work * images / t for t in seconds[name]]
        share = median(d / r for d, r in zip(done, rates, strict=True))
        row["extra"] = {"% of matrix rate": 100 * share, "first pass, s": first[name]}
    report.table(f"Training {setting.network}, batch {setting.batch_size}", rows)
    report.note(
        f"A training step is {work / 1e6:,.0f} MFLOP an image: convolutions and matrix products, forward and backward. "
        f"Large square matrix products in float32 run at {median(rates) / 1e9:,.0f} GFLOP/s here: the matrix rate."
    )
    for name, what in (
        (DETERMINISTIC, "Deterministic kernels take"),
        (COMPILED, "torch.compile takes"),
        (HALF, "bfloat16 takes"),
        (BOTH, "Both together take"),
    ):
        report.note(f"{what} {beside(seconds, name, EAGER)} times as long as npmerge's plain loop.")
    gains = gains_from_bfloat16(torch.device(setting.device))
    report.note(f"npmerge takes {'bfloat16' if gains else 'float32'} on this device by default.")


def main() -> None:
    # cuBLAS reads it at its first call in the process: later is too late for the deterministic row.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    parser = command_line(__doc__, batch_size=128, repeats=5)
    for option, text in (
        ("--steps", "in a round; None: 2 on a CPU, 100 on CUDA"),
        ("--workers", "of the DataLoader; None: 0 on a CPU, 8 on CUDA"),
    ):
        parser.add_argument(option, type=int, help=text)
    setting, report = begin(
        parser,
        Training,
        steps=lambda cuda: 100 if cuda else 2,
        workers=lambda cuda: 8 if cuda else 0,
    )
    compare(setting, report)
    report.write()


if __name__ == "__main__":
    main()
