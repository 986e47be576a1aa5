"""What the experiments share: one pair of models, merged by every method and scored on the full test set."""

from __future__ import annotations

import contextlib
import copy
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn

from npmerge import align
from npmerge.aggregate import (
    LearnAlpha,
    LearnWeights,
    NPMerge,
    finetune_tuned_together,
    learn_together,
    mean,
)
from npmerge.align import Alignment, Covariances
from npmerge.batchnorm import reset_batchnorm
from npmerge.data import Batches, ImageNet200, ImageSet, plain_batches, train_batches
from npmerge.data.partition import Partition, holdout, per_class
from npmerge.evaluate import Ensemble, PathPoint, Score, path, score
from npmerge.experiments.profile import Optimisation, SameData, Setting
from npmerge.results import Outcome, Unit
from npmerge.symmetry import symmetry
from npmerge.training import TrainingError
from npmerge.zoo import BaseModel, Recipe, Zoo

log = logging.getLogger(__name__)

LEARNED = ("permute", "weight_matching")
"""The alignments after which NP Merge and fine-tuning start."""
BINS = 20
"""Bins of alpha's histograms, over (0, 1)."""


@dataclass(frozen=True)
class Machine:
    """Where and how a unit runs; its numbers do not depend on it but for rounding.

    Attributes:
        device: where to run.
        at_once: models to train at the same time; by default as many as the device gains from.
        progress: show progress bars.
    """

    device: torch.device
    at_once: int | None = None
    progress: bool = False

    def label(self, text: str) -> str | None:
        """The label of a progress bar, if there is to be one."""
        return text if self.progress else None


def unit(
    profile: str,
    experiment: str,
    setting: Setting,
    optimisation: Optimisation,
    seed: int,
    *,
    suffix: str = "",
    **more: Any,
) -> Unit:
    """A unit of an experiment that merges models.

    Args:
        profile: name of the parameter set.
        experiment: its name.
        setting: data set, network, recipe and split.
        optimisation: how models are merged.
        seed: of the models.
        suffix: behind the setting's name, where an experiment has several units with one.
        more: what else its numbers are a function of.
    """
    config = {
        "setting": setting.model_dump(mode="json", exclude_none=True),
        "optimisation": optimisation.model_dump(mode="json"),
        "seed": seed,
        **more,
    }
    return Unit(profile, experiment, setting.name + suffix, seed, config)


def units(profile: str, experiment: str, section: SameData, seeds: Sequence[int]) -> list[Unit]:
    """The units of an experiment that has one for every setting and seed.

    Args:
        profile: name of the parameter set.
        experiment: its name.
        section: its parameters.
        seeds: of the models and of the split.
    """
    return [
        unit(profile, experiment, setting, section.optimisation, seed)
        for setting in section.settings
        for seed in seeds
    ]


def rows(
    setting: Setting,
    method: str,
    found: Sequence[Score],
    *,
    table: str,
    column: str,
    examples: int | str | None = None,
) -> list[dict[str, Any]]:
    """The records of a method's scores, averaged over models.

    Args:
        setting: where it was scored.
        method: its name.
        found: the score of each model.
        table: number of the paper's table or figure.
        column: the setting's name in it.
        examples: optimisation images a class, if the experiment varies them.
    """
    values = {f"top{k}": fmean(one.accuracy[k] for one in found) for k in setting.topk}
    log.info("%s, %s: top-1 %.2f%%", column, method, values["top1"])
    return [
        {
            "table": table,
            "dataset": setting.dataset,
            "model": setting.model_name,
            "setting": column,
            "method": method,
            "examples_per_class": examples,
            "metric": metric,
            "value": value,
        }
        for metric, value in (values | {"loss": fmean(one.loss for one in found)}).items()
    ]


def choose_ridge(
    a: nn.Module,
    b: nn.Module,
    covariances: Covariances,
    ridges: Sequence[float],
    validate: Callable[[nn.Module], float],
) -> tuple[float, dict[str, Any]]:
    """CCA's ridge that merges best on held-out training images; never on test data.

    Args:
        a: model A.
        b: model B.
        covariances: of their activations.
        ridges: to choose from.
        validate: scores a merged model, the higher the better.

    Returns:
        The ridge, and what the record's details keep of the choice.
    """
    trials = {
        ridge: validate(mean(a, align.cca_from_covariances(covariances, ridge=ridge).apply(b)))
        for ridge in ridges
    }
    best = max(trials, key=trials.__getitem__)
    return best, {"chosen": best, "trials": {f"{k:g}": v for k, v in trials.items()}}


