"""The tables and figures of the chapter on what alpha learns."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from npmerge.methods import FAMILIES, METHODS
from npmerge.report.captions import captioned, whose
from npmerge.report.margins import paired_margin
from npmerge.report.numbers import Place, method_of, place_of
from npmerge.report.plots import MODELS, describe, panels
from npmerge.report.words import listed, place_labels, plus_minus, signed
from npmerge.store.records import Record

WORDS = {
    "model": "one for the model",
    "layer": "one for each layer",
    "tensor": "one for each tensor",
    "channel": "one for each channel",
    "parameter": "one for each parameter",
}
"""What a soup's levels are called."""
MANY = 100
"""A tensor of fewer coefficients is not asked what they go with: chance alone gives large correlations."""
CORRELATIONS = {
    "fisher": ("alpha with A's share of the Fisher information", FAMILIES["fisher"], "o"),
    "size": ("alpha with A's share of the absolute value", "#8661A8", "^"),
    "distance": ("|alpha − ½| with |A − B′|", "#8C6D31", "s"),  # noqa: RUF001
}
"""What a rank correlation is between, its colour and its marker."""

Scores = dict[str, "pd.Series[float]"]


def coefficients_table(records: Sequence[Record]) -> pd.DataFrame:
    """How good a merge is with few and with many coefficients.

    Args:
        records: of ``coefficients`` at one profile.

    Returns:
        A row a variant, of the setting that has them: how many numbers are learned, the accuracy, and how far it is
        from NP Merge's, paired over the seeds.
    """
    scores, counts = _variants(records)
    reference = scores["NP Merge"]
    rows = {
        name: {
            "numbers learned": f"{counts[name]:,}" if name in counts else "0",
            "accuracy": plus_minus(values.mean(), values.std()),
            "minus NP Merge": _margin(values, reference),
        }
        for name, values in scores.items()
    }
    place = _places(records)[0]
    return captioned(
        pd.DataFrame.from_dict(rows, orient="index"),
        "Top-1 accuracy on the full test set in percent, mean ± standard deviation over the seeds, after Permute, of "
        f"{place_labels([place])[place]} ({whose(records)}). What learns has NP Merge's learning rate and steps.",
    )


def plot_coefficients(records: Sequence[Record]) -> Figure:
    """Accuracy against the number of coefficients; dots are means, ticks single seeds.

    Args:
        records: of ``coefficients`` at one profile.
    """
    scores, counts = _variants(records)
    figure, (axis,) = panels([3.6])
    levels = [name for name in counts if name.startswith("one for") or name == "NP Merge"]
    means = {name: float(scores[name].mean()) for name in scores}
    axis.plot(
        [counts[name] for name in levels], [means[name] for name in levels],
        color=FAMILIES["soup"], lw=1.5, zorder=1,
    )  # fmt: skip
    for number, name in enumerate(levels):
        colour = FAMILIES["np" if name == "NP Merge" else "soup"]
        axis.plot([counts[name]] * len(scores[name]), scores[name], "_", color=colour, ms=9)
        axis.plot(counts[name], means[name], "o", color=colour, ms=7)
        axis.annotate(
            f"{name.rpartition(' ')[2] if name != 'NP Merge' else name} {means[name]:.1f}",
            (counts[name], means[name]), xytext=(0, -16 if number % 2 or name == "NP Merge" else 9),
            textcoords="offset points", ha="left" if number == 0 else "right" if name == "NP Merge" else "center",
        )  # fmt: skip
    for name, family, above in (
        ("Average", "averaging", 3), ("Ensemble", "reference", 3), ("Fine-tuning", "finetune", -13),
    ):  # fmt: skip
        if name in means:
            axis.axhline(means[name], color=FAMILIES[family], ls="--", lw=1)
            axis.annotate(
                f"{name} {means[name]:.1f}", (2000, means[name]), xytext=(0, above),
                textcoords="offset points", color=FAMILIES[family],
            )  # fmt: skip
    axis.set_xscale("log")
    axis.set(xlabel="numbers learned", ylabel="test accuracy (%)")
    axis.margins(y=0.15)
    one, gap = (means[name] - means["Average"] for name in (WORDS["model"], "NP Merge"))
    alt = "; ".join(f"{name}: {mean:.1f} %" for name, mean in means.items())
    title = (
        f"One learned number for the whole model brings {signed(one)} points over the average, "
        f"one for each parameter {signed(gap)}"
    )
    return describe(figure, alt, title)


