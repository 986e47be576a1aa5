"""Section IV-E, Figure 1: many models become one, in a tournament of pairs or all to one."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from npmerge import align
from npmerge.aggregate import finetune, mean, np_merge
from npmerge.align import Alignment
from npmerge.batchnorm import reset_batchnorm
from npmerge.data import Batches, plain_batches, train_batches
from npmerge.data.partition import holdout
from npmerge.evaluate import Score, score
from npmerge.experiments import merging
from npmerge.experiments.merging import Machine
from npmerge.experiments.profile import Optimisation, Profile, Setting
from npmerge.many import (
    Pairing,
    all_to_one,
    merge_many,
    put_away,
    score_ensemble,
    tournament,
)
from npmerge.results import Outcome, Unit
from npmerge.symmetry import symmetry
from npmerge.zoo import BaseModel, Zoo

NAME = "many_models"
FIGURE = "Figure 1"


def units(profile: Profile, seeds: Sequence[int]) -> list[Unit]:
    """The units of the experiment: every setting with every seed and every number of models.

    Args:
        profile: its parameters.
        seeds: of the split, of the models and of the pairings.
    """
    section = profile.many_models
    return [
        merging.unit(
            profile.name, NAME, setting, section.optimisation, seed,
            suffix=f"-{count}models", models=count,
        )
        for setting in section.settings
        for seed in seeds[: section.seeds]
        for count in sorted(section.counts, reverse=True)  # side by side, the longest should begin first
    ]  # fmt: skip


def base_models(unit: Unit) -> list[BaseModel]:
    """The base models of a unit.

    Args:
        unit: from :func:`units`.
    """
    return merging.base_models(unit, unit.config["models"])


def run(unit: Unit, *, zoo: Zoo, machine: Machine) -> Outcome:
    """Run one unit: all-to-one merging, tournaments with and without learning, the ensemble; the full test set.

    Two models are in memory at a time, whatever their number.

    Args:
        unit: from :func:`units`.
        zoo: where the base models are.
        machine: where to run.
    """
    with tempfile.TemporaryDirectory() as folder:
        many = _Many(unit, zoo, machine, Path(folder))
        many.score_parents()
        for method in ("permute", "weight_matching", "cca"):
            many.record(method, partial(many.all_to_one, method))
        many.record("merge_many", many.merge_many)
        for alignment in merging.LEARNED:
            many.record(f"tournament_{alignment}", partial(many.tournament, alignment, _average))
            many.record(f"np_{alignment}", partial(many.tournament, alignment, many.learn_alpha))
        many.record("finetune_permute", partial(many.tournament, "permute", many.learn_weights))
    return Outcome(many.records, many.details)


Merge = Callable[[nn.Module, nn.Module, Pairing], nn.Module]


class _Many:
    """Models that are loaded when they are needed, with the data to merge and score them.

    ``raw`` are the base models as the zoo has them; ``models``, in ``folder``, have the batch norm of all the data.
    """

    def __init__(self, unit: Unit, zoo: Zoo, machine: Machine, folder: Path) -> None:
        self.setting = Setting(**unit.config["setting"])
        self.options = Optimisation(**unit.config["optimisation"])
        self.seed, self.count, self.machine = unit.seed, unit.config["models"], machine
        self.data = self.setting.load()
        self.raw = zoo.loaders(
            base_models(unit), self.data, device=machine.device, at_once=machine.at_once,
            progress=machine.label("base models"),
        )  # fmt: skip
        self.train, self.test = self._plain("train"), self._plain("test")
        self.models = [
            put_away(reset_batchnorm(load(), self.train), folder / f"model{number}.safetensors")
            for number, load in enumerate(self.raw)
        ]
        self.groups = symmetry(self.raw[0](), self.data.example().to(machine.device))
        self.records: list[dict[str, Any]] = []
        self.details: dict[str, Any] = {"seconds": {}}

    def score_parents(self) -> None:
        """The base models on average, as trained and with the batch norm of all the data, and their ensemble."""
        for method, models in (("base_avg_no_reset", self.raw), ("base_avg", self.models)):
            self._record(method, [score(load(), self.test) for load in models])
        self._record("ensemble", [score_ensemble(self.models, self.test)])

    def record(self, method: str, merge: Callable[[], nn.Module]) -> None:
        """Merge by a method and record the score."""
        start = time.perf_counter()
        merged = merge()
        self.details["seconds"][method] = round(time.perf_counter() - start, 2)
        self._record(method, [score(merged, self.test)])

    def aligner(self, method: str) -> Callable[[nn.Module, nn.Module], Alignment]:
        """A function that aligns a model to another."""
        if method == "weight_matching":
            example = self.data.example().to(self.machine.device)
            return lambda a, b: align.weight_matching(
                a, b, example, groups=self.groups, seed=self.seed
            )
        if method == "permute":
            return lambda a, b: align.permute(a, b, self.train, groups=self.groups)
        ridge = self._ridge()
        return lambda a, b: align.cca(a, b, self.train, groups=self.groups, ridge=ridge)

    def all_to_one(self, alignment: str) -> nn.Module:
        """The mean of all models aligned to the first, batch norm reset."""
        return reset_batchnorm(all_to_one(self.models, self.aligner(alignment)), self.train)

    def merge_many(self) -> nn.Module:
        """Git Re-Basin's MergeMany, batch norm reset."""
        merged = merge_many(self.raw, seed=self.seed, groups=self.groups)
        return reset_batchnorm(merged, self.train)

    def tournament(self, alignment: str, merge: Merge) -> nn.Module:
        """A tournament in which each pair is aligned anew, merged, and its batch norm reset."""
        aligned = self.aligner(alignment)

        def match(a: nn.Module, b: nn.Module, pairing: Pairing) -> nn.Module:
            return reset_batchnorm(merge(a, aligned(a, b).apply(b), pairing), self.train)

        return tournament(self.models, match, seed=self.seed)

    def learn_alpha(self, a: nn.Module, b: nn.Module, pairing: Pairing) -> nn.Module:
        """NP Merge."""
        options = self.options
        return np_merge(
            a, b, self._shuffled(pairing), epochs=options.epochs, lr=options.lr,
            progress=self.machine.label(f"NP Merge, {pairing.label}"),
        ).model  # fmt: skip

    def learn_weights(self, a: nn.Module, b: nn.Module, pairing: Pairing) -> nn.Module:
        """Fine-tuning for as many steps."""
        options = self.options
        return finetune(
            a, b, self._shuffled(pairing), epochs=options.epochs, lr=options.lr,
            progress=self.machine.label(f"fine-tuning, {pairing.label}"),
        ).model  # fmt: skip

    def _ridge(self) -> float:
        """The ridge that merges the first two models best on held-out training images serves all."""
        kept, aside = holdout(self.data.train.labels, self.options.held_out, seed=self.seed)
        reset_data, scored = self._plain("train", kept), self._plain("train", aside)
        a, b = (load() for load in self.models[:2])
        statistics = align.covariances(a, b, self.train, groups=self.groups)
        best, self.details["ridge"] = merging.choose_ridge(
            a, b, statistics, self.options.ridges,
            lambda model: score(reset_batchnorm(model, reset_data), scored).top1,
        )  # fmt: skip
        return best

    def _plain(self, split: str, indices: Any = None) -> Batches:
        return plain_batches(
            self.data, split, self.options.batch_size, device=self.machine.device, indices=indices
        )

    def _shuffled(self, pairing: Pairing) -> Batches:
        return train_batches(
            self.data, self.options.batch_size, device=self.machine.device, seed=pairing.seed
        )

    def _record(self, method: str, found: Sequence[Score]) -> None:
        column = f"{self.setting.split or 'balanced'}, {self.count} models"
        self.records += merging.rows(self.setting, method, found, table=FIGURE, column=column)


def _average(a: nn.Module, b: nn.Module, _: Pairing) -> nn.Module:
    return mean(a, b)
