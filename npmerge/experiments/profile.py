"""Profiles: the only difference between a laptop and a large GPU."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
)

from npmerge.catalogue import DATASETS, MODELS, check_profile, profile_names
from npmerge.methods import METHODS, find
from npmerge.registry import Entry

_FOLDER = Path(__file__).parent / "profiles"


def _known(check: Callable[[str], Entry]) -> AfterValidator:
    return AfterValidator(lambda name: check(name).name)


_Align = Annotated[str, _known(lambda name: find(name, "align"))]
_Aggregate = Annotated[str, _known(lambda name: find(name, "aggregate"))]
_Several = BeforeValidator(lambda value: [value] if isinstance(value, str) else value)


class Model(BaseModel):
    """A validated set of values that forbids unknown names and is not changed."""

    model_config = ConfigDict(extra="forbid", frozen=True, defer_build=True)


class RecipeValues(Model):
    """How base models are trained; see :class:`npmerge.store.zoo.Recipe`."""

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
        beside: data set and model of the paper's column that the setting is shown beside; presentation only.
        split: how the training images are shared out among the models; by default each sees all of them.
        concentration, least, apart: of a Dirichlet split; see :class:`npmerge.data.partition.Partition`.
        trunk: epochs that the models are trained together, as one, on all images, before each goes on alone; by default
            each has initial weights of its own, and with 0 the same.
        images: cut the data to so many images, for a dry run; all by default.
    """

    dataset: Annotated[str, _known(DATASETS.__getitem__)]
    image_size: int = Field(gt=0)
    model: Annotated[str, _known(MODELS.__getitem__)]
    width: float = Field(gt=0)
    recipe: RecipeValues
    beside: tuple[str, str] | None = None
    split: Literal["80-20", "dirichlet"] | None = None
    concentration: float | None = Field(None, gt=0)
    least: int | None = Field(None, ge=0)
    apart: int | None = Field(None, ge=0)
    trunk: int | None = Field(None, ge=0)
    images: int | None = None

    @property
    def model_name(self) -> str:
        """As in the paper's tables, e.g. ``"resnet20x8"``."""
        return f"{self.model}x{self.width:g}"

    @property
    def name(self) -> str:
        """In file names, e.g. ``"cifar100-resnet20x8"``."""
        trunk = None if self.trunk is None else f"trunk{self.trunk}"
        concentration = "" if self.concentration is None else f"{self.concentration:g}"
        split = self.split and self.split + concentration
        return "-".join(filter(None, (self.dataset, self.model_name, split, trunk)))

    @property
    def config(self) -> dict[str, Any]:
        """What numbers are a function of."""
        return self.model_dump(mode="json", exclude_none=True, exclude={"beside"})


class Choose(Model):
    """An option that is chosen on held-out training data; see :class:`npmerge.merging.Choice`."""

    choose: tuple[float, ...] = Field(min_length=1)
    trial: dict[str, Any] = Field(default_factory=dict)


def _choice(value: Any) -> Any:
    return Choose(**value) if isinstance(value, dict) and "choose" in value else value


Options = dict[
    Annotated[str, _known(METHODS.__getitem__)], dict[str, Annotated[Any, AfterValidator(_choice)]]
]
"""Options of methods, by the methods' names; a value may be a :class:`Choose`."""


@dataclass(frozen=True)
class Methods:
    """Every alignment with every aggregation.

    Attributes:
        align: names of alignments.
        aggregate: names of aggregations.
        many: how more than two models become one; ``None`` for pairs.
        correct: what is done after merging.
    """

    align: tuple[str, ...]
    aggregate: tuple[str, ...]
    many: str | None = None
    correct: str | None = "reset_batchnorm"


class _Named(Model):
    """Methods as a profile names them."""

    align: Annotated[tuple[_Align, ...], _Several]
    aggregate: Annotated[tuple[_Aggregate, ...], _Several]
    many: Annotated[str, _known(lambda name: find(name, "many"))] | None = None
    correct: Annotated[str, _known(lambda name: find(name, "correct"))] | None = "reset_batchnorm"


