"""Section IV-F: what NP Merge costs beside averaging and fine-tuning, and what it buys."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from itertools import accumulate, islice
from typing import Any, TypeVar

from torch import nn

from npmerge import align
from npmerge.aggregate import LearnAlpha, LearnWeights, mean
from npmerge.batchnorm import reset_batchnorm
from npmerge.data import train_batches
from npmerge.data.batches import Batches, Data
from npmerge.device import synchronize
from npmerge.evaluate import score
from npmerge.experiments import merging
from npmerge.experiments.merging import Machine, Merging, base_models
from npmerge.experiments.profile import Profile
from npmerge.many import Pairing, tournament
from npmerge.memory import Memory, allocated
from npmerge.results import Outcome, Unit
from npmerge.training import Run, TrainingError, fit_together
from npmerge.zoo import Zoo

__all__ = ["AVERAGE", "FINETUNE", "NAME", "NP", "base_models", "run", "units"]

NAME = "cost"
ALONE = True
"""No other unit runs beside one of these: they are timed."""
AVERAGE, NP, FINETUNE = "permute", "np_permute", "finetune_permute"
"""The methods that are measured, by the names they have in the tables."""
LEARNED: dict[str, type[LearnAlpha | LearnWeights]] = {NP: LearnAlpha, FINETUNE: LearnWeights}
MIB = 2**20
AVERAGES = 3
"""How often the average is made; its time is the median."""
FEW_IMAGES = 32
"""Images a batch for the memory of tournaments: on a CPU every allocation is recorded, in proportion to them."""
STEPS = 2
"""Steps until the memory of a step is that of every later one: the first makes the optimiser's buffers."""

T = TypeVar("T")


def units(profile: Profile, seeds: Sequence[int]) -> list[Unit]:
    """The units of the experiment: every setting, which differ in their width, with every seed.

    Where units run side by side (a profile that fixes their threads) only with the first seed: each more would
    disturb the others' times.

    Args:
        profile: its parameters.
        seeds: one pair of base models each.
    """
    section = profile.cost
    narrowest = min(setting.width for setting in section.settings)
    return [
        merging.unit(
            profile.name, NAME, setting, section.optimisation, seed,
            counts=list(section.counts) if setting.width == narrowest else [],
        )
        for setting in section.settings
        for seed in (seeds[:1] if profile.threads else seeds)
    ]  # fmt: skip


def run(unit: Unit, *, zoo: Zoo, machine: Machine) -> Outcome:
    """Run one unit: time, memory and accuracy of averaging, NP Merge and fine-tuning, all after Permute.

    Test accuracy is reported after every epoch; nothing is chosen by it.

    Args:
        unit: from :func:`units`.
        zoo: where the base models are.
        machine: where to run.
    """
    return _Cost(Merging.of(unit, zoo, machine, table=NAME)).outcome(unit.config["counts"])


