"""Section IV-B, Table I: two models trained on the same data from different initial weights."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from npmerge import align
from npmerge.aggregate import finetune, finetune_tuned, mean, np_merge
from npmerge.align import Alignment, Covariances
from npmerge.batchnorm import reset_batchnorm
from npmerge.data import Batches, ImageSet, load, plain_batches, train_batches
from npmerge.data.partition import holdout
from npmerge.evaluate import Ensemble, PathPoint, Score, path, score
from npmerge.experiments.profile import Optimisation, Profile, Setting
from npmerge.results import Outcome, Unit
from npmerge.symmetry import symmetry
from npmerge.zoo import BaseModel, Recipe, Zoo

log = logging.getLogger(__name__)

NAME = "same_data"
TABLE = "I"
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
                "setting": setting.model_dump(mode="json"),
                "optimisation": section.optimisation.model_dump(mode="json"),
                "seed": seed,
            },
        )
        for setting in section.settings
        for seed in seeds
    ]


def run(unit: Unit, *, zoo: Zoo, device: torch.device, progress: bool) -> Outcome:
    """Run one unit: train or load the pair, merge it by every method of Table I, score on the full test set.

    Args:
        unit: from :func:`units`.
        zoo: where the base models are.
        device: where to run.
        progress: show progress bars.
    """
    setting = Setting(**unit.config["setting"])
    options = Optimisation(**unit.config["optimisation"])
    data = load(setting.dataset, image_size=setting.image_size)
    pair = [zoo.get(base, data, device=device, progress=_label(progress, f"base model {base.seed}"))
            for base in base_models(setting, unit.seed)]  # fmt: skip
    return _Merging(setting, options, data, pair, unit.seed, device, progress).run()


def base_models(setting: Setting, seed: int) -> list[BaseModel]:
    """The two base models of a pair: equal but for the seed of weights, order and augmentation.

    Args:
        setting: data set, network and recipe.
        seed: of the pair.
    """
    recipe = Recipe(**setting.recipe.model_dump())
    return [
        BaseModel(
            setting.dataset,
            setting.image_size,
            setting.model,
            setting.width,
            recipe,
            "same",
            seed=10 * seed + k,
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
        progress: bool,
    ) -> None:
        self.setting, self.options, self.data = setting, options, data
        self.seed, self.device, self.progress = seed, device, progress
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
        for method, alignment in self._alignments().items():
            aligned = alignment.apply(b)
            self._timed(method, partial(mean, a, aligned))
            if method == "cca":
                continue
            self.details["paths"][method] = self._path(aligned)
            if method != "direct":
                self._learn(method, aligned)
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

    def _learn(self, method: str, aligned: nn.Module) -> None:
        options, a = self.options, self.a
        kept, _ = self._held_out()

        def learn_alpha() -> nn.Module:
            name = f"np_{method}"
            result = np_merge(
                a,
                aligned,
                self._shuffled(),
                epochs=options.epochs,
                lr=options.lr,
                progress=self._bar(name),
            )
            self.details["alpha"][name] = {
                key: _histogram(value) for key, value in result.alpha.items()
            }
            self.details["histories"][name] = result.history
            return result.model

        def tune() -> nn.Module:
            name = f"finetune_tuned_{method}"
            result = finetune_tuned(
                a, aligned, self._shuffled(), kept=self._shuffled(kept), validate=self._validation(),
                lrs=options.tuned_lrs, trial_epochs=options.tuned_epochs, epochs=options.epochs,
                progress=self._bar(name),
            )  # fmt: skip
            trials = {f"{lr:g}": value for lr, value in result.trials.items()}
            self.details.setdefault("tuned_lr", {})[name] = {"chosen": result.lr, "trials": trials}
            self.details["histories"][name] = result.history
            return result.model

        def train_all() -> nn.Module:
            name = f"finetune_{method}"
            result = finetune(
                a,
                aligned,
                self._shuffled(),
                epochs=options.epochs,
                lr=options.lr,
                progress=self._bar(name),
            )
            self.details["histories"][name] = result.history
            return result.model

        self._timed(f"np_{method}", learn_alpha)
        self._timed(f"finetune_{method}", train_all)
        self._timed(f"finetune_tuned_{method}", tune)

    def _timed(self, method: str, make: Callable[[], nn.Module]) -> None:
        start = time.perf_counter()
        model = reset_batchnorm(make(), self.train)
        self.details["seconds"][method] = round(time.perf_counter() - start, 2)
        self._record(method, self._score(model))

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

    def _bar(self, method: str) -> str | None:
        return _label(self.progress, method)

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