class Optimisation(Model):
    """What merging is given.

    Attributes:
        batch_size: images a step.
        held_out: fraction of every class of the optimisation data that choices are made on.
        options: of methods, by their names; a :class:`Choose` is made on the held-out data. What is not named has the
            method's own default.
        tuned: of aggregations that are run a second time, with an option chosen.
        path_points: models scored along a path between two others, the ends included.
    """

    batch_size: int = Field(500, gt=1)
    held_out: float = Field(0.1, gt=0, lt=1)
    options: Options = Field(default_factory=dict)
    tuned: Options = Field(default_factory=dict)
    path_points: int = Field(11, gt=1)


class Section(Model):
    """An experiment's part of a profile.

    Attributes:
        settings: its columns.
        optimisation: what merging is given.
        methods: what is run; by default what the experiment's table has.
        seeds: take at most so many of the seeds given.
    """

    settings: tuple[Setting, ...]
    optimisation: Optimisation
    seeds: int | None = Field(None, gt=0)
    methods: tuple[Methods, ...] | None = None

    @field_validator("methods", mode="before")
    @classmethod
    def _checked(cls, value: Any) -> Any:
        return value and tuple(Methods(**dict(_Named(**one))) for one in value)


_OWN = ("title", "place", "demonstration", "threads", "precision", "first")
"""What a profile's file says beside the sections."""
S = TypeVar("S", bound=Section)


class Profile(Model):
    """A named set of parameters for every experiment.

    Attributes:
        name: as its file is called.
        title: what a reader is told it is.
        place: among the profiles, the largest first.
        demonstration: whether it only shows the steps at work: every build of the book makes its records anew, none are
            published, and no claim is judged by them.
        threads: CPU threads of a training and of a cell: fixed, so that numbers do not depend on the cores there are.
        precision: ``"auto"`` learns in bfloat16 where the device gains from it.
        first: shell patterns of the cells that are done before all others, in this order.
        sections: the parameters of each experiment, by its name.
    """

    name: str
    title: str
    place: int = 100
    demonstration: bool = False
    threads: int = Field(gt=0)
    precision: Literal["auto", "float32"] = "auto"
    first: tuple[str, ...] = ()
    sections: dict[str, Any]

    def section(self, name: str, kind: type[S], default: Any = None) -> S | None:
        """An experiment's parameters.

        Args:
            name: the experiment's.
            kind: the class that they are of.
            default: what to take where the profile's file has none.

        Returns:
            ``None`` where the profile has none.

        Raises:
            ValueError: an unknown name or a wrong value.
        """
        values = self.sections.get(name, default)
        if values is None:
            return None
        try:
            return kind.model_validate(values)
        except ValidationError as error:
            raise ValueError(_first(self.name, error, name)) from error


def load_profile(name: str) -> Profile:
    """Read a profile.

    Args:
        name: e.g. ``"digits"``, ``"short"`` or ``"paper"``.

    Raises:
        ValueError: no such profile, or it holds an unknown name or a wrong value.
    """
    check_profile(name)
    import yaml  # only who reads a profile waits for it

    try:
        values: Any = yaml.safe_load((_FOLDER / f"{name}.yaml").read_text(encoding="utf-8"))
    except (yaml.YAMLError, RecursionError) as error:
        raise ValueError(f"profile {name!r} cannot be read: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"profile {name!r} holds no names with values")
    own = {key: values.pop(key) for key in _OWN if key in values}
    try:
        return Profile(name=name, sections=values, **own)
    except ValidationError as error:
        raise ValueError(_first(name, error)) from error


def load_profiles(*, demonstration: bool) -> list[Profile]:
    """The profiles that are demonstrations, or those whose records are published; the largest first.

    Args:
        demonstration: which of the two.

    Raises:
        ValueError: a profile holds an unknown name or a wrong value.
    """
    every = map(load_profile, profile_names())
    return [one for one in every if one.demonstration == demonstration]


def _first(profile: str, error: ValidationError, *where: str) -> str:
    first = error.errors()[0]
    return f"profile {profile!r}, {'.'.join(map(str, (*where, *first['loc'])))}: {first['msg']}"
