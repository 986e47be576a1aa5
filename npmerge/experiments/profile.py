"""Profiles: the only difference between a laptop and a large GPU."""

from __future__ import annotations

from importlib.resources import files
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from npmerge.data import ImageNet200, ImageSet, load

NAMES = ("digits", "lite", "paper")


class Model(BaseModel):
    """A validated set of values that forbids unknown names and is not changed."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class RecipeValues(Model):
    """How base models are trained; see :class:`npmerge.zoo.Recipe`."""

    epochs: int = Field(gt=0)
    batch_size: int = Field(gt=1)
    lr: float = Field(gt=0)
    momentum: float = 0.9
    weight_decay: float = 5e-4
    warmup_epochs: float = Field(5, gt=0)
    schedule: Literal["cosine"] | None = None


class Setting(Model):
    """One column of a table: a data set, a network and its recipe.

    Attributes:
        beside: data set and model of the paper's column that the setting is shown beside.
        split: how the training images are shared out among the models; by default each sees all of them.
        images: cut the data to so many images, for a dry run; all by default.
    """

    dataset: Literal["digits", "cifar10", "cifar100", "imagenet200"]
    image_size: int
    model: Literal["vgg11", "resnet20", "resnet18"]
    width: float
    recipe: RecipeValues
    beside: tuple[str, str]
    split: Literal["80-20", "dirichlet"] | None = None
    images: int | None = None

    @property
    def model_name(self) -> str:
        """As in the paper's tables, e.g. ``"resnet20x8"``."""
        return f"{self.model}x{self.width:g}"

    @property
    def name(self) -> str:
        """In file names, e.g. ``"cifar100-resnet20x8"``."""
        return "-".join(filter(None, (self.dataset, self.model_name, self.split)))

    @property
    def column(self) -> str:
        """The split's name in the paper's tables."""
        return {"80-20": "split_80_20", "dirichlet": "dirichlet"}.get(self.split or "", "same")

    @property
    def topk(self) -> tuple[int, ...]:
        """The accuracies that the paper's table has."""
        return (1, 5) if self.dataset == "imagenet200" else (1,)

    def load(self) -> ImageSet | ImageNet200:
        """Load the data set."""
        data: ImageSet | ImageNet200
        if self.dataset == "imagenet200":
            data = ImageNet200(image_size=self.image_size)
        else:
            data = load(self.dataset, image_size=self.image_size)
        return data if self.images is None else data.first(self.images)


class Optimisation(Model):
    """How merged models are made; everything the methods take.

    Attributes:
        epochs: passes over the optimisation data, for NP Merge and fine-tuning.
        lr: Adam's learning rate for both [paper].
        batch_size: images a step.
        tuned_lrs: learning rates that the tuned fine-tuning control tries on held-out optimisation data.
        tuned_epochs: passes for each trial.
        held_out: fraction of every class of the optimisation data that choices are made on.
        ridges: CCA's ridges, added as they are to the activations' variances; chosen from on the same held-out data.
        path_points: models scored along a path, the ends included.
    """

    epochs: int = Field(10, gt=0)
    lr: float = Field(1e-2, gt=0)
    batch_size: int = Field(500, gt=1)
    tuned_lrs: tuple[float, ...]
    tuned_epochs: int = Field(gt=0)
    held_out: float = Field(0.1, gt=0, lt=1)
    ridges: tuple[float, ...]
    path_points: int = Field(11, gt=1)


class SameData(Model):
    """Section IV-B."""

    settings: tuple[Setting, ...]
    optimisation: Optimisation


class DisjointSplits(SameData):
    """Section IV-C; every setting has a split."""


class ImageNet(SameData):
    """Section IV-C, Table III; only where a profile has it."""


class DataSize(SameData):
    """Section IV-D.

    Attributes:
        examples_per_class: how many optimisation images a class; ``"all"`` for the whole training set.
    """

    examples_per_class: tuple[int | Literal["all"], ...]


class Cost(SameData):
    """Section IV-F; the settings differ in their width.

    Attributes:
        counts: how many models are merged in tournaments, in the narrowest setting; each at least 2.
    """

    counts: tuple[Annotated[int, Field(ge=2)], ...]


class ManyModels(SameData):
    """Section IV-E.

    Attributes:
        counts: how many models to merge into one.
        seeds: take at most so many of the seeds given.
    """

    counts: tuple[int, ...]
    seeds: int | None = Field(None, gt=0)


class Profile(Model):
    """A named set of parameters for every experiment.

    Attributes:
        name: ``"digits"``, ``"lite"`` or ``"paper"``.
        title: what a reader is told it is.
        threads: CPU threads of a unit, fixed where the numbers should not depend on how many cores there are; all by
            default.
        same_data, disjoint_splits, imagenet, data_size, many_models, cost: parameters of the experiments of those
            names.
    """

    name: str
    title: str
    threads: int | None = Field(None, gt=0)
    same_data: SameData
    disjoint_splits: DisjointSplits
    imagenet: ImageNet | None = None
    data_size: DataSize
    many_models: ManyModels
    cost: Cost


def load_profile(name: str) -> Profile:
    """Read a profile.

    Args:
        name: ``"digits"``, ``"lite"`` or ``"paper"``.

    Raises:
        ValueError: no such profile, or it holds an unknown name or a wrong value.
    """
    if name not in NAMES:
        raise ValueError(f"unknown profile {name!r}: choose one of {', '.join(NAMES)}")
    text = (files("npmerge.experiments") / "profiles" / f"{name}.yaml").read_text()
    values: dict[str, Any] = yaml.safe_load(text)
    try:
        return Profile(name=name, **values)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise ValueError(f"profile {name!r}, {where}: {first['msg']}") from error