def plot_explained(records: Sequence[Record]) -> Figure | None:
    """What the coefficients of each tensor go with, from the first layer to the last, as rank correlations.

    Args:
        records: of ``coefficients`` at one profile.

    Returns:
        ``None`` where no record tells.
    """
    kept = [record for record in records if "explained" in record.details]
    if not kept:
        return None
    places = list(dict.fromkeys(map(place_of, kept)))
    names = place_labels(places)
    figure, axes = panels([2.3] * len(places), sharex=True, sharey=True)
    largest = 0.0
    for axis, place in zip(axes, places, strict=True):
        found = _correlations([record for record in kept if place_of(record) == place])
        for word, (label, colour, marker) in CORRELATIONS.items():
            values = found[word]
            largest = max(largest, *map(abs, values))
            axis.plot(values, marker, color=colour, ms=5, label=label, alpha=0.85)
        axis.axhline(0, color="black", lw=0.8)
        axis.set(ylim=(-1, 1), ylabel="rank correlation")
        axis.set_title(names[place])
    axes[-1].set_xlabel("weight tensors, from the input to the output")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower left", ncols=1)
    title = f"What alpha goes with, of what can be measured beforehand: rank correlations within ±{largest:.2f}"
    return describe(
        figure, "Three rank correlations for every weight tensor, means over the seeds", title
    )


def plot_class_shares(records: Sequence[Record]) -> Figure | None:
    """The mean coefficient of each class's weights in the last layer against the share of its images that A saw.

    Args:
        records: of ``coefficients`` at one profile.

    Returns:
        ``None`` where no record tells.
    """
    kept = [record for record in records if "alpha_of_class" in record.details]
    if not kept:
        return None
    share, alpha = _class_shares(kept)
    figure, (axis,) = panels([2.8])
    mostly = share > 0.5
    for name, mask in (("A", mostly), ("B", ~mostly)):
        axis.plot(share[mask], alpha[mask], ".", color=MODELS[name], ms=7, alpha=0.6)
        axis.annotate(
            f"{name} saw more:\nmean {alpha[mask].mean():.3f}", (float(np.median(share[mask])), 0.98),
            xycoords=("data", "axes fraction"), ha="center", va="top", color=MODELS[name],
        )  # fmt: skip
    axis.axhline(0.5, color="black", lw=0.8, ls=":")
    axis.set(xlabel="share of the class's images that A saw", xlim=(0, 1))
    axis.set_ylabel("mean α of its row")  # noqa: RUF001
    axis.margins(y=0.35)
    difference = alpha[mostly].mean() - alpha[~mostly].mean()
    side = (
        "toward the model that saw the class"
        if difference > 0
        else "away from the model that saw the class"
    )
    title = f"In the last layer alpha leans {side}, by {abs(difference):.3f} on average"
    return describe(figure, "Each dot is a class and a seed", title)


def findings(records: Sequence[Record]) -> str:
    """What the records say, in sentences.

    Args:
        records: of ``coefficients`` at one profile.
    """
    if not records:
        return "There are no records of this yet."
    scores, counts = _variants(records)
    reference = scores["NP Merge"]
    average = scores["Average"]
    lines = [
        f"With {counts[name]:,} learned number{'s' * (counts[name] > 1)} ({name}): "
        f"{_margin(scores[name], average)} points against the average, and {_margin(scores[name], reference)} against "
        f"NP Merge, which learns {counts['NP Merge']:,}."
        for name in (WORDS["model"], WORDS["channel"])
        if name in scores
    ]
    if WORDS["model"] in scores:
        lines.append(
            f"That one number ends {listed(dict.fromkeys(_ends(records)), 'or')}. Near 0 or 1 the merge is nearly one "
            f"of its parents, whose average accuracy is {scores['Base models avg.'].mean():.1f} %."
        )
    for name, words in (
        (
            "without the sigmoid",
            "Without the sigmoid, so that weights may leave the segment between the parents, NP Merge gains",
        ),
        (
            "started at Fisher weights",
            "Started at the Fisher weights instead of one half, it gains",
        ),
    ):
        if name in scores:
            lines.append(f"{words} {_margin(scores[name], reference)} points.")
    told = [record for record in records if "explained" in record.details]
    if told:
        found = _correlations(told)
        means = ", ".join(
            f"{np.mean(found[word]):+.2f} ({label})".replace("-", "\N{MINUS SIGN}")
            for word, (label, *_) in CORRELATIONS.items()
        )
        lines.append(f"Mean rank correlations over the weight tensors: {means}.")
    split = [record for record in records if "alpha_of_class" in record.details]
    if split:
        share, alpha = _class_shares(split)
        lines.append(
            f"In the last layer, alpha is {alpha[share > 0.5].mean():.3f} on average for classes that A saw most of, "
            f"and {alpha[share <= 0.5].mean():.3f} for the others."
        )
    return "\n".join(f"- {line}" for line in lines)


