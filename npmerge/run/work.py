"""What a cell is: load or train its models, merge them, score the result on the full test set."""

from __future__ import annotations

import copy
import json
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from npmerge.align import Alignment, Covariances, covariances
from npmerge.catalogue import DATASETS
from npmerge.data import Batches, ImageData, load
from npmerge.data.partition import Partition, holdout, per_class
from npmerge.device import gains_from_bfloat16
from npmerge.evaluate import (
    Ensemble,
    PathPoint,
    Score,
    barrier,
    class_accuracy,
    path,
    score,
)
from npmerge.experiments.listing import RESET
from npmerge.many import Load
from npmerge.merging import Choice, HeldOut, Merged, Merger, merge
from npmerge.methods import METHODS, find
from npmerge.run.rehearsal import effort
from npmerge.store.artifacts import Artifacts
from npmerge.store.records import Cell, Outcome, Row
from npmerge.store.zoo import BaseModel, Recipe, Zoo

BINS = 20
"""Bins of alpha's histograms, over (0, 1)."""
LEARNING = 1_000_000
"""Added to a cell's seed for the order in which merged models see their data: base models have the small seeds."""


@dataclass(frozen=True)
class Bench:
    """Where and how a cell is done; its numbers do not depend on it but for rounding.

    Attributes:
        zoo: the base models.
        artifacts: what cells share.
        device: where to run.
        progress: show progress bars.
    """

    zoo: Zoo
    artifacts: Artifacts
    device: torch.device
    progress: bool = False

    @classmethod
    def at(cls, zoo: Zoo, device: torch.device, *, progress: bool = False) -> Bench:
        """A bench whose artifacts lie beside the base models."""
        return cls(zoo, Artifacts(zoo.folder / "artifacts"), device, progress)


def base_models(cell: Cell) -> list[BaseModel]:
    """The base models of a cell: equal but for their share of the data and the seed of weights, order and augmentation.

    Where models go to and fro in rounds, the untrained one that all begin from.

    Args:
        cell: from an experiment.
    """
    config, setting = cell.config, cell.config["setting"]
    models, split = config["models"], setting.get("split")
    first = BaseModel(
        setting["dataset"],
        setting["image_size"],
        setting["model"],
        setting["width"],
        Recipe(**setting["recipe"]),
        "same",
        seed=10 * cell.seed,
        threads=config["threads"],
        precision=config["precision"],
    )
    if "rounds" in config:
        return [replace(first, until=0)]
    together = setting.get("trunk")
    how = {name: setting[name] for name in ("concentration", "least", "apart") if name in setting}
    return [
        replace(
            first,
            partition=Partition(split, k, models, cell.seed, **how) if split else "same",
            seed=first.seed + k,
            trunk=None if together is None else replace(first, until=together),
        )
        for k in range(models)
    ]


def mixed_precision(config: Mapping[str, Any], device: torch.device) -> bool:
    """Whether a cell's models learn in bfloat16."""
    return config["precision"] == "auto" and gains_from_bfloat16(device)


def load_images(setting: Mapping[str, Any]) -> ImageData:
    """The image set of a cell's setting; the last ones are kept.

    Args:
        setting: of a cell's configuration.
    """
    return _images(setting["dataset"], setting["image_size"], setting.get("images"))


@lru_cache(maxsize=2)
def _images(name: str, image_size: int, images: int | None) -> ImageData:
    data = load(name, image_size=image_size)
    return data if images is None else data.first(images)


def do_cell(cell: Cell, bench: Bench) -> Outcome:
    """Do a cell.

    Args:
        cell: from an experiment.
        bench: where to do it.

    Returns:
        Its rows, details and seconds.
    """
    return Work(cell, bench).outcome()


