"""Numbers by place and method: the paper's, and those of records."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib.resources import files
from itertools import chain
from math import inf
from typing import Any

import pandas as pd

from npmerge.methods import METHODS, Combination
from npmerge.store.records import Record

Size = int | str | None
"""Optimisation images a class, or ``"all"``; ``None`` if nobody varies them."""


@dataclass(frozen=True)
class Place:
    """What tells one column of a table from another.

    Attributes:
        dataset: the data set.
        model: the network with its width, e.g. ``"resnet20x8"``.
        split: how the training images were shared out; ``None`` if each model saw all.
        models: how many became one.
        examples: how many optimisation images there are.
        setting: its name in the records; empty for the paper's.
    """

    dataset: str
    model: str
    split: str | None = None
    models: int = 2
    examples: Size = None
    setting: str = ""


def paper_numbers() -> pd.DataFrame:
    """The paper's 90 numbers, with the columns of a record's rows, ``mean`` and ``std`` in percent."""
    with (files("npmerge.report") / "paper.csv").open(encoding="utf-8") as file:
        rows = pd.read_csv(file)
    return rows.assign(models=2, many=None, correct="reset_batchnorm", setting="")


def combination(row: Mapping[Any, Any]) -> Combination:
    """What a row of a record is about.

    Args:
        row: its values by column.
    """
    names = {name: _known(row[name]) for name in ("aggregate", "align", "correct", "many")}
    return Combination(tuned=bool(row["tuned"]), **names)


def place_of(record: Record) -> Place:
    """Where a record belongs.

    Args:
        record: the record.
    """
    return place_of_row(record.rows[0].model_dump() | {"setting": record.cell.setting})


def method_of(record: Record) -> Combination:
    """What a record is about.

    Args:
        record: the record; its first row counts.
    """
    return combination(record.rows[0].model_dump())


def size_order(examples: Size) -> float:
    """A number of images that can be compared; more than any number if it is all of them.

    Args:
        examples: images a class.
    """
    return inf if examples in ("all", None) else float(examples)


def is_merged(method: Combination) -> bool:
    """Whether it merges, and is not what merged models are held against.

    Args:
        method: what a row is about.
    """
    return METHODS[method.aggregate].kind != "reference"


def shown(method: Combination) -> bool:
    """Whether tables of accuracies have a row for it: base models as they were trained have a table of their own.

    Args:
        method: what a row is about.
    """
    return method.correct is not None or is_merged(method)


def by_method(
    table: pd.DataFrame, metric: str = "top1"
) -> dict[Place, dict[Combination, pd.Series[float]]]:
    """The numbers of each method at each place, by seed.

    Methods are in the registry's order, places of a setting from few models to many and from many images to few.

    Args:
        table: from :func:`npmerge.store.records.table`.
        metric: which numbers.

    Returns:
        A number is NaN where only other methods have one with that seed.

    Raises:
        ValueError: there are two numbers for one method at one place with one seed.
    """
    found: dict[Place, dict[Combination, dict[int, float]]] = {}
    for row in table[table["metric"] == metric].to_dict("records"):
        place, method = place_of_row(row), combination(row)
        values = found.setdefault(place, {}).setdefault(method, {})
        if row["seed"] in values:
            raise ValueError(
                f"two numbers for {method.label} at {place}, seed {row['seed']}: "
                "give the records of one experiment at one profile"
            )
        values[row["seed"]] = row["value"]
    settings = list(dict.fromkeys(place.setting for place in found))
    places = sorted(
        found, key=lambda one: (settings.index(one.setting), one.models, -size_order(one.examples))
    )
    return {
        place: {
            method: pd.Series(
                found[place][method], index=list(dict.fromkeys(chain(*found[place].values())))
            )
            for method in in_order(found[place])
        }
        for place in places
    }


def in_order(methods: Iterable[Combination]) -> list[Combination]:
    """Methods in the registry's order, each once.

    Args:
        methods: in any order.
    """
    return sorted(set(methods), key=lambda method: method.place)


def summary(
    table: pd.DataFrame, metric: str = "top1"
) -> dict[Place, dict[Combination, tuple[float, float]]]:
    """Mean and standard deviation over seeds of each method that is :func:`shown`.

    Args:
        table: from :func:`npmerge.store.records.table`.
        metric: which numbers.

    Returns:
        The deviation is that of a sample; NaN for one seed.
    """
    return {
        place: {
            method: (float(values.mean()), float(values.std()))
            for method, values in here.items()
            if shown(method)
        }
        for place, here in by_method(table, metric).items()
    }


def paper_summary(number: str) -> dict[Place, dict[Combination, tuple[float, float]]]:
    """The paper's top-1 numbers of one table in the shape of :func:`summary`.

    Args:
        number: the table's, e.g. ``"IV"``; one that the paper does not have has no rows.
    """
    rows = paper_numbers()
    found: dict[Place, dict[Combination, tuple[float, float]]] = {}
    for row in rows[(rows["metric"] == "top1") & (rows["table"] == number)].to_dict("records"):
        found.setdefault(place_of_row(row), {})[combination(row)] = (row["mean"], row["std"])
    return found


def place_of_row(row: Mapping[Any, Any]) -> Place:
    """Where a row belongs.

    Args:
        row: of a record, or of :func:`paper_numbers`, its values by column.
    """
    examples = _known(row["examples_per_class"])
    if examples is not None and examples != "all":
        examples = int(examples)
    model = f"{row['model']}x{row['width']:g}"
    split, models = _known(row["split"]), int(row["models"])
    return Place(row["dataset"], model, split, models, examples, row["setting"])


def _known(value: Any) -> Any:
    """A value of a table; pandas may say NaN for None."""
    return None if isinstance(value, float) and value != value else value
