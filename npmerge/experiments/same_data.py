"""Section IV-B, Table I: two models trained on the same data from different initial weights."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
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
from npmerge.data import Batches, ImageSet, plain_batches, train_batches
from npmerge.data.partition import holdout
from npmerge.evaluate import Ensemble, PathPoint, Score, path, score
from npmerge.experiments.profile import Optimisation, Profile, Setting
from npmerge.results import Outcome, Unit
from npmerge.symmetry import symmetry
from npmerge.training import TrainingError
from npmerge.zoo import BaseModel, Recipe, Zoo

log = logging.getLogger(__name__)

NAME = "same_data"
TABLE = "I"
LEARNED = ("permute", "weight_matching")
"""The alignments after which NP Merge and fine-tuning start."""
BINS = 20
"""Bins of alpha's histograms, over (0, 1)."""


def units(profile: Profile, seeds: Sequence[int]) -> list[Unit]:
    """The units of the experiment: every setting with every seed.

    Args:
        profile: its parameters.
        seeds: one pair of base models each.
    """
    section = profile.same_data
    return [
        Unit(
            profile.name,
            NAME,
            setting.name,
            seed,
            {
                "setting": setting.model_dump(mode="json", exclude_none=True),
                "optimisation": section.optimisation.model_dump(mode="json"),
                "seed": seed,
            },
        )
        for setting in section.settings
        for seed in seeds
    ]


def run(
    unit: Unit, *, zoo: Zoo, device: torch.device, at_once: int | None, progress: bool
) -> Outcome:
    """Run one unit: train or load the pair, merge it by every method of Table I, score on the full test set.

    Args:
        unit: from :func:`units`.
        zoo: where the base models are.
        device: where to run.
        at_once: models to train at the same time; by default as many as the device gains from.
        progress: show progress bars.
    """
    setting = Setting(**unit.config["setting"])
    options = Optimisation(**unit.config["optimisation"])
    data = setting.load()
    pair = zoo.get_all(
        base_models(unit), data, device=device, at_once=at_once,
        progress=_label(progress, "base models"),
    )  # fmt: skip
    return _Merging(setting, options, data, pair, unit.seed, device, at_once, progress).run()