class Work:
    """A cell's models and data; a base model that is missing is trained.

    Args:
        cell: from an experiment.
        bench: where to do it.

    Attributes:
        raw: functions that load the base models as they were trained.
    """

    def __init__(self, cell: Cell, bench: Bench) -> None:
        self.cell, self.config, self.bench = cell, cell.config, bench
        self.seed, self.device = cell.seed, bench.device
        self.setting: dict[str, Any] = cell.config["setting"]
        self.data = load_images(self.setting)
        self.bases = base_models(cell)
        self.raw: list[Load] = bench.zoo.loaders(
            self.bases, self.data, device=bench.device,
            progress="base models" if bench.progress else None,
        )  # fmt: skip
        given = self.config["data"]
        self.batch_size: int = given["batch_size"]
        examples = given["examples_per_class"]
        self.indices = (
            per_class(self.data.train.labels, examples, seed=self.seed)
            if isinstance(examples, int)
            else None
        )
        self.train = self.plain("train", self.indices)
        self.test = self.plain("test")
        self.topk = DATASETS[self.setting["dataset"]].topk
        self.details: dict[str, Any] = {}
        self.seconds = {"alignment": 0.0, "learning": 0.0, "reset": 0.0, "scoring": 0.0}

    def outcome(self) -> Outcome:
        """Merge and score, or score a reference."""
        if METHODS[self.config["aggregate"]["method"]].kind == "reference":
            found = self._reference()
            extra: dict[str, float] = {}
        else:
            model, extra = self.merged()
            found = self.scored(model)
            if self.config.get("measures", {}).get("effort"):
                extra |= effort(self.pair, self.train, self.options, self.device)
            if self.config.get("measures", {}).get("classes"):
                self.details["classes"] = {"accuracy": self._classes(model)}
        shutil.rmtree(self._saved, ignore_errors=True)
        values = {f"top{k}": percent for k, percent in found.accuracy.items()}
        rows = self.rows(values | {"loss": found.loss} | extra)
        return Outcome(rows, self.details, {k: round(v, 3) for k, v in self.seconds.items()})

    def rows(self, values: Mapping[str, float], **columns: Any) -> list[Row]:
        """The rows of some numbers.

        Args:
            values: by metric.
            columns: that differ from what the cell's configuration says.
        """
        config, align = self.config, self.config.get("align")
        aggregate = config.get("aggregate", {"method": "mean"})
        about = {
            "dataset": self.setting["dataset"],
            "image_size": self.setting["image_size"],
            "model": self.setting["model"],
            "width": self.setting["width"],
            "split": self.setting.get("split"),
            "models": config["models"],
            "many": config.get("many"),
            "align": align and align["method"],
            "aggregate": aggregate["method"],
            "tuned": any(map(_is_choice, aggregate.get("options", {}).values())),
            "correct": config["correct"],
            "examples_per_class": config["data"]["examples_per_class"],
        } | columns
        return [Row(**about, metric=metric, value=value) for metric, value in values.items()]

    @cached_property
    def corrected(self) -> list[Load]:
        """Functions that load the base models with the batch norm of all the optimisation data."""
        return [
            partial(self._corrected, digest, load)
            for digest, load in zip(self._digests, self.raw, strict=True)
        ]

    @cached_property
    def pair(self) -> tuple[nn.Module, nn.Module]:
        """Models A and B, corrected."""
        a, b = (load() for load in self.corrected)
        return a, b

    @cached_property
    def trunk(self) -> nn.Module | None:
        """What the base models have in common, if they were trained together at first."""
        trunk = self.bases[0].trunk
        if trunk is None:
            return None
        return self.bench.zoo.load(trunk, self.data, device=self.device)

    def alignment(self) -> Alignment:
        """B's alignment to A, made once for all cells that need it."""
        pair = self.pair  # what making it takes is no part of aligning
        config = {
            "pair": self._pair_config, "align": self.config["align"], "seed": self.seed,
            "held_out": self.config["data"]["held_out"],
        }  # fmt: skip

        def make() -> tuple[Alignment, dict[str, Any]]:
            merger = Merger(self.train, statistics=self.statistics, **self.options)
            return merger.align(*pair), merger.chosen

        alignment, chosen, seconds = self.bench.artifacts.alignment(config, make)
        self.seconds["alignment"] += seconds
        self._choose(chosen)
        return alignment

    def statistics(self) -> Covariances:
        """The second moments of A's and B's activations, made once for all cells that need them."""
        return self.bench.artifacts.statistics(
            self._pair_config, lambda: covariances(*self.pair, self.train)
        )

    @property
    def options(self) -> dict[str, Any]:
        """What :func:`~npmerge.merging.merge` is given."""
        config = self.config
        align, aggregate = config["align"], config["aggregate"]
        return {
            "align": align["method"],
            "aggregate": aggregate["method"],
            "correct": config["correct"],
            "align_options": _options(align),
            "aggregate_options": _options(aggregate),
            "base": self.trunk,
            "learn_on": lambda seed: self.shuffled(self.indices, seed),
            "held_out": self._held_out,
            "seed": self.seed,
            "mixed_precision": mixed_precision(config, self.device),
            "saved": self._saved,
            "progress": self.bench.progress,
        }

    def plain(self, split: str, indices: Tensor | None = None) -> Batches:
        """Images as they are."""
        return self.data.plain_batches(split, self.batch_size, device=self.device, indices=indices)

    def shuffled(self, indices: Tensor | None, seed: int) -> Batches:
        """Training images shuffled and augmented."""
        return self.data.train_batches(
            self.batch_size, device=self.device, indices=indices, seed=LEARNING + seed
        )

    def scored(self, model: nn.Module) -> Score:
        """A model's score on the full test set."""
        with self._scoring():
            return score(model, self.test, topk=self.topk)

    @contextmanager
    def _scoring(self) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds["scoring"] += time.perf_counter() - start

    def merged(self) -> tuple[nn.Module, dict[str, float]]:
        """The merged model, and what was measured on the way."""
        extra: dict[str, float] = {}
        if self.config["many"] is None:
            alignment = self.alignment()
            result = merge(self.pair, self.train, **self.options | {"align": alignment})
            if points := self.config.get("measures", {}).get("path"):
                extra["barrier"] = self._follow(alignment, points)
        else:
            result = merge(self.corrected, self.train, many=self.config["many"], **self.options)
        self._keep(result)
        return result.model, extra

    def _keep(self, result: Merged) -> None:
        for stage, seconds in result.seconds.items():
            self.seconds[stage] += seconds
        if result.history:
            self.details["history"] = result.history
        self._choose(result.chosen)
        for name, value in result.details.items():
            kept = _told(value)
            if kept is not None:
                self.details[name] = kept

    def _choose(self, chosen: Mapping[str, Any]) -> None:
        if chosen:
            self.details.setdefault("chosen", {}).update(chosen)

    def _follow(self, alignment: Alignment, points: int) -> float:
        """The loss barrier of the path between A and the aligned B."""
        a, b = self.pair
        merger = Merger(self.train, **self.options)
        with self._scoring():
            found: list[PathPoint] = path(
                a, alignment.apply(b), self.test, points=points, correct=merger.correct
            )
        self.details["path"] = [vars(point) for point in found]
        return barrier(found)

    def _reference(self) -> Score:
        method = self.config["aggregate"]["method"]
        models = self.raw if self.config["correct"] is None else self.corrected
        with self._scoring():
            found: Score = METHODS[method].function(models, self.test, topk=self.topk)
        if self.config.get("measures", {}).get("classes"):
            loaded = [load() for load in models]
            known = (
                [self._classes(model) for model in loaded]
                if method == "base_models"
                else self._classes(Ensemble(loaded))
            )
            self.details["classes"] = {"accuracy": known, "seen": self.seen(self.bases)}
        return found

    def _classes(self, model: nn.Module) -> list[float]:
        with self._scoring():
            values: list[float] = class_accuracy(model, self.test, self.data.classes).tolist()
        return values

    def seen(self, bases: Sequence[BaseModel]) -> list[list[int]]:
        """How many training images of each class some base models see.

        Args:
            bases: what they are functions of.
        """
        labels = self.data.train.labels
        return [
            torch.bincount(
                labels if base.partition == "same" else labels[base.partition.indices(labels)],
                minlength=self.data.classes,
            ).tolist()
            for base in bases
        ]

    @property
    def _saved(self) -> Path:
        """Where what is being learned is kept until it is scored."""
        return self.bench.artifacts.folder / f".{self.cell.config_hash}.training"

    @cached_property
    def _digests(self) -> list[str]:
        """What the base models are, to their last bits."""
        zoo = self.bench.zoo
        return [zoo.provenance(base, device=self.device)["digest"] for base in self.bases]

    def _corrected(self, digest: str, load: Load) -> nn.Module:
        correct = find(RESET, "correct")
        config = {"base": digest, "correct": correct.name, "data": self._data_config}
        model = load()
        made: nn.Module = self.bench.artifacts.model(
            config,
            model,
            lambda: correct.function(copy.deepcopy(model), self.shuffled(self.indices, self.seed)),
        )
        return made

    @property
    def _data_config(self) -> dict[str, Any]:
        setting = self.setting
        return {
            **{name: setting.get(name) for name in ("dataset", "image_size", "images")},
            "examples_per_class": self.config["data"]["examples_per_class"]
            if self.indices is not None
            else None,
            "batch_size": self.batch_size,
            "correct_on": self.config["data"]["correct_on"],
            "seed": self.seed,
        }

    @property
    def _pair_config(self) -> dict[str, Any]:
        return {
            "models": self._digests, "correct": RESET, "data": self._data_config,
        }  # fmt: skip

    @cached_property
    def _held_out(self) -> HeldOut:
        kept, aside = self._parts()
        return HeldOut(lambda seed: self.shuffled(kept, seed), self.plain("train", aside))

    def _parts(self) -> tuple[Tensor, Tensor]:
        """The optimisation data that is kept and that is held out."""
        labels, fraction = self.data.train.labels, self.config["data"]["held_out"]
        if self.indices is None:
            return holdout(labels, fraction, seed=self.seed)
        kept, aside = holdout(labels[self.indices], fraction, seed=self.seed)
        return self.indices[kept], self.indices[aside]


def _told(value: Any) -> Any:
    """What a record says of a detail: histograms of named tensors, what is plain as it is, and nothing of the rest."""
    if isinstance(value, Mapping) and all(isinstance(one, Tensor) for one in value.values()):
        return {key: histogram(tensor) for key, tensor in value.items()}
    try:
        json.dumps(value)
    except TypeError:  # models, functions, maps
        return None
    return value


def _is_choice(value: object) -> bool:
    return isinstance(value, dict) and "choose" in value


def _options(method: Mapping[str, Any]) -> dict[str, Any]:
    """A method's options as :func:`~npmerge.merging.merge` takes them."""
    return {
        name: Choice(tuple(value["choose"]), value["trial"]) if _is_choice(value) else value
        for name, value in method["options"].items()
    }


def histogram(values: Tensor) -> Sequence[int]:
    """How many values lie in each of :data:`BINS` equally wide parts of (0, 1).

    Args:
        values: of any shape.
    """
    counts: list[float] = torch.histc(
        values.detach().float().cpu(), bins=BINS, min=0, max=1
    ).tolist()
    return [int(count) for count in counts]
