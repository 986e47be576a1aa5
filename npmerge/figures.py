"""Tables and plots for the chapters: records in, something to look at out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from npmerge.evaluate import PathPoint
from npmerge.paper import METHODS, PLACE, Verdict, label, numbers, place_label, scores

COLORS = {
    "earlier": "#4C78A8",
    "finetune": "#B279A2",
    "np": "#D1495B",
    "reference": "#6B7280",
    "A": "#2A9D8F",
    "B": "#E9A23B",
}
"""One colour a family of methods and a base model; distinguishable without red-green vision and on both themes' cards.
"""
TRAINING_IMAGES = {"digits": 130, "cifar10": 5000, "cifar100": 500}
"""Training images a class, rounded."""
FEW_CLASSES = 20
"""Up to so many classes are drawn one by one."""


def style() -> None:
    """Set matplotlib and pandas up for the book: sizes that read on a phone, a white card, whole texts."""
    pd.set_option("display.max_colwidth", None)
    plt.rcParams.update(
        {
            "figure.dpi": 110,
            "savefig.bbox": "tight",
            "figure.facecolor": "white",
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.grid": True,
            "grid.alpha": 0.25,
            "font.size": 11,
        }
    )


def family(method: str) -> str:
    """Which family a method belongs to: a key of :data:`COLORS`."""
    if method.startswith("np_"):
        return "np"
    if method.startswith("finetune"):
        return "finetune"
    return "reference" if method in ("base_avg", "ensemble") else "earlier"


def summary(table: pd.DataFrame) -> pd.DataFrame:
    """Mean and standard deviation over seeds.

    Args:
        table: from :func:`npmerge.results.table`.

    Returns:
        Top-1 accuracy in percent: ``mean``, ``std`` (of a sample; NaN for one seed) and ``seeds`` for each dataset,
        model, setting, number of examples and method, methods in the paper's order.
    """
    top1 = table[(table["metric"] == "top1") & table["method"].isin(METHODS)]
    top1 = top1.fillna({"examples_per_class": ""}).astype({"examples_per_class": str})
    order = {method: place for place, method in enumerate(METHODS)}
    grouped = top1.groupby([*PLACE, "method"], sort=False)["value"]
    result = grouped.agg(mean="mean", std="std", seeds="count").reset_index()
    return result.sort_values(
        "method", key=lambda column: column.map(order), kind="stable", ignore_index=True
    )


def beside_paper(contents: Sequence[dict[str, Any]], table: pd.DataFrame) -> pd.DataFrame:
    """Our numbers beside the column of the paper that each setting reproduces or stands in for.

    Args:
        contents: from :meth:`npmerge.results.Results.read`; their configuration names the paper's column.
        table: their records.

    Returns:
        One row a method; for each setting our mean ± std and the paper's, as text.
    """
    ours, paper = summary(table), summary_of_paper()
    columns = {}
    for place in _places(ours):
        dataset, model, setting, examples = place
        config = next(
            c["config"]["setting"]
            for c in contents
            if [c["records"][0][key] for key in PLACE[:3]] == [dataset, model, setting]
        )
        here = _at(ours, place)
        their_data, their_model = config["beside"]
        same_table = table.loc[table["dataset"] == dataset, "table"].iloc[0]
        there = _at(
            paper[paper["table"] == same_table], (their_data, their_model, setting, examples)
        )
        columns[f"{place_label(*place)} (ours)"] = here
        columns[f"{place_label(their_data, their_model, setting, examples)} (paper)"] = there
    found = {method for rows in columns.values() for method in rows.index}
    methods = [method for method in METHODS if method in found]
    cells = {name: [_mean_std(rows, m) for m in methods] for name, rows in columns.items()}
    return pd.DataFrame(cells, index=[label(m) for m in methods])


def summary_of_paper() -> pd.DataFrame:
    """The paper's top-1 numbers in the shape of :func:`summary`, with their ``table``."""
    rows = numbers()
    return rows[rows["metric"] == "top1"].fillna({"examples_per_class": ""})


def _places(rows: pd.DataFrame) -> list[tuple[str, ...]]:
    return list(dict.fromkeys(rows[PLACE].itertuples(index=False, name=None)))


def _at(rows: pd.DataFrame, place: tuple[str, ...]) -> pd.DataFrame:
    """The rows of one column of a table, by method."""
    here = (rows[PLACE].astype(str) == list(place)).all(axis=1)
    return rows[here].set_index("method")


