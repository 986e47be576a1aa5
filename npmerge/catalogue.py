"""The data sets, models, experiments and profiles that there are, by name; nothing slow is waited for."""

from __future__ import annotations

import ast
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from npmerge.checks import CLASSES, WIDTH, check_finite, check_whole
from npmerge.registry import Entry, Registry, statements

F = TypeVar("F", bound=Callable[..., Any])

SAMPLING = 2
"""Version of how orders, crops, flips and shares of data are drawn: what was drawn otherwise gives other numbers."""
GROUPS = 3
"""Version of what symmetry groups say of a model: what was found with others is found again."""


@dataclass(frozen=True, kw_only=True)
class DataSet(Entry):
    """An image set that :func:`npmerge.data.images.load` loads.

    Attributes:
        label: its name in prose.
        classes: how many outputs a network for it has.
        image_size: height and width of an image in pixels, unless another size is asked for.
        channels: colour channels of an image.
        variable: environment variable that names its folder; ``None`` if it comes with a package.
        downloads: whether it is downloaded where no folder is named.
        examples_per_class: training images of a class; ``None`` where the classes differ much.
        topk: the accuracies of its tables.
    """

    label: str
    classes: int
    image_size: int
    channels: int
    variable: str | None = None
    downloads: bool = False
    examples_per_class: int | None = None
    topk: tuple[int, ...] = (1,)

    @property
    def at_hand(self) -> bool:
        """Whether it can be loaded without a folder that somebody has to name."""
        return self.downloads or self.variable is None

    def folder(self, given: Path | str | None = None) -> Path | None:
        """The folder that was given or that the environment variable names, if any.

        Args:
            given: goes before the variable.
        """
        named = given or (os.environ.get(self.variable) if self.variable else None)
        try:
            return Path(named).expanduser() if named else None
        except RuntimeError as error:  # a user's home folder that is not there
            raise ValueError(
                f"the folder of {self.name} is {str(named)!r}, and there is no such home folder: give its whole path"
            ) from error


@dataclass(frozen=True, kw_only=True)
class Model(Entry):
    """A network that :func:`npmerge.models.build` builds.

    Attributes:
        label: its name in prose.
        family: of architectures.
        takes: images, or texts as token ids; of those, channels are different tokens, and the size is their number.
        smallest: height and width of the smallest image that it takes, in pixels.
        sizes: the only sizes that it takes; from ``smallest`` on all by default.
    """

    label: str
    family: str
    takes: Literal["images", "texts"] = "images"
    smallest: int = 1
    sizes: tuple[int, ...] = ()

    def check(self, classes: int, width: float, *, in_channels: int, image_size: int) -> None:
        """Raise if there is no such network.

        Args:
            classes: number of outputs.
            width: multiplies the channels.
            in_channels: colour channels of the images.
            image_size: height and width of the images in pixels.

        Raises:
            ValueError: a number that is out of bounds, or a size that it does not take.
        """
        check_whole("classes", classes, 1, CLASSES)
        check_finite("width", width, above=0, most=WIDTH)
        check_whole("in_channels", in_channels, 1)
        check_whole("image_size", image_size)
        if image_size < self.smallest:
            raise ValueError(
                f"{self.name} needs images of at least {self.smallest} pixels, not {image_size}"
            )
        if self.sizes and image_size not in self.sizes:
            *most, last = map(str, self.sizes)
            raise ValueError(
                f"{self.name} takes images of {', '.join(most)} or {last} pixels, not {image_size}"
            )


DATASETS: Registry[DataSet] = Registry("data set", "dataset", DataSet, ("npmerge.data.sets",))
"""Every data set by its name."""

MODELS: Registry[Model] = Registry("model", "model", Model, ("npmerge.models",))
"""Every model by its name."""


def dataset(
    *,
    label: str,
    classes: int,
    image_size: int,
    channels: int,
    variable: str | None = None,
    downloads: bool = False,
    examples_per_class: int | None = None,
    topk: tuple[int, ...] = (1,),
    place: int = 100,
) -> Callable[[F], F]:
    """Register the function that is decorated as a data set; see :class:`DataSet` for the words.

    It is called as ``name(folder, image_size=...)``, where ``folder`` may be ``None``, and returns an
    :class:`~npmerge.data.images.ImageData` of its own name.

    Raises:
        ValueError: there is a data set of that name.
    """
    return DATASETS.register(
        label=label, classes=classes, image_size=image_size, channels=channels, variable=variable,
        downloads=downloads, examples_per_class=examples_per_class, topk=topk, place=place,
    )  # fmt: skip


def model(
    *,
    label: str,
    family: str,
    takes: Literal["images", "texts"] = "images",
    smallest: int = 1,
    sizes: tuple[int, ...] = (),
    place: int = 100,
) -> Callable[[F], F]:
    """Register the function that is decorated as a model; see :class:`Model` for the words.

    It is called as ``name(classes, width, in_channels=..., image_size=..., generator=...)``, draws its initial weights
    from the generator, and returns the network.

    Raises:
        ValueError: there is a model of that name.
    """
    return MODELS.register(
        label=label, family=family, takes=takes, smallest=smallest, sizes=sizes, place=place
    )


ALL = "ALL"
"""Stands for all experiments."""

_EXPERIMENTS = Path(__file__).parent / "experiments"


def experiment_names() -> list[str]:
    """The names of the experiments in the paper's order, as the files that define an ``EXPERIMENT`` say them."""
    found = []
    for file in sorted(_EXPERIMENTS.glob("[!_]*.py")):
        text = file.read_text(encoding="utf-8")
        for node in statements(text) if "\nEXPERIMENT = " in text else []:
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "EXPERIMENT":
                call: Any = node.value
                places = [word.value.value for word in call.keywords if word.arg == "place"]
                found.append((*(places or [100]), str(call.args[0].value)))
    return [name for _, name in sorted(found, key=lambda one: one[0])]


def profile_names() -> list[str]:
    """The names of the profiles, the largest first: in the order of the ``place`` in their files."""
    found = []
    for path in (_EXPERIMENTS / "profiles").glob("*.yaml"):
        place = re.search(r"^place: (\d+)$", path.read_text(encoding="utf-8"), re.MULTILINE)
        found.append((int(place[1]) if place else 100, path.stem))
    return [name for _, name in sorted(found)]


def chosen_experiments(chosen: str | Sequence[str]) -> list[str]:
    """Experiments by name, each once.

    Args:
        chosen: a name, several, or ``"ALL"``, which is all of them in the paper's order.

    Raises:
        ValueError: there is no such experiment.
    """
    known, given = experiment_names(), [chosen] if isinstance(chosen, str) else chosen
    for name in given:
        if name not in known and name != ALL:
            raise ValueError(
                f"unknown experiment {name!r}: choose one of {', '.join(known)}, or {ALL}"
            )
    return known if ALL in given else list(dict.fromkeys(given))


def check_profile(name: str) -> None:
    """Raise a ``ValueError`` that lists the profiles if there is none of that name."""
    if name not in profile_names():
        raise ValueError(f"unknown profile {name!r}: choose one of {', '.join(profile_names())}")
