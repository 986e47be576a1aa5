"""Training with npmerge beside a standard DataLoader with torchvision transforms and a plain loop.

Images per second of all models added up, in steady state: what a training does once (choosing kernels, compiling,
recording) is in the first pass, which has a column of its own. Every round also times a large square matrix product;
its rate is what the share of the device is counted against. A second comparison learns several merged models one at
a time and together on shared batches.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from statistics import median
from threading import Semaphore, Thread
from typing import Any

import torch
from _common import (
    Report,
    Rows,
    Seconds,
    Setting,
    begin,
    beside,
    command_line,
    interleaved,
    network,
    summary,
)
from batches import augmented, loader, random_images
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.flop_counter import FlopCounterMode

from npmerge.aggregate import LearnAlpha, LearnWeights
from npmerge.data.batches import Batches, Data
from npmerge.device import kernels, models_at_once, synchronize
from npmerge.training import Run, TrainingError, fit_together

BASELINE = "DataLoader, plain loop"
ONE, DETERMINISTIC = "one model", ", deterministic"
STACKED, ALONE = "together, stacked", "one at a time"
MATRICES = "matrix products"
LR = 1e-3
UNTIMED = 2  # the first pass, and the one that ``interleaved`` starts with


@dataclass(frozen=True)
class Training(Setting):
    """What this benchmark can be asked to vary too."""

    models: int
    steps: int
    workers: int
    compile: bool

    @property
    def cuda(self) -> bool:
        return torch.device(self.device).type == "cuda"

    @property
    def together(self) -> str:
        """How models run beside each other."""
        return "together, on streams" if self.cuda else "together, in turns"

    @property
    def images(self) -> int:
        """What one model sees in a round."""
        return self.steps * self.batch_size


class Paced(Batches):
    """Batches that wait before every pass until somebody asks for it."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.asked, self.over = Semaphore(0), Semaphore(0)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        if self.epoch:
            self.over.release()
        self.asked.acquire()
        yield from super().__iter__()


class Passes:
    """A training that goes on by one pass over the data whenever it is called.

    It compiles and records once, so all its passes belong to one call of ``fit_together``; that call has a thread of
    its own, which waits between the passes.
    """

    def __init__(
        self, runs: list[Run], passes: int, *, deterministic: bool = False, **options: Any
    ) -> None:
        assert isinstance(runs[0].data, Paced)
        self._runs, self._data = runs, runs[0].data
        self._deterministic = deterministic
        self._options = {"epochs": passes, "at_once": len(runs), **options}
        self._error: BaseException | None = None
        Thread(target=self._train, daemon=True).start()

    def __call__(self) -> None:
        with kernels(deterministic=self._deterministic):
            self._data.asked.release()
            self._data.over.acquire()
        if self._error:
            raise self._error

    def _train(self) -> None:
        try:
            results = fit_together(self._runs, **self._options)
            self._error = next((one for one in results if isinstance(one, TrainingError)), None)
        except BaseException as error:  # noqa: BLE001 - raised again where it is waited for
            self._error = error
        self._data.over.release()


def plain(setting: Training, data: Data, *, mixed: bool) -> Callable[[], None]:
    """One pass of the loop that one would write without npmerge."""
    model = network(setting, 0)
    optimizer = torch.optim.SGD(model.parameters(), lr=LR, momentum=0.9, weight_decay=5e-4)
    device = torch.device(setting.device)

    def one_pass() -> None:
        for images, labels in data:
            inputs = images.to(device, non_blocking=True)
            targets = labels.to(device, non_blocking=True)
            with torch.autocast(device.type, torch.bfloat16) if mixed else nullcontext():
                loss = cross_entropy(model(inputs), targets)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    return one_pass


def base_runs(setting: Training, count: int) -> list[Run]:
    """The trainings of base models, each with an order of its own, as ``Zoo.get_all`` prepares them."""
    images = random_images(setting, setting.images)
    runs = []
    for seed in range(count):
        model = network(setting, seed).to(memory_format=torch.channels_last)
        optimizer = torch.optim.SGD(
            model.parameters(), lr=LR, momentum=0.9, weight_decay=5e-4, fused=True
        )
        data = (Batches if seed else Paced)(images, seed=seed, **augmented(setting))
        runs.append(Run(model, data, optimizer))
    return runs


def trainings(setting: Training) -> tuple[dict[str, Callable[[], object]], dict[str, int]]:
    """What to compare, and how many models each trains."""
    passes, many = setting.repeats + UNTIMED, setting.models
    images = random_images(setting, setting.images)
    standard = loader(setting, images, setting.workers)
    variants: dict[str, Callable[[], object]] = {BASELINE: plain(setting, standard, mixed=False)}
    if setting.cuda:
        variants[f"{BASELINE}, autocast"] = plain(setting, standard, mixed=True)
    own = Batches(images, **augmented(setting))
    word = ", autocast" if setting.cuda else ""
    variants[f"npmerge Batches, plain loop{word}"] = plain(setting, own, mixed=setting.cuda)
    ways = {f"{ONE}, eager": {"compile": False, "recorded": False}}
    if setting.cuda:
        ways[f"{ONE}, recorded"] = {"compile": False, "recorded": True}
    if setting.compile:
        ways[f"{ONE}, compiled"] = {"compile": True, "recorded": False}
    if setting.cuda and setting.compile:
        ways[f"{ONE}, compiled and recorded"] = {"compile": True, "recorded": True}
    for name, options in ways.items():
        variants[name] = Passes(base_runs(setting, 1), passes, **options)
    full = ways[name]  # all that the device gains from
    variants[name + DETERMINISTIC] = Passes(
        base_runs(setting, 1), passes, deterministic=True, **full
    )
    for name, stacked in ((setting.together, False), (STACKED, True)):
        variants[name] = Passes(base_runs(setting, many), passes, stacked=stacked, **full)
    together = (setting.together, STACKED)
    return variants, {name: many if name in together else 1 for name in variants}


