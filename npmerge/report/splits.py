"""The tables and figures of the chapter on disjoint splits."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from npmerge.methods import Combination
from npmerge.report.captions import captioned, whose
from npmerge.report.numbers import by_method, is_merged, method_of, place_of
from npmerge.report.plots import MODELS, describe, label_ends, legend_below, panels
from npmerge.report.words import place_labels, plus_minus, signed
from npmerge.store.records import Record, table

FEW_CLASSES = 20
"""Up to so many classes are drawn one by one."""
AS_TRAINED, RESET = Combination("base_models", correct=None), Combination("base_models")


def base_models_table(records: Sequence[Record]) -> pd.DataFrame:
    """The base models' accuracy with the batch norm statistics of their training, and with those of all images.

    Args:
        records: of ``disjoint_splits``, with the base models as trained and with their batch norm reset.

    Returns:
        A row a setting: both as mean ± std, and the gain from one to the other with the smallest and the largest of a
        seed, in percentage points.
    """
    found = by_method(table(records))
    names = place_labels(found)
    rows = {}
    for place, here in found.items():
        gain = here[RESET] - here[AS_TRAINED]
        spread = f" ({signed(gain.min())} to {signed(gain.max())})" if len(gain) > 1 else ""
        rows[names[place]] = {
            "as trained": plus_minus(here[AS_TRAINED].mean(), here[AS_TRAINED].std()),
            "batch norm reset on all training images": plus_minus(
                here[RESET].mean(), here[RESET].std()
            ),
            "gain": f"{signed(gain.mean())}{spread}",
        }
    return captioned(
        pd.DataFrame.from_dict(rows, orient="index"),
        "Top-1 accuracy of the base models in percent, mean ± standard deviation, and the gain of the reset in "
        f"percentage points, in brackets the lowest and the highest of a seed ({whose(records)}).",
    )


def plot_split(
    seen: Mapping[str, Tensor | Sequence[Sequence[int]]], models: Sequence[str] = "AB"
) -> Figure:
    """Which model saw how much of which class, in one panel a split.

    Up to :data:`FEW_CLASSES` classes are bars, in images. More are an area, in percent, with the classes in the order
    of the first model's share.

    Args:
        seen: images ``(models, classes)`` by the panel's title.
        models: names of the models; one letter each will do.
    """
    counted = {title: np.asarray(counts, float) for title, counts in seen.items()}
    few = all(counts.shape[1] <= FEW_CLASSES for counts in counted.values())
    heights = [1.1 + 0.19 * counts.shape[1] if few else 2.4 for counts in counted.values()]
    figure, axes = panels(heights)
    colours = [MODELS[name] for name in models]
    told = []
    for axis, (title, counts) in zip(axes, counted.items(), strict=True):
        classes = np.arange(counts.shape[1])
        shares = 100 * counts / counts.sum(axis=0)
        if few:
            ends = counts.cumsum(axis=0)
            for name, width, end, colour in zip(models, counts, ends, colours, strict=True):
                axis.barh(classes, width, left=end - width, color=colour, label=name)
            axis.set_yticks(classes)
            axis.invert_yaxis()
            axis.set(xlabel="training images", ylabel="class", xlim=(0, ends[-1].max()))
            axis.grid(visible=False, axis="y")
        else:
            shares = shares[:, np.argsort(-shares[0], kind="stable")]
            edges, steps = np.append(classes, len(classes)), shares[:, [*classes, -1]]
            axis.stackplot(edges, steps, step="post", colors=colours, labels=models, lw=0)
            axis.set(xlabel="classes, those of which A saw most first", ylabel="images (%)")
            axis.set(xlim=(0, len(classes)), ylim=(0, 100))
            axis.grid(visible=False)
        middle = f"of the median class one model saw {np.median(shares.max(axis=0)):.0f} %"
        axis.set_title(f"{title}: {middle}")
        told.append(f"{title}: {middle}")
    legend_below(figure, title="seen by")
    return describe(figure, f"Which model saw how much of which class. {'. '.join(told)}")


def class_table(records: Sequence[Record]) -> pd.DataFrame:
    """What every model knows of every class.

    Args:
        records: of ``disjoint_splits``.

    Returns:
        A row for each ``place``, ``seed``, ``class`` and ``model``: the ``share`` of the class's training images that A
        saw (B saw the others) and the model's test ``accuracy`` on the class, both in percent. Models are ``"A"``,
        ``"B"`` and combinations of methods.
    """
    kept = [
        record
        for record in records
        if "classes" in record.details and any(row.correct for row in record.rows)
    ]
    kept.sort(key=lambda record: method_of(record).place)
    names = place_labels(map(place_of, kept))
    shares = {
        (record.cell.setting, record.cell.seed): _share(record.details["classes"]["seen"])
        for record in kept
        if "seen" in record.details["classes"]
    }
    rows = [
        {
            "place": names[place_of(record)],
            "seed": record.cell.seed,
            "class": number,
            "share": shares[record.cell.setting, record.cell.seed][number],
            "model": model,
            "accuracy": accuracy,
        }
        for record in kept
        for model, accuracies in _class_accuracies(record)
        for number, accuracy in enumerate(accuracies)
    ]
    return pd.DataFrame(rows)


def class_summary(records: Sequence[Record]) -> pd.DataFrame:
    """The mean and the worst class of each model; of the base models, whichever saw more of a class, and the other.

    Args:
        records: of ``disjoint_splits``.

    Returns:
        Test accuracy in percent, a row a model. The worst class is found for each seed; all are means over the seeds.
    """
    rows = class_table(records)
    base = rows["model"].isin(MODELS)
    more = (rows["model"] == "A") == (rows["share"] >= 50)
    names = rows["model"].map(_name)
    names[base] = np.where(more[base], "base model that saw more", "base model that saw less")
    per_seed = rows.groupby(["place", names, "seed"], sort=False)["accuracy"]
    found = per_seed.agg(["mean", "min"]).groupby(level=[0, 1], sort=False).mean().round(1)
    found = found.set_axis(["all classes", "worst class"], axis=1)
    places = {str(place): found.loc[place] for place in dict.fromkeys(rows["place"])}
    return captioned(
        pd.concat(places, axis=1).rename_axis(index=None),
        "Test accuracy in percent: the mean over all classes, and the class on which the network is worst; "
        f"means over the seeds ({whose(records)}).",
    )


def plot_classes(records: Sequence[Record], align: str = "permute") -> Figure:
    """What each model knows of a class, in one panel a setting.

    The models are A, B, their ensemble and what is merged of them after one alignment, at given options. Where A saw
    many different shares of the classes, dots are classes, of all seeds, against that share; the lines join the
    classes' means between 0, 10, 30, 50, 70, 90 and 100 percent. Where it saw one of two shares, each class has a row
    with the means over the seeds.

    Args:
        records: of ``disjoint_splits``.
        align: the alignment.
    """
    rows = class_table(
        [
            one
            for one in records
            if not is_merged(m := method_of(one)) or (m.align == align and not m.tuned)
        ]
    )
    places = {str(place): here for place, here in rows.groupby("place", sort=False)}
    in_rows = [_two_shares(here) for here in places.values()]
    heights = [
        1.4 + 0.16 * here["class"].nunique() ** 0.75 if flat else 3.1
        for here, flat in zip(places.values(), in_rows, strict=True)
    ]
    figure, axes = panels(heights)
    told = []
    for axis, (place, here), flat in zip(axes, places.items(), in_rows, strict=True):
        (_class_rows if flat else _class_dots)(axis, here)
        axis.set_title(place)
        told.append(f"{place}: {_weaker_classes(here)}")
    if any(in_rows):
        legend_below(figure)
    else:
        label_ends(axes)
    title = told[0].partition(": ")[2] if len(told) == 1 else ""
    return describe(figure, f"Test accuracy on each class. {'. '.join(told)}", title)


def _weaker_classes(rows: pd.DataFrame) -> str:
    """What A and B alone know of the classes of which each saw less, and the models that know most of all classes."""
    less = ((rows["model"] == "A") & (rows["share"] < 50)) | (
        (rows["model"] == "B") & (rows["share"] > 50)
    )
    told = (
        f"Of a class of which it saw less, a model alone has {rows[less]['accuracy'].mean():.0f} %"
    )
    means = {
        model.label: float(rows[rows["model"] == model]["accuracy"].mean())
        for model in dict.fromkeys(rows["model"])
        if isinstance(model, Combination) and is_merged(model)
    }
    if not means:
        return told
    best = max(means, key=lambda name: means[name])
    return f"{told}; {best} has {means[best]:.0f} % of all classes"


def _two_shares(rows: pd.DataFrame) -> bool:
    """Whether A saw one of two shares of each class, up to rounding."""
    return bool(rows["share"].round(-1).nunique() <= 2)


def _class_dots(axis: Axes, rows: pd.DataFrame) -> None:
    models = list(dict.fromkeys(rows["model"]))
    size = 5 if len(rows) > 1000 else 20
    for number, model in enumerate(models):
        here = rows[rows["model"] == model]
        colour, line = _look(model)
        if line != ":":
            x = here["share"] + 0.8 * (number - len(models) / 2)
            axis.scatter(x, here["accuracy"], s=size, color=colour, alpha=0.35, lw=0)
        part = np.digitize(here["share"], [10, 30, 50, 70, 90])
        trend = here.groupby(part)[["share", "accuracy"]].mean()
        axis.plot(
            trend["share"], trend["accuracy"], ls=line, color=colour, lw=2.2, label=_name(model)
        )
    axis.set(xlim=(-3, 103), ylim=(-3, 103), ylabel="test accuracy (%)")
    axis.set_xlabel("share of the class that A saw; B saw the rest (%)")


def _class_rows(axis: Axes, rows: pd.DataFrame) -> None:
    """A row a class, those of which A saw more on top, by its accuracy."""
    models = list(dict.fromkeys(rows["model"]))
    found = pd.DataFrame(
        {m: rows[rows["model"] == m].groupby("class")["accuracy"].mean() for m in models}
    )
    share = rows.groupby("class")["share"].mean().round(-1)
    order = pd.DataFrame({"share": share, "A": found["A"]}).sort_values(["share", "A"])
    found = found.loc[order.index]
    y = np.arange(len(found))
    axis.hlines(y, found.min(axis=1), found.max(axis=1), color="black", alpha=0.2, lw=1)
    for model in models:
        colour, line = _look(model)
        face = "none" if line == ":" else colour
        axis.plot(found[model], y, "o", ms=4, color=colour, mfc=face, label=_name(model))
    middle = (share.loc[order.index] < share.mean()).sum() - 0.5
    axis.axhline(middle, color="black", lw=0.8, ls=":")
    axis.set(xlim=(-3, 103), xlabel="test accuracy (%)", ylabel="classes")
    axis.set_yticks([middle / 2, (middle + len(found)) / 2], ["B saw\nmore", "A saw\nmore"])
    axis.grid(visible=False, axis="y")


def _class_accuracies(record: Record) -> Iterator[tuple[str | Combination, Sequence[float]]]:
    """The models of a record, and how good each is at every class."""
    found, method = record.details["classes"]["accuracy"], method_of(record)
    if method == RESET:
        yield from zip(MODELS, found, strict=True)
    else:
        yield method, found


def _share(seen: Sequence[Sequence[int]]) -> list[float]:
    """What A saw of each class, in percent."""
    return [100 * first / (first + second) for first, second in zip(*seen, strict=True)]


def _name(model: str | Combination) -> str:
    return f"{model} alone" if isinstance(model, str) else model.label


def _look(model: str | Combination) -> tuple[str, str]:
    """Colour and line: dotted what is no single network, dashed what nothing was learned for."""
    if isinstance(model, str):
        return MODELS[model], "-"
    if not is_merged(model):
        return model.color, ":"
    return model.color, "--" if model.family == "averaging" else "-"