def verdict_table(
    verdicts: Sequence[Verdict], column: Literal["status", "evidence"] = "status"
) -> pd.DataFrame:
    """The verdicts as a table: a row a claim, a column a setting.

    Args:
        verdicts: from :func:`npmerge.paper.verdicts`.
        column: what to show of each: its status, or the comparison with the smallest margin, in percentage points of
            top-1 accuracy.
    """
    rows: dict[str, dict[str, str]] = {}
    for v in verdicts:
        claim = f"{v.claim.text} ({v.claim.section})"
        rows.setdefault(claim, {})[v.place] = getattr(v, column)
    return pd.DataFrame.from_dict(rows, orient="index")


def choices(contents: Sequence[dict[str, Any]]) -> pd.DataFrame:
    """What was chosen on held-out training images, a row a unit; a choice at an edge of its grid is marked.

    Args:
        contents: from :meth:`npmerge.results.Results.read`.

    Returns:
        CCA's ridge and the tuned learning rates. A mark means that a value beyond the grid might have done better.
    """
    return pd.DataFrame(
        {
            **(
                {"CCA ridge": _choice(content["details"]["ridge"])}
                if "ridge" in content["details"]
                else {}
            ),
            **{
                f"{label(method)}: learning rate": _choice(tuned)
                for method, tuned in content["details"]["tuned_lr"].items()
            },
        }
        for content in contents
    ).set_axis([f"{c['unit']['setting']}, seed {c['unit']['seed']}" for c in contents])


def _choice(found: dict[str, Any]) -> str:
    tried = sorted(float(value) for value in found["trials"])
    edge = {tried[0]: " (lowest tried)", tried[-1]: " (highest tried)"}
    return f"{found['chosen']:g}{edge.get(found['chosen'], '')}"


def provenance_row(content: dict[str, Any]) -> dict[str, Any]:
    """Where a record file's numbers come from, as a row of a table.

    Args:
        content: one of those from :meth:`npmerge.results.Results.read`.
    """
    unit, source = content["unit"], content["provenance"]
    return {
        "record": f"{unit['profile']}/{unit['experiment']}/{unit['setting']}-seed{unit['seed']}",
        "revision": short_revision(source),
        "device": f"{source['device']}, threads: {source['threads']}",
        "torch": source["versions"]["torch"],
        "seconds": f"{source['seconds']:.0f}",
        "peak memory": f"{source['peak_memory_mib']} MiB",
    }


def short_revision(provenance: dict[str, Any]) -> str:
    """The first digits of the source's revision, ``+`` behind them if it was changed.

    Args:
        provenance: see :func:`npmerge.results.provenance`.
    """
    whole: str = provenance["revision"]
    return whole.removeprefix("version ").removesuffix("+")[:8] + "+" * whole.endswith("+")


def plot_methods(table: pd.DataFrame, title: str = "") -> Figure:
    """How far each method is from the base models and the ensemble, in one panel a setting.

    Args:
        table: from :func:`npmerge.results.table`.
        title: above the panels.
    """
    ours = summary(table)
    places = _places(ours)
    figure, axes = plt.subplots(
        len(places),
        1,
        figsize=(6.4, 0.6 + 3.2 * len(places)),
        sharex=True,
        squeeze=False,
        layout="constrained",
    )
    methods = [m for m in METHODS if m not in ("base_avg", "ensemble") and m in set(ours["method"])]
    top1 = table[table["metric"] == "top1"].fillna({"examples_per_class": ""})
    for axis, place in zip(axes[:, 0], places, strict=True):
        here, seeds = _at(ours, place), _at(top1, place)["value"]
        for row, method in enumerate(methods):
            colour, mean = COLORS[family(method)], here.loc[method, "mean"]
            values = seeds.loc[[method]].to_numpy(float)
            axis.plot([0, mean], [row, row], color=colour, lw=2, alpha=0.35, zorder=1)
            axis.plot(values, [row] * len(values), "|", color=colour, ms=10, zorder=2)
            axis.plot(mean, row, "o", color=colour, ms=8, zorder=3)
        for method, line in (("base_avg", "--"), ("ensemble", "-")):
            axis.axvline(
                here.loc[method, "mean"],
                color=COLORS["reference"],
                ls=line,
                lw=1.2,
                label=label(method),
            )
        axis.set_xlim(0, 102)
        axis.set_title(place_label(*place), fontsize=11)
        axis.set_yticks(range(len(methods)), [label(m) for m in methods])
        axis.invert_yaxis()
    axes[-1][0].set_xlabel("test accuracy (%)")
    handles, names = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=2, frameon=False)
    if title:
        figure.suptitle(title, fontsize=12)
    return figure