class _Cost:
    """A pair of models with what is measured on it."""

    def __init__(self, pair: Merging) -> None:
        self.pair, self.device, self.options = pair, pair.machine.device, pair.options
        self.shuffled = train_batches(
            pair.data, self.options.batch_size, device=self.device, seed=1_000_000 + pair.seed
        )
        self.records: list[dict[str, Any]] = []
        self.details: dict[str, Any] = {}

    def outcome(self, counts: Sequence[int]) -> Outcome:
        """Measure memory, then time and accuracy, then tournaments of so many models."""
        a, b, data = self.pair.a, self.pair.b, self.pair.train
        few = list(islice(data, STEPS))
        self._memory(AVERAGE, allocated(lambda: _average(a, _aligned(a, b, few), few), self.device))
        aligned, before = self._timed(lambda: _aligned(a, b, data), times=AVERAGES)
        merged, after = self._timed(lambda: _average(a, aligned, data), times=AVERAGES)
        self.details["seconds"] = {"alignment": before, "average and batch norm": after}
        lr = self.options.lr
        for method, kind in LEARNED.items():
            used = allocated(partial(_steps, partial(kind, a, aligned, few, lr=lr)), self.device)
            self._memory(method, used)
        runs = {
            method: kind(a, aligned, self._again(), lr=lr).run for method, kind in LEARNED.items()
        }
        self._learn(runs, merged, before + after)
        for count in counts:
            self._tournament(count, few)
        return Outcome(self.records, self.details)

    def _again(self, seed: int | None = None) -> Batches:
        return self.shuffled.reseeded(self.shuffled.seed if seed is None else seed)

    def _learn(self, runs: dict[str, Run], merged: nn.Module, seconds: float) -> None:
        """Epochs of the methods in turns, so that what disturbs the machine meanwhile disturbs all alike."""
        took: dict[str, list[float]] = {method: [] for method in runs}
        first = self._scored(merged)
        found = {method: [first] for method in runs}
        for epoch in range(self.options.epochs):
            turns = list(runs.items())
            for method, one in turns if epoch % 2 == 0 else reversed(turns):
                label = self.pair.machine.label(f"{method}, epoch {epoch + 1}")
                _, spent = self._timed(partial(_epoch, one, progress=label))
                took[method].append(spent)
            for method, one in turns:
                copied = reset_batchnorm(copy.deepcopy(one.model), self.pair.train)
                found[method].append(self._scored(copied))
        self.details["epochs"] = took
        self.details["curves"] = {
            method: [
                {"epoch": epoch, "seconds": at} | scores
                for epoch, (at, scores) in enumerate(
                    zip(accumulate(took[method], initial=seconds), found[method], strict=True)
                )
            ]
            for method in runs
        }
        self._record(AVERAGE, first | {"seconds": seconds, "parameters": 0})
        for method, one in runs.items():
            end = self.details["curves"][method][-1]
            free = sum(p.numel() for p in one.model.parameters())
            values = {name: end[name] for name in ("top1", "loss", "seconds")}
            typical = statistics.median(took[method][1:] or took[method])
            self._record(method, values | {"seconds_per_epoch": typical, "parameters": free})

    def _tournament(self, count: int, few: Data) -> None:
        """Time and memory of an epoch for each pair; the models are copies, which costs what others cost."""
        pair, lr = self.pair, self.options.lr
        few = [(images[:FEW_IMAGES], labels[:FEW_IMAGES]) for images, labels in few]
        models = [partial(copy.deepcopy, (pair.a, pair.b)[k % 2]) for k in range(count)]

        def merge(a: nn.Module, b: nn.Module, pairing: Pairing, *, whole: bool) -> nn.Module:
            plain = pair.train if whole else few
            batches = self._again(pairing.seed) if whole else few
            learning = LearnAlpha(a, _aligned(a, b, plain), batches, lr=lr)
            return reset_batchnorm(learning.result(_epoch(learning.run)).model, plain)

        _, seconds = self._timed(
            lambda: tournament(models, partial(merge, whole=True), seed=pair.seed)
        )
        used = allocated(
            lambda: tournament(models, partial(merge, whole=False), seed=pair.seed), self.device
        )
        self._record(
            NP,
            {"merges": count - 1, "seconds": seconds, "peak_mib": used.peak / MIB},
            setting=f"tournament_{count}",
        )

    def _scored(self, model: nn.Module) -> dict[str, float]:
        found = score(model, self.pair.test)
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

    def _memory(self, method: str, used: Memory) -> None:
        self._record(method, {"held_mib": used.held / MIB, "peak_mib": used.peak / MIB})

    def _record(self, method: str, values: dict[str, float], setting: str | None = None) -> None:
        here = self.pair.setting
        self.records += [
            {
                "table": NAME,
                "dataset": here.dataset,
                "model": here.model_name,
                "setting": setting or here.column,
                "method": method,
                "examples_per_class": None,
                "metric": metric,
                "value": value,
            }
            for metric, value in values.items()
        ]


def _aligned(a: nn.Module, b: nn.Module, data: Data) -> nn.Module:
    return align.permute(a, b, data).apply(b)


def _average(a: nn.Module, aligned: nn.Module, data: Data) -> nn.Module:
    return reset_batchnorm(mean(a, aligned), data)


def _steps(begin: Callable[[], LearnAlpha | LearnWeights]) -> Run:
    """Take the steps that the data has, one by one: a recorded one keeps the memory of its intermediate results."""
    learning = begin()
    _epoch(learning.run, recorded=False)
    return learning.run


def _epoch(one: Run, *, recorded: bool | None = None, progress: str | None = None) -> list[float]:
    """An epoch by itself, which is never worth compiling for."""
    (history,) = fit_together([one], epochs=1, compile=False, recorded=recorded, progress=progress)
    if isinstance(history, TrainingError):
        raise history
    return history