def base_models(unit: Unit) -> list[BaseModel]:
    """The two base models of a pair: equal but for the seed of weights, order and augmentation.

    Args:
        unit: from :func:`units`.
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
            "same",
            seed=10 * unit.seed + k,
        )
        for k in range(2)
    ]


class _Merging:
    """One pair of models with the data to merge and score it."""

    def __init__(
        self,
        setting: Setting,
        options: Optimisation,
        data: ImageSet,
        pair: Sequence[nn.Module],
        seed: int,
        device: torch.device,
        at_once: int | None,
        progress: bool,
    ) -> None:
        self.setting, self.options, self.data = setting, options, data
        self.seed, self.device, self.at_once, self.progress = seed, device, at_once, progress
        self.train = self._plain("train")
        self.test = self._plain("test")
        self.records: list[dict[str, Any]] = []
        self.details: dict[str, Any] = {"seconds": {}, "paths": {}, "alpha": {}, "histories": {}}
        self._score_bases(pair)
        self.a, self.b = (reset_batchnorm(model, self.train) for model in pair)

    def run(self) -> Outcome:
        """All methods of the table."""
        a, b = self.a, self.b
        self._record_mean("base_avg", [self._score(model) for model in (a, b)])
        self._record("ensemble", score(Ensemble([a, b]), self.test))
        aligned = {method: alignment.apply(b) for method, alignment in self._alignments().items()}
        for method, moved in aligned.items():
            with self._timed(method):
                self._record_merged(method, mean(a, moved))
            if method != "cca":
                self.details["paths"][method] = self._path(moved)
        learned = {method: aligned[method] for method in LEARNED}
        with self._timed("learning"):
            self._learn(learned)
        with self._timed("tuned fine-tuning"):
            self._tune(learned)
        return Outcome(self.records, self.details)

    def _alignments(self) -> dict[str, Alignment]:
        example = self.data.example().to(self.device)
        groups = symmetry(self.a, example)
        statistics = align.covariances(
            self.a, self.b, self.train, groups=groups
        )  # one pass serves two methods
        return {
            "direct": align.identity(self.a, self.b, example, groups=groups),
            "permute": align.permute_from_covariances(statistics),
            "weight_matching": align.weight_matching(
                self.a, self.b, example, groups=groups, seed=self.seed
            ),
            "cca": self._cca(statistics),
        }

    def _cca(self, covariances: Covariances) -> Alignment:
        """CCA with the ridge that merges best on held-out training images; never on test data."""
        validate = self._validation()
        trials = {}
        for ridge in self.options.ridges:
            candidate = align.cca_from_covariances(covariances, ridge=ridge)
            trials[ridge] = validate(mean(self.a, candidate.apply(self.b)))
        best = max(trials, key=lambda ridge: trials[ridge])
        self.details["ridge"] = {"chosen": best, "trials": {f"{k:g}": v for k, v in trials.items()}}
        return align.cca_from_covariances(covariances, ridge=best)

    def _learn(self, aligned: dict[str, nn.Module]) -> None:
        """NP Merge and fine-tuning at the paper's learning rate, all on the same batches."""
        data, lr = self._shuffled(), self.options.lr
        learnings: dict[str, LearnAlpha | LearnWeights] = {}
        for method, moved in aligned.items():
            learnings[f"np_{method}"] = LearnAlpha(self.a, moved, data, lr=lr)
            learnings[f"finetune_{method}"] = LearnWeights(self.a, moved, data, lr=lr)
        found = learn_together(
            list[Any](learnings.values()), epochs=self.options.epochs, at_once=self.at_once,
            progress=_label(self.progress, "learning"),
        )  # fmt: skip
        for name, result in zip(learnings, found, strict=True):
            if isinstance(result, TrainingError):
                raise result
            self.details["histories"][name] = result.history
            if isinstance(result, NPMerge):
                self.details["alpha"][name] = {k: _histogram(v) for k, v in result.alpha.items()}
            self._record_merged(name, result.model)

    def _tune(self, aligned: dict[str, nn.Module]) -> None:
        kept, _ = self._held_out()
        options = self.options
        found = finetune_tuned_together(
            [(self.a, moved) for moved in aligned.values()], self._shuffled(),
            kept=self._shuffled(kept), validate=self._validation(), lrs=options.tuned_lrs,
            trial_epochs=options.tuned_epochs, epochs=options.epochs, at_once=self.at_once,
            progress=_label(self.progress, "tuned fine-tuning"),
        )  # fmt: skip
        for method, result in zip(aligned, found, strict=True):
            name = f"finetune_tuned_{method}"
            trials = {f"{lr:g}": value for lr, value in result.trials.items()}
            self.details.setdefault("tuned_lr", {})[name] = {"chosen": result.lr, "trials": trials}
            self.details["histories"][name] = result.history
            self._record_merged(name, result.model)

    @contextlib.contextmanager
    def _timed(self, stage: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.details["seconds"][stage] = round(time.perf_counter() - start, 2)

    def _record_merged(self, method: str, model: nn.Module) -> None:
        self._record(method, self._score(reset_batchnorm(model, self.train)))

    def _path(self, aligned: nn.Module) -> list[dict[str, float]]:
        points: list[PathPoint] = path(
            self.a, aligned, self.test, points=self.options.path_points, reset_data=self.train
        )
        return [asdict(point) for point in points]

    def _score(self, model: nn.Module) -> Score:
        return score(model, self.test)

    def _score_bases(self, pair: Sequence[nn.Module]) -> None:
        self._record_mean("base_avg_no_reset", [self._score(model) for model in pair])

    def _validation(self) -> Callable[[nn.Module], float]:
        kept, held_out = self._held_out()
        reset_data, scored = self._plain("train", kept), self._plain("train", held_out)
        return lambda model: score(reset_batchnorm(model, reset_data), scored).top1

    def _held_out(self) -> tuple[Tensor, Tensor]:
        return holdout(self.data.train.labels, self.options.held_out, seed=self.seed)

    def _plain(self, split: str, indices: Tensor | None = None) -> Batches:
        return plain_batches(
            self.data, split, self.options.batch_size, device=self.device, indices=indices
        )

    def _shuffled(self, indices: Tensor | None = None) -> Batches:
        return train_batches(
            self.data,
            self.options.batch_size,
            device=self.device,
            indices=indices,
            seed=1_000_000 + self.seed,
        )

    def _record(self, method: str, found: Score) -> None:
        self._record_mean(method, [found])

    def _record_mean(self, method: str, found: Sequence[Score]) -> None:
        values = {
            "top1": sum(one.top1 for one in found) / len(found),
            "loss": sum(one.loss for one in found) / len(found),
        }
        log.info("%s: top-1 %.2f%%", method, values["top1"])
        self.records += [
            {
                "table": TABLE,
                "dataset": self.setting.dataset,
                "model": self.setting.model_name,
                "setting": "same",
                "method": method,
                "examples_per_class": None,
                "metric": metric,
                "value": value,
            }
            for metric, value in values.items()
        ]


def _histogram(alpha: Tensor) -> list[int]:
    return [
        int(n) for n in torch.histc(alpha.detach().float().cpu(), bins=BINS, min=0, max=1).tolist()
    ]


def _label(progress: bool, text: str) -> str | None:
    return text if progress else None