def plot_paths(paths: dict[str, list[PathPoint]]) -> Figure:
    """Accuracy and loss along the linear path from B to A, for each alignment.

    Args:
        paths: from :func:`npmerge.evaluate.path`, by method.
    """
    figure, axes = plt.subplots(1, 2, figsize=(8.4, 3.3), layout="constrained")
    markers = {"direct": "s", "permute": "o", "weight_matching": "^"}
    colours = {"direct": "#9CA3AF", "permute": "#D1495B", "weight_matching": "#4C78A8"}
    for method, points in paths.items():
        alphas = [p.alpha for p in points]
        for axis, key in zip(axes, ("accuracy", "loss"), strict=True):
            axis.plot(
                alphas,
                [getattr(p, key) for p in points],
                marker=markers[method],
                color=colours[method],
                label=label(method),
            )
    axes[0].set(xlabel="share of A, α", ylabel="test accuracy (%)", ylim=(0, 102))  # noqa: RUF001
    axes[1].set(xlabel="share of A, α", ylabel="test loss (nats)")  # noqa: RUF001
    handles, names = axes[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=3, frameon=False)
    return figure


def plot_alpha(alpha: dict[str, Tensor]) -> Figure:
    """Where the learned coefficients of the weights lie, layer by layer; dark where many are.

    Args:
        alpha: tensors of coefficients in (0, 1), by parameter name; vectors (biases, batch norm) are left out.
    """
    weights = {name: a.detach().cpu().numpy() for name, a in alpha.items() if a.ndim > 1}
    counts = np.stack([np.histogram(a, bins=50, range=(0, 1))[0] for a in weights.values()])
    density = counts / counts.sum(axis=1, keepdims=True)
    rows = len(weights)
    figure, axis = plt.subplots(figsize=(7.2, 1.4 + 0.2 * rows), layout="constrained")
    image = axis.imshow(density, aspect="auto", cmap="Purples", extent=(0, 1, rows, 0), vmin=0)
    axis.set_yticks(np.arange(rows) + 0.5, [n.removesuffix(".weight") for n in weights], fontsize=8)
    axis.axvline(0.5, color="black", lw=0.8, ls=":")
    axis.set(xlabel="α: from all B (0) to all A (1)")  # noqa: RUF001
    axis.grid(visible=False)
    figure.colorbar(image, ax=axis, label="share of the tensor", shrink=0.7)
    return figure


def plot_correlations(before: Tensor, after: Tensor) -> Figure:
    """The correlations between A's and B's neurons before and after alignment.

    Args:
        before: ``(size, size)``, A's neurons in rows, B's in columns.
        after: the same for B as aligned.
    """
    figure, axes = plt.subplots(1, 2, figsize=(7.2, 3.4), layout="constrained")
    for axis, matrix, title in zip(
        axes, (before, after), ("B as trained", "B aligned to A"), strict=True
    ):
        image = axis.imshow(matrix.cpu().numpy(), vmin=-1, vmax=1, cmap="RdBu_r")
        axis.set(xlabel="neuron of B", ylabel="neuron of A")
        axis.set_title(title, fontsize=11)
        axis.grid(visible=False)
    figure.colorbar(image, ax=axes, label="correlation", shrink=0.8)
    return figure


