"""The tables and figures of the chapter on disjoint splits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from torch import Tensor

from npmerge.figures import COLORS, legend_below, plus_minus
from npmerge.paper import PLACE, label, place_label, scores, signed

FEW_CLASSES = 20
"""Up to so many classes are drawn one by one."""


def base_models_table(table: pd.DataFrame) -> pd.DataFrame:
    """The base models' accuracy with the batch norm statistics of their training, and with those of all images.

    Args:
        table: from :func:`npmerge.results.table`, with the methods ``base_avg_no_reset`` and ``base_avg``.

    Returns:
        A row a setting: both as mean ± std, and the gain from one to the other with the smallest and the largest of a
        seed, in percentage points.
    """
    found = scores(table)
    rows = {}
    for place, here in found.groupby(level=PLACE, sort=False):
        gain = here["base_avg"] - here["base_avg_no_reset"]
        spread = f" ({signed(gain.min())} to {signed(gain.max())})" if len(gain) > 1 else ""
        rows[place_label(*map(str, place))] = {
            "as trained": plus_minus(*here["base_avg_no_reset"].agg(["mean", "std"])),
            "batch norm reset on all training images": plus_minus(
                *here["base_avg"].agg(["mean", "std"])
            ),
            "gain": f"{signed(gain.mean())}{spread}",
        }
    return pd.DataFrame.from_dict(rows, orient="index")


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
    panels = {title: np.asarray(counts, float) for title, counts in seen.items()}
    few = all(counts.shape[1] <= FEW_CLASSES for counts in panels.values())
    height = sum(1 + 0.19 * counts.shape[1] if few else 2.2 for counts in panels.values())
    figure, axes = plt.subplots(
        len(panels), 1, figsize=(6.4, 0.5 + height), squeeze=False, layout="constrained"
    )
    for axis, (title, counts) in zip(axes[:, 0], panels.items(), strict=True):
        colours = [COLORS[name] for name in models]
        classes = np.arange(counts.shape[1])
        if few:
            ends = counts.cumsum(axis=0)
            for name, width, end, colour in zip(models, counts, ends, colours, strict=True):
                axis.barh(classes, width, left=end - width, color=colour, label=name)
            axis.set_yticks(classes)
            axis.invert_yaxis()
            axis.set(xlabel="training images", ylabel="class", xlim=(0, ends[-1].max()))
            axis.grid(visible=False, axis="y")
        else:
            shares = 100 * counts / counts.sum(axis=0)
            shares = shares[:, np.argsort(-shares[0], kind="stable")]
            edges, steps = np.append(classes, len(classes)), shares[:, [*classes, -1]]
            axis.stackplot(edges, steps, step="post", colors=colours, labels=models, lw=0)
            axis.set(xlabel="classes, those of which A saw most first", ylabel="images (%)")
            axis.set(xlim=(0, len(classes)), ylim=(0, 100))
            axis.grid(visible=False)
        axis.set_title(title, fontsize=11)
    legend_below(figure, axes[0][0], title="seen by")
    return figure


def class_table(contents: Sequence[dict[str, Any]]) -> pd.DataFrame:
    """What every model knows of every class.

    Args:
        contents: of ``disjoint_splits``, from :meth:`npmerge.results.Results.read`.

    Returns:
        A row for each ``place``, ``seed``, ``class`` and ``model``: the ``share`` of the class's training images that A
        saw (B saw the others) and the model's test ``accuracy`` on the class, both in percent. Models are A, B, the
        ensemble and methods.
    """
    rows = []
    for content in contents:
        known = content["details"]["classes"]
        seen = np.asarray(known["seen"], float)
        rows += [
            {
                "place": place_label(*(content["records"][0][key] for key in PLACE)),
                "seed": content["unit"]["seed"],
                "class": number,
                "share": 100 * seen[0, number] / seen[:, number].sum(),
                "model": model,
                "accuracy": accuracy,
            }
            for model, accuracies in known["accuracy"].items()
            for number, accuracy in enumerate(accuracies)
        ]
    return pd.DataFrame(rows)


def class_summary(contents: Sequence[dict[str, Any]]) -> pd.DataFrame:
    """The mean and the worst class of each model; of the base models, whichever saw more of a class, and the other.

    Args:
        contents: of ``disjoint_splits``, from :meth:`npmerge.results.Results.read`.

    Returns:
        Test accuracy in percent, a row a model. The worst class is found for each seed; all are means over the seeds.
    """
    rows = class_table(contents)
    base = rows["model"].isin(["A", "B"])
    more = (rows["model"] == "A") == (rows["share"] >= 50)
    names = rows["model"].map(label)
    names[base] = np.where(more[base], "base model that saw more", "base model that saw less")
    per_seed = rows.groupby(["place", names, "seed"], sort=False)["accuracy"]
    found = per_seed.agg(["mean", "min"]).groupby(level=[0, 1], sort=False).mean().round(1)
    found = found.set_axis(["all classes", "worst class"], axis=1)
    places = {str(place): found.loc[place] for place in dict.fromkeys(rows["place"])}
    result: pd.DataFrame = pd.concat(places, axis=1).rename_axis(index=None)
    return result


def plot_classes(contents: Sequence[dict[str, Any]]) -> Figure:
    """What each model knows of a class against the share of the class that A saw, in one panel a setting.

    Dots are classes, of all seeds, those of each model moved sideways a little. The lines join the classes' means
    between 0, 10, 30, 50, 70, 90 and 100 percent.

    Args:
        contents: of ``disjoint_splits``, from :meth:`npmerge.results.Results.read`.
    """
    rows = class_table(contents)
    places = list(dict.fromkeys(rows["place"]))
    figure, axes = plt.subplots(
        len(places), 1, figsize=(6.4, 0.6 + 3.1 * len(places)), sharex=True, squeeze=False,
        layout="constrained",
    )  # fmt: skip
    looks = {
        "A": (COLORS["A"], "-", "A alone"),
        "B": (COLORS["B"], "-", "B alone"),
        "permute": (COLORS["earlier"], "--", label("permute")),
        "np_permute": (COLORS["np"], "-", label("np_permute")),
        "ensemble": (COLORS["reference"], ":", label("ensemble")),
    }
    size = 5 if len(rows) > 1000 * len(places) else 20
    for axis, place in zip(axes[:, 0], places, strict=True):
        for aside, (model, (colour, line, name)) in enumerate(looks.items()):
            here = rows[(rows["place"] == place) & (rows["model"] == model)]
            if model != "ensemble":
                x = here["share"] + 0.8 * (aside - 1.5)
                axis.scatter(x, here["accuracy"], s=size, color=colour, alpha=0.35, lw=0)
            part = np.digitize(here["share"], [10, 30, 50, 70, 90])
            trend = here.groupby(part)[["share", "accuracy"]].mean()
            axis.plot(trend["share"], trend["accuracy"], line, color=colour, lw=2.2, label=name)
        axis.set(xlim=(-3, 103), ylim=(-3, 103), ylabel="test accuracy (%)")
        axis.set_title(place, fontsize=11)
    axes[-1][0].set_xlabel("share of the class that A saw; B saw the rest (%)")
    legend_below(figure, axes[0][0])
    return figure
