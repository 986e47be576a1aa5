"""Profiles: the only difference between a laptop and a large GPU."""

from __future__ import annotations

from importlib.resources import files
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from npmerge.data import ImageSet, load

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


class Setting(Model):
    """One column of a table: a data set, a network and its recipe.

    Attributes:
        beside: data set and model of the paper's column that the setting is shown beside.
        images: cut the data to so many images, for a dry run; all by default.
    """

    dataset: Literal["digits", "cifar10", "cifar100"]
    image_size: int
    model: Literal["vgg11", "resnet20"]
    width: float
    recipe: RecipeValues
    beside: tuple[str, str]
    images: int | None = None

    @property
    def model_name(self) -> str:
        """As in the paper's tables, e.g. ``"resnet20x8"``."""
        return f"{self.model}x{self.width:g}"

    @property
    def name(self) -> str:
        """In file names, e.g. ``"cifar100-resnet20x8"``."""
        return f"{self.dataset}-{self.model_name}"

    def load(self) -> ImageSet:
        """Load the data set."""
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


class Profile(Model):
    """A named set of parameters for every experiment.

    Attributes:
        name: ``"digits"``, ``"lite"`` or ``"paper"``.
        title: what a reader is told it is.
        threads: CPU threads of a unit, fixed where the numbers should not depend on how many cores there are; all by
            default.
        same_data: parameters of the experiment of that name.
    """

    name: str
    title: str
    threads: int | None = Field(None, gt=0)
    same_data: SameData


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