def _variants(records: Sequence[Record]) -> tuple[Scores, dict[str, int]]:
    """The accuracies by what is learned, and how many numbers that is, of the setting that has the variants."""
    place = _places(records)[0]
    values: dict[str, dict[int, float]] = defaultdict(dict)
    counts: dict[str, int] = {}
    for record in records:
        name = _name(record)
        if place_of(record) != place or name is None:
            continue
        values[name][record.cell.seed] = next(r.value for r in record.rows if r.metric == "top1")
        if "coefficients" in record.details:
            counts[name] = record.details["coefficients"]
    every = max(counts.values())
    counts |= {name: every for name in ("NP Merge", "Fine-tuning") if name in values}
    order = sorted(
        values,
        key=lambda name: (counts.get(name, 0), name != "Average", name in ("Ensemble", "NP Merge")),
    )
    return {name: pd.Series(values[name]) for name in order}, {
        n: counts[n] for n in order if n in counts
    }


def _places(records: Sequence[Record]) -> list[Place]:
    """The setting with the variants first."""
    soups = [r for r in records if method_of(r).aggregate == "learned_soup"]
    return list(dict.fromkeys(map(place_of, [*soups, *records])))


def _name(record: Record) -> str | None:
    """What a record's row is called."""
    method = method_of(record)
    if method.aggregate == "learned_soup":
        options = record.config["aggregate"]["options"]
        if not options["bounded"]:
            return "without the sigmoid"
        if options["start"] == "fisher":
            return "started at Fisher weights"
        return WORDS[options["level"]]
    if method.aggregate == "base_models":
        return "Base models avg." if method.correct else None
    return METHODS[method.aggregate].label


def _ends(records: Sequence[Record]) -> list[str]:
    """Between what a soup's one coefficient lies at the end, seed by seed; its record has a histogram."""
    found = []
    for record in records:
        if _name(record) == WORDS["model"]:
            counts = next(iter(record.details["alpha"].values()))
            low = counts.index(max(counts)) / len(counts)
            found.append(f"between {low:.2f} and {low + 1 / len(counts):.2f}")
    return found


def _margin(values: pd.Series[float], reference: pd.Series[float]) -> str:
    difference = (values - reference).dropna()
    found = paired_margin(difference)
    return signed(found.mean) + (f" ± {found.half:.1f}" if found.seeds > 1 else "")


def _correlations(records: Sequence[Record]) -> dict[str, list[float]]:
    """By what it is between, the mean rank correlation of every large weight tensor, in the network's order."""
    found: dict[str, dict[str, list[float]]] = {word: defaultdict(list) for word in CORRELATIONS}
    for record in records:
        for tensor, values in record.details["explained"].items():
            if values["numbers"] >= MANY:
                for word in CORRELATIONS.keys() & values.keys():
                    found[word][tensor].append(values[word])
    return {w: [float(np.mean(v)) for v in tensors.values()] for w, tensors in found.items()}


def _class_shares(records: Sequence[Record]) -> tuple[np.ndarray, np.ndarray]:
    """A's share of each class's images, and the mean coefficient of the class."""
    seen = np.concatenate([np.array(record.details["seen"]) for record in records], axis=1)
    alpha = np.concatenate([record.details["alpha_of_class"] for record in records])
    return seen[0] / seen.sum(0), alpha
