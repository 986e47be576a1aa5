"""What NP Merge costs beside averaging and fine-tuning: time, memory and accuracy, all after Permute."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable
from functools import partial
from itertools import accumulate, islice
from typing import Any, TypeVar

from torch import nn

from npmerge.aggregate import learning_alpha, learning_weights, mean
from npmerge.align import permute
from npmerge.correct import reset_batchnorm
from npmerge.data.streams import Data
from npmerge.device import synchronize
from npmerge.evaluate import score
from npmerge.many import tournament
from npmerge.memory import Memory, allocated
from npmerge.merging import Merger
from npmerge.run.work import Bench, Work, mixed_precision
from npmerge.store.records import Cell, Outcome, Row
from npmerge.training import Optimizer, fit

AVERAGE, NP, FINETUNE = "mean", "np_merge", "finetune"
"""The aggregations that are measured."""
LEARNING: dict[str, Callable[..., tuple[nn.Module, Optimizer]]] = {
    NP: learning_alpha,
    FINETUNE: learning_weights,
}
MIB = 2**20
AVERAGES = 3
"""How often the average is made; its time is the median."""
FEW_IMAGES = 32
"""Images a batch for the memory of tournaments: on a CPU every allocation is recorded, in proportion to them."""
STEPS = 2
"""Steps until the memory of a step is that of every later one: the first makes the optimiser's buffers."""

T = TypeVar("T")


def measure(cell: Cell, bench: Bench) -> Outcome:
    """Measure a pair, or a tournament of so many models.

    Test accuracy is reported after every epoch; nothing is chosen by it.

    Args:
        cell: of the experiment ``cost``.
        bench: where to do it.
    """
    costs = _Costs(cell, bench)
    return costs.tournament() if cell.config.get("many") else costs.pair()


class _Costs:
    """A pair of models with what is measured on it."""

    def __init__(self, cell: Cell, bench: Bench) -> None:
        self.work = Work(cell, bench)
        self.device, self.lr = bench.device, cell.config["lr"]
        self.count = cell.config.get("copies", 2)
        self.mixed = mixed_precision(cell.config, bench.device)
        self.rows: list[Row] = []
        self.details: dict[str, Any] = {}

    def pair(self) -> Outcome:
        """Memory, then time and accuracy."""
        (a, b), data = self.work.pair, self.work.train
        few = list(islice(data, STEPS))
        self._memory(AVERAGE, self._allocated(lambda: _average(a, _aligned(a, b, few), few)))
        aligned, before = self._timed(lambda: _aligned(a, b, data), times=AVERAGES)
        seen = self.work.shuffled(None, self.work.seed)
        merged, after = self._timed(lambda: _average(a, aligned, seen), times=AVERAGES)
        self.details["seconds"] = {"alignment": before, "average and batch norm": after}
        for method, begin in LEARNING.items():
            self._memory(method, self._allocated(partial(self._steps, begin, aligned, few)))
        self._learn(aligned, merged, before + after)
        return self._outcome()

    def tournament(self) -> Outcome:
        """Time and memory of an epoch for each pair; the models are copies, which costs what others cost."""
        (a, b), data, seed = self.work.pair, self.work.train, self.work.seed
        few = [(x[:FEW_IMAGES], y[:FEW_IMAGES]) for x, y in islice(data, STEPS)]
        models = [partial(copy.deepcopy, (a, b)[k % 2]) for k in range(self.count)]

        def all_merged(plain: Data, learn_on: Data | Callable[[int], Data]) -> nn.Module:
            merger = Merger(
                plain,
                learn_on=learn_on,
                seed=seed,
                aggregate_options={"epochs": 1, "lr": self.lr},
                mixed_precision=self.mixed,
            )
            return tournament(
                models, lambda x, y, pairing: merger.merge(x, y, pairing.seed), seed=seed
            )

        _, seconds = self._timed(lambda: all_merged(data, partial(self.work.shuffled, None)))
        used = self._allocated(lambda: all_merged(few, few))
        values = {"merges": self.count - 1, "seconds": seconds, "peak_mib": used.peak / MIB}
        self._record(NP, values, many="tournament", models=self.count)
        return self._outcome()

    def _learn(self, aligned: nn.Module, merged: nn.Module, seconds: float) -> None:
        """Epochs of the methods in turns, so that what disturbs the machine meanwhile disturbs all alike."""
        a = self.work.pair[0]
        begun = {method: begin(a, aligned, lr=self.lr) for method, begin in LEARNING.items()}
        data = {method: self.work.shuffled(None, self.work.seed) for method in LEARNING}
        took: dict[str, list[float]] = {method: [] for method in LEARNING}
        first = self._scored(merged)
        found = {method: [first] for method in LEARNING}
        for epoch in range(self.work.config["epochs"]):
            turns = list(begun.items())
            for method, one in turns if epoch % 2 == 0 else reversed(turns):
                _, spent = self._timed(partial(self._epoch, *one, data[method]))
                took[method].append(spent)
            for method, (model, _) in turns:
                seen = self.work.shuffled(None, self.work.seed)
                copied = reset_batchnorm(copy.deepcopy(model), seen)
                found[method].append(self._scored(copied))
        self.details["epochs"] = took
        self.details["curves"] = {
            method: [
                {"epoch": epoch, "seconds": at} | scores
                for epoch, (at, scores) in enumerate(
                    zip(accumulate(took[method], initial=seconds), found[method], strict=True)
                )
            ]
            for method in LEARNING
        }
        self._record(AVERAGE, first | {"seconds": seconds, "parameters": 0})
        for method, (model, _) in begun.items():
            end = self.details["curves"][method][-1]
            free = sum(p.numel() for p in model.parameters())
            values = {name: end[name] for name in ("top1", "loss", "seconds")}
            typical = statistics.median(took[method][1:] or took[method])
            self._record(method, values | {"seconds_per_epoch": typical, "parameters": free})

    def _steps(
        self, begin: Callable[..., tuple[nn.Module, Optimizer]], aligned: nn.Module, few: Data
    ) -> object:
        begun = begin(self.work.pair[0], aligned, lr=self.lr)
        self._epoch(*begun, few)
        return begun

    def _epoch(self, model: nn.Module, optimizer: Optimizer, data: Data) -> list[float]:
        return fit(model, data, optimizer, epochs=1, mixed_precision=self.mixed)

    def _scored(self, model: nn.Module) -> dict[str, float]:
        found = score(model, self.work.test)
        return {"top1": found.top1, "loss": found.loss}

    def _timed(self, work: Callable[[], T], *, times: int = 1) -> tuple[T, float]:
        """Do some work so many times over: the last result and the median of the seconds."""
        took = []
        for _ in range(times):
            synchronize(self.device)
            start = time.perf_counter()
            result = work()
            synchronize(self.device)
            took.append(time.perf_counter() - start)
        return result, statistics.median(took)

    def _allocated(self, work: Callable[[], object]) -> Memory:
        return allocated(work, self.device)

    def _memory(self, method: str, used: Memory) -> None:
        self._record(method, {"held_mib": used.held / MIB, "peak_mib": used.peak / MIB})

    def _record(self, method: str, values: dict[str, float], **columns: Any) -> None:
        self.rows += self.work.rows(values, aggregate=method, tuned=False, **columns)

    def _outcome(self) -> Outcome:
        return Outcome(self.rows, self.details, self.work.seconds)


def _aligned(a: nn.Module, b: nn.Module, data: Data) -> nn.Module:
    return permute(a, b, data).apply(b)


def _average(a: nn.Module, aligned: nn.Module, data: Data) -> nn.Module:
    return reset_batchnorm(mean(a, aligned), data)