def learnings(
    setting: Training, kind: type[LearnAlpha | LearnWeights]
) -> dict[str, Callable[[], object]]:
    """The same merged models, learned one after another and together."""
    a, b = network(setting, 0), network(setting, 1)
    images = random_images(setting, setting.images)
    passes, many = setting.repeats + UNTIMED, setting.models

    def prepared(count: int, passes: int) -> Passes:
        data = Paced(images, **augmented(setting))
        runs = [kind(a, b, data, lr=LR).run for _ in range(count)]
        return Passes(runs, passes, compile=setting.compile, recorded=setting.cuda)

    alone = prepared(1, many * passes)  # as much work as one after another, but compiled only once

    def one_at_a_time() -> None:
        for _ in range(many):
            alone()

    return {ALONE: one_at_a_time, setting.together: prepared(many, passes)}


def matrices(setting: Training) -> tuple[Callable[[], object], float]:
    """Products of large square matrices, and how many floating-point operations they are."""
    size, times = (8192, 50) if setting.cuda else (2048, 1)
    kind = torch.bfloat16 if setting.cuda else torch.float32
    x = torch.randn(size, size, device=setting.device, dtype=kind)
    return lambda: [x @ x for _ in range(times)][-1], 2.0 * times * size**3


def flop(setting: Training) -> int:
    """Floating-point operations of a training step an image, forward and backward."""
    (images, labels), *_ = Batches(random_images(setting, 2), **augmented(setting))
    model = network(setting, 0)
    with FlopCounterMode(display=False) as counter:
        cross_entropy(model(images), labels).backward()
    return counter.get_total_flops() // len(labels)


def measured(
    setting: Training, variants: dict[str, Callable[[], object]], models: dict[str, int]
) -> tuple[Seconds, Rows, float]:
    """The seconds of each round, the table (the first variant is its baseline), and the rate of matrix products."""
    device, first = torch.device(setting.device), {}
    for name, run in variants.items():
        start = time.perf_counter()
        run()
        synchronize(device)
        first[name] = time.perf_counter() - start
    product, operations = matrices(setting)
    seconds = interleaved({**variants, MATRICES: product}, setting)
    rates = [operations / t for t in seconds.pop(MATRICES)]
    images = {name: count * setting.images for name, count in models.items()}
    rows, work = summary(seconds, next(iter(variants)), images), flop(setting)
    for name, row in rows.items():
        done = [work * images[name] / t for t in seconds[name]]
        share = median(d / r for d, r in zip(done, rates, strict=True))
        row["extra"] = {"% of matrix rate": 100 * share, "first pass, s": first[name]}
    return seconds, rows, median(rates)


def compare_trainings(setting: Training, report: Report) -> None:
    many = setting.models
    variants, models = trainings(setting)
    seconds, rows, rate = measured(setting, variants, models)
    report.table(
        f"Training {setting.network}, batch {setting.batch_size}; together: {many} models", rows
    )
    kind = "bfloat16" if setting.cuda else "float32"
    report.note(
        f"A training step is {flop(setting) / 1e6:,.0f} MFLOP an image: convolutions and matrix products, forward and "
        f"backward. Large square matrix products in {kind} run at {rate / 1e9:,.0f} GFLOP/s here: the matrix rate."
    )
    (careful,) = (name for name in seconds if name.endswith(DETERMINISTIC))
    cost = beside(seconds, careful, careful.removesuffix(DETERMINISTIC))
    report.note(f"Deterministic kernels take {cost} times as long as the fastest ones.")
    cost = beside(seconds, STACKED, setting.together)
    report.note(f"{many} models stacked take {cost} times as long as {many} models as they are.")


def compare_learnings(setting: Training, report: Report) -> None:
    for kind, what in ((LearnAlpha, "Learning alpha"), (LearnWeights, "Fine-tuning")):
        ways = learnings(setting, kind)
        _, rows, _ = measured(setting, ways, dict.fromkeys(ways, setting.models))
        title = f"{what} of {setting.models} merged models on the same batches"
        report.table(f"{title}, {setting.network}, batch {setting.batch_size}", rows)


def main() -> None:
    # cuBLAS reads it at its first call in the process: later is too late for the deterministic row.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    parser = command_line(__doc__, batch_size=128, repeats=5)
    for option, text in (
        ("--models", "trained together; None: 4 on a CPU, 16 on CUDA"),
        ("--steps", "of each model in a round; None: 2 on a CPU, 100 on CUDA"),
        ("--workers", "of the DataLoader; None: 0 on a CPU, 8 on CUDA"),
    ):
        parser.add_argument(option, type=int, help=text)
    parser.add_argument(
        "--compile",
        action=argparse.BooleanOptionalAction,
        help="torch.compile too, which takes minutes; None: on CUDA only",
    )
    setting, report = begin(
        parser,
        Training,
        models=lambda cuda: max(4, models_at_once(torch.device("cuda" if cuda else "cpu"))),
        steps=lambda cuda: 100 if cuda else 2,
        workers=lambda cuda: 8 if cuda else 0,
        compile=lambda cuda: cuda,
    )
    compare_trainings(setting, report)
    compare_learnings(setting, report)
    report.write()


if __name__ == "__main__":
    main()