def base_models(unit: Unit, models: int = 2) -> list[BaseModel]:
    """The base models of a unit: equal but for their share of the data and the seed of weights, order and augmentation.

    Args:
        unit: from :func:`unit`.
        models: how many.
    """
    setting = Setting(**unit.config["setting"])
    recipe = Recipe(**setting.recipe.model_dump())
    return [
        BaseModel(
            setting.dataset,
            setting.image_size,
            setting.model,
            setting.width,
            recipe,
            Partition(setting.split, k, models, unit.seed) if setting.split else "same",
            seed=10 * unit.seed + k,
        )
        for k in range(models)
    ]


class Merging:
    """A pair of models with the data to merge and score them.

    Args:
        unit: from :func:`unit`.
        machine: where to run.
        data: the image set.
        pair: models A and B as they were trained.
        table: number of the paper's table.
        examples: optimisation images a class; ``None`` for all of them, without a word of it in the records.
    """

    def __init__(
        self,
        unit: Unit,
        machine: Machine,
        data: ImageSet | ImageNet200,
        pair: Sequence[nn.Module],
        *,
        table: str,
        examples: int | str | None = None,
    ) -> None:
        self.setting = Setting(**unit.config["setting"])
        self.options = Optimisation(**unit.config["optimisation"])
        self.machine, self.data, self.seed = machine, data, unit.seed
        self.table, self.examples = table, examples
        self.indices = (
            per_class(data.train.labels, examples, seed=self.seed)
            if isinstance(examples, int)
            else None
        )
        self.train = self._plain("train", self.indices)
        self.test = self._plain("test")
        self.records: list[dict[str, Any]] = []
        self.details: dict[str, Any] = {"seconds": {}, "paths": {}, "alpha": {}, "histories": {}}
        self.pair = pair
        self.a, self.b = (reset_batchnorm(copy.deepcopy(model), self.train) for model in pair)

    @classmethod
    def of(
        cls,
        unit: Unit,
        zoo: Zoo,
        machine: Machine,
        *,
        table: str,
        examples: int | str | None = None,
    ) -> Merging:
        """Load or train the unit's pair.

        Args:
            unit: from :func:`unit`.
            zoo: where the base models are.
            machine: where to run.
            table: number of the paper's table.
            examples: optimisation images a class.
        """
        data = Setting(**unit.config["setting"]).load()
        pair = zoo.get_all(
            base_models(unit), data, device=machine.device, at_once=machine.at_once,
            progress=machine.label("base models"),
        )  # fmt: skip
        return cls(unit, machine, data, pair, table=table, examples=examples)

    def outcome(self) -> Outcome:
        """What was recorded."""
        return Outcome(self.records, self.details)

    def score_parents(self) -> None:
        """Score the base models, before and after the batch norm reset, and their ensemble."""
        self._record_mean("base_avg_no_reset", [self._score(model) for model in self.pair])
        self._record_mean("base_avg", [self._score(model) for model in (self.a, self.b)])
        self._record_mean("ensemble", [self._score(Ensemble([self.a, self.b]))])

    def every_method(self, *, paths: bool = True) -> dict[str, nn.Module]:
        """Record the parents, and every method of the paper's tables with the tuned control.

        Args:
            paths: follow the paths between the models too.

        Returns:
            The models merged by averaging, NP Merge and fine-tuning.
        """
        self.score_parents()
        aligned = self.align(["direct", "permute", "weight_matching", "cca"])
        merged = self.average(aligned)
        if paths:
            self.follow({method: aligned[method] for method in ("direct", *LEARNED)})
        learned = {method: aligned[method] for method in LEARNED}
        merged |= self.learn(learned)
        self.tune(learned)
        return merged

    def align(self, methods: Sequence[str]) -> dict[str, nn.Module]:
        """Model B aligned by each method.

        Args:
            methods: from ``direct``, ``permute``, ``weight_matching`` and ``cca``.
        """
        example = self.data.example().to(self.machine.device)
        groups = symmetry(self.a, example)
        statistics = align.covariances(
            self.a, self.b, self.train, groups=groups, variances_only="cca" not in methods
        )  # one pass serves two methods
        ways: dict[str, Callable[[], Alignment]] = {
            "direct": lambda: align.identity(self.a, self.b, example, groups=groups),
            "permute": lambda: align.permute_from_covariances(statistics),
            "weight_matching": lambda: align.weight_matching(
                self.a, self.b, example, groups=groups, seed=self.seed
            ),
            "cca": lambda: self._cca(statistics),
        }
        return {method: ways[method]().apply(self.b) for method in methods}

    def average(self, aligned: dict[str, nn.Module]) -> dict[str, nn.Module]:
        """Record the plain mean after each alignment.

        Args:
            aligned: from :meth:`align`.

        Returns:
            The merged models.
        """
        merged = {}
        for method, moved in aligned.items():
            with self._timed(method):
                merged[method] = self._record_merged(method, mean(self.a, moved))
        return merged

    def follow(self, aligned: dict[str, nn.Module]) -> None:
        """Record the path between the models.

        Args:
            aligned: from :meth:`align`.
        """
        for method, moved in aligned.items():
            points: list[PathPoint] = path(
                self.a, moved, self.test, points=self.options.path_points, reset_data=self.train
            )
            self.details["paths"][method] = [asdict(point) for point in points]

    def learn(self, aligned: dict[str, nn.Module]) -> dict[str, nn.Module]:
        """Record NP Merge and fine-tuning at the paper's learning rate, all on the same batches.

        Args:
            aligned: from :meth:`align`.

        Returns:
            The merged models.
        """
        data, lr = self._shuffled(self.indices), self.options.lr
        learnings: dict[str, LearnAlpha | LearnWeights] = {}
        for method, moved in aligned.items():
            learnings[f"np_{method}"] = LearnAlpha(self.a, moved, data, lr=lr)
            learnings[f"finetune_{method}"] = LearnWeights(self.a, moved, data, lr=lr)
        merged = {}
        with self._timed("learning"):
            found = learn_together(
                list[Any](learnings.values()), epochs=self.options.epochs,
                at_once=self.machine.at_once, progress=self.machine.label("learning"),
            )  # fmt: skip
        for name, result in zip(learnings, found, strict=True):
            if isinstance(result, TrainingError):
                raise result
            self.details["histories"][name] = result.history
            if isinstance(result, NPMerge):
                self.details["alpha"][name] = {k: _histogram(v) for k, v in result.alpha.items()}
            merged[name] = self._record_merged(name, result.model)
        return merged

    def tune(self, aligned: dict[str, nn.Module]) -> None:
        """Record fine-tuning with a learning rate chosen on held-out optimisation data.

        Args:
            aligned: from :meth:`align`.
        """
        kept, _ = self._held_out()
        options = self.options
        with self._timed("tuned fine-tuning"):
            found = finetune_tuned_together(
                [(self.a, moved) for moved in aligned.values()], self._shuffled(self.indices),
                kept=self._shuffled(kept), validate=self._validation(), lrs=options.tuned_lrs,
                trial_epochs=options.tuned_epochs, epochs=options.epochs,
                at_once=self.machine.at_once, progress=self.machine.label("tuned fine-tuning"),
            )  # fmt: skip
        for method, result in zip(aligned, found, strict=True):
            name = f"finetune_tuned_{method}"
            trials = {f"{lr:g}": value for lr, value in result.trials.items()}
            self.details.setdefault("tuned_lr", {})[name] = {"chosen": result.lr, "trials": trials}
            self.details["histories"][name] = result.history
            self._record_merged(name, result.model)

    def _cca(self, covariances: Covariances) -> Alignment:
        best, self.details["ridge"] = choose_ridge(
            self.a, self.b, covariances, self.options.ridges, self._validation()
        )
        return align.cca_from_covariances(covariances, ridge=best)

    @contextlib.contextmanager
    def _timed(self, stage: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.details["seconds"][stage] = round(time.perf_counter() - start, 2)

    def _record_merged(self, method: str, model: nn.Module) -> nn.Module:
        self._record_mean(method, [self._score(reset_batchnorm(model, self.train))])
        return model

    def _score(self, model: nn.Module) -> Score:
        return score(model, self.test, topk=self.setting.topk)

    def _validation(self) -> Callable[[nn.Module], float]:
        kept, held_out = self._held_out()
        reset_data, scored = self._plain("train", kept), self._plain("train", held_out)
        return lambda model: score(reset_batchnorm(model, reset_data), scored).top1

    def _held_out(self) -> tuple[Tensor, Tensor]:
        labels = self.data.train.labels
        if self.indices is None:
            return holdout(labels, self.options.held_out, seed=self.seed)
        kept, aside = holdout(labels[self.indices], self.options.held_out, seed=self.seed)
        return self.indices[kept], self.indices[aside]

    def _plain(self, split: str, indices: Tensor | None = None) -> Batches:
        return plain_batches(
            self.data, split, self.options.batch_size, device=self.machine.device, indices=indices
        )

    def _shuffled(self, indices: Tensor | None = None) -> Batches:
        return train_batches(
            self.data,
            self.options.batch_size,
            device=self.machine.device,
            indices=indices,
            seed=1_000_000 + self.seed,
        )

    def _record_mean(self, method: str, found: Sequence[Score]) -> None:
        self.records += rows(
            self.setting, method, found,
            table=self.table, column=self.setting.column, examples=self.examples,
        )  # fmt: skip


def _histogram(alpha: Tensor) -> list[int]:
    return [
        int(n) for n in torch.histc(alpha.detach().float().cpu(), bins=BINS, min=0, max=1).tolist()
    ]