def plot_neuron_pair(images: Tensor, first: Tensor, second: Tensor, correlation: float) -> Figure:
    """What two matched neurons see: the images in the top row, the two activation maps below.

    Args:
        images: ``(n, C, H, W)``, as the models get them.
        first: activation maps of A's neuron, ``(n, h, w)``.
        second: those of the B neuron matched to it.
        correlation: between the two, over all data.
    """
    rows = (images.mean(dim=1), first, second)
    count = len(images)
    figure, axes = plt.subplots(3, count, figsize=(1.05 * count + 1, 3.6), layout="constrained")
    for row, (maps, name) in enumerate(
        zip(rows, ("image", "A's neuron", "B's neuron"), strict=True)
    ):
        for column in range(count):
            axis: Axes = axes[row][column]
            axis.imshow(maps[column].cpu().numpy(), cmap="gray" if row == 0 else "viridis")
            axis.set(xticks=[], yticks=[])
            axis.grid(visible=False)
        axes[row][0].set_ylabel(name)
    figure.suptitle(f"a matched pair of neurons, correlation {correlation:.2f}", fontsize=11)
    return figure


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
        spread = f" ({_signed(gain.min())} to {_signed(gain.max())})" if len(gain) > 1 else ""
        rows[place_label(*map(str, place))] = {
            "as trained": _plus_minus(*here["base_avg_no_reset"].agg(["mean", "std"])),
            "batch norm reset on all training images": _plus_minus(
                *here["base_avg"].agg(["mean", "std"])
            ),
            "gain": f"{_signed(gain.mean())}{spread}",
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
    _legend_below(figure, axes[0][0], title="seen by")
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
    _legend_below(figure, axes[0][0])
    return figure


def largest_first(contents: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Record files in the order of their optimisation images a class, from all of them downwards.

    Args:
        contents: of ``data_size``, from :meth:`npmerge.results.Results.read`.
    """
    return sorted(contents, key=lambda c: _images(c["config"]["examples_per_class"]), reverse=True)


def data_size_table(contents: Sequence[dict[str, Any]], table: pd.DataFrame) -> pd.DataFrame:
    """Our numbers on optimisation data of several sizes beside the paper's.

    Args:
        contents: of ``data_size``, from :meth:`npmerge.results.Results.read`; their configuration names the paper's
            column.
        table: their records.

    Returns:
        A row for each alignment and number of images a class, ours or the paper's; for each setting the methods' mean ±
        std in ours and in the paper, as text.
    """
    ours, paper = summary(table), summary_of_paper()
    paper = paper[paper["table"] == "IV"]
    beside = {tuple(c["records"][0][key] for key in PLACE[:3]): _beside(c) for c in contents}
    sizes = sorted({*ours["examples_per_class"], *paper["examples_per_class"]}, key=_images)[::-1]
    cells: dict[tuple[str, str], list[str]] = {}
    for (dataset, model, setting), (their_data, their_model) in beside.items():
        there = place_label(their_data, their_model, setting)
        for title, source, where in (
            (f"{place_label(dataset, model, setting)} (ours)", ours, (dataset, model, setting)),
            (f"{there} (paper)", paper, (their_data, their_model, setting)),
        ):
            at = {size: _at(source, (*where, size)) for size in sizes}
            for name, prefix in _SIZE_METHODS.items():
                cells[title, name] = [_mean_std(at[s], prefix + m) for m in _ALIGNED for s in sizes]
    rows = [(label(method), _size_label(size)) for method in _ALIGNED for size in sizes]
    index = pd.MultiIndex.from_tuples(rows, names=["alignment", "images"])
    result = pd.DataFrame(cells, index=index)
    return result.loc[:, (result != _NOTHING).any()]


def data_size_winners(table: pd.DataFrame) -> pd.DataFrame:
    """Which method is best at each number of optimisation images a class, and how far ahead of another family it is.

    Merging only, NP Merge and fine-tuning, at either learning rate, are the families.

    Args:
        table: records of ``data_size``, as :func:`npmerge.results.table` gives them.

    Returns:
        A row for each setting and number of images, a column an alignment: the method with the highest mean, its lead
        over the best method of another family in percentage points, and the number of seeds in which it is ahead.
    """
    rows: dict[tuple[str, str], dict[str, str]] = {}
    for place, here in scores(table).groupby(level=PLACE, sort=False):
        *setting, size = map(str, place)
        for method in _ALIGNED:
            found = here[[prefix + method for prefix in _SIZE_METHODS.values()]]
            means = found.mean()
            first = str(means.idxmax())
            others = [m for m in map(str, found) if family(m) != family(first)]
            rival = str(means[others].idxmax())
            lead = found[first] - found[rival]
            key = (place_label(*setting), _size_label(size))
            rows.setdefault(key, {})[f"after {label(method)}"] = (
                f"{label(first)}, {_signed(lead.mean())} to {label(rival)} "
                f"({(lead > 0).sum()} of {len(lead)} seeds)"
            )
    index = pd.MultiIndex.from_tuples(rows, names=["setting", "images"])
    return pd.DataFrame(list(rows.values()), index=index)


def plot_data_size(contents: Sequence[dict[str, Any]], table: pd.DataFrame) -> Figure:
    """Accuracy against the number of optimisation images a class, in one panel an alignment, of one setting.

    Bands are standard deviations over the seeds. The base models' line is their mean with batch norm reset on all
    training images. Where the setting is the paper's own, thin dashed lines are the paper's numbers.

    Args:
        contents: of ``data_size`` in one setting, from :meth:`npmerge.results.Results.read`.
        table: their records.

    Raises:
        ValueError: there are several settings.
    """
    settings = list(dict.fromkeys(table[PLACE[:3]].itertuples(index=False, name=None)))
    if len(settings) != 1:
        raise ValueError(f"{len(settings)} settings, {settings}: give the records of one")
    ((dataset, model, setting),) = settings
    whole = TRAINING_IMAGES[dataset]
    ours, paper = summary(table), summary_of_paper()
    paper = paper[(paper["table"] == "IV") & (_beside(contents[0]) == (dataset, model))]
    figure, axes = plt.subplots(
        2, 1, figsize=(6.4, 7), sharex=True, sharey=True, layout="constrained"
    )
    looks = {
        "Merged only": (COLORS["earlier"], "o", "-"),
        "NP": (COLORS["np"], "o", "-"),
        "Finetune": (COLORS["finetune"], "s", "-"),
        "Finetune, tuned (ours)": (COLORS["finetune"], "D", ":"),
    }
    base = ours[(ours["method"] == "base_avg") & (ours["examples_per_class"] == "all")]
    for axis, aligned in zip(axes, _ALIGNED, strict=True):
        for name, (colour, marker, line) in looks.items():
            rows = _by_size(ours, _SIZE_METHODS[name] + aligned, whole)
            axis.plot(rows["k"], rows["mean"], line, marker=marker, ms=6, color=colour, label=name)
            low, high = (rows["mean"] + sign * rows["std"].fillna(0) for sign in (-1, 1))
            axis.fill_between(rows["k"], low, high, color=colour, alpha=0.15, lw=0)
            theirs = _by_size(paper, _SIZE_METHODS[name] + aligned, whole)
            if len(theirs):
                axis.plot(theirs["k"], theirs["mean"], "--", color=colour, lw=1)
        for value in base["mean"]:
            axis.axhline(
                value, color=COLORS["reference"], ls="-.", lw=1.2, label="Base models avg."
            )
        axis.set_title(f"after {label(aligned)}", fontsize=11)
        axis.set_ylabel("test accuracy (%)")
    if len(paper):
        axes[0].plot([], [], "--", color=COLORS["reference"], lw=1, label="the paper's")
    ticks = _by_size(ours, "permute", whole)
    axes[-1].set_xscale("log")
    axes[-1].set_xticks(ticks["k"], ticks["tick"])
    axes[-1].minorticks_off()
    axes[-1].set_xlabel("optimisation images a class (log scale)")
    figure.suptitle(place_label(dataset, model, setting), fontsize=12)
    _legend_below(figure, axes[0], ncols=2)
    return figure


_ALIGNED = ("permute", "weight_matching")
_SIZE_METHODS = {
    "Merged only": "",
    "NP": "np_",
    "Finetune": "finetune_",
    "Finetune, tuned (ours)": "finetune_tuned_",
}
_NOTHING = "–"  # noqa: RUF001


def _by_size(rows: pd.DataFrame, method: str, whole: int) -> pd.DataFrame:
    """A method's rows with ``k`` images a class and what the axis says there."""
    rows = rows[rows["method"] == method]
    sizes = rows["examples_per_class"].map(_images).clip(upper=whole)
    ticks = [f"all\n({whole})" if s == "all" else s for s in rows["examples_per_class"]]
    return rows.assign(k=sizes, tick=ticks).sort_values("k")


def _images(examples: int | str) -> float:
    return np.inf if examples == "all" else float(examples)


def _size_label(examples: str) -> str:
    return "all" if examples == "all" else f"{examples} a class"


def _beside(content: dict[str, Any]) -> tuple[str, str]:
    dataset, model = content["config"]["setting"]["beside"]
    return dataset, model


def _legend_below(figure: Figure, axis: Axes, *, ncols: int = 3, title: str | None = None) -> None:
    handles, names = axis.get_legend_handles_labels()
    figure.legend(
        handles, names, loc="outside lower center", ncols=ncols, frameon=False, title=title
    )


def _signed(points: float) -> str:
    return f"{points:+.1f}".replace("-", "\N{MINUS SIGN}")


def _plus_minus(mean: Any, std: Any) -> str:
    return f"{mean:.2f}" if np.isnan(std) else f"{mean:.2f} ± {std:.2f}"


def _mean_std(rows: pd.DataFrame, method: str) -> str:
    if method not in rows.index:
        return _NOTHING
    return _plus_minus(*rows.loc[method, ["mean", "std"]].to_numpy(float))
