"""The paper's numbers, and its claims as checks that records are held against."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Literal

import pandas as pd

Status = Literal["reproduced", "not reproduced", "inconclusive", "not run"]

METHODS = {
    "base_avg": "Base models avg.",
    "ensemble": "Ensemble",
    "direct": "Direct averaging",
    "permute": "Permute",
    "weight_matching": "Weight Matching",
    "cca": "CCA Merge",
    "finetune_permute": "Finetune-P",
    "finetune_weight_matching": "Finetune-WM",
    "finetune_tuned_permute": "Finetune-P, tuned (ours)",
    "finetune_tuned_weight_matching": "Finetune-WM, tuned (ours)",
    "np_permute": "NP-P",
    "np_weight_matching": "NP-WM",
    "merge_many": "MergeMany (ours)",
    "tournament_permute": "Averaging tournament, P (ours)",
    "tournament_weight_matching": "Averaging tournament, WM (ours)",
}
"""The methods in the tables' order, with the paper's labels; "(ours)" marks a control that the paper does not have."""


def numbers() -> pd.DataFrame:
    """The paper's 90 numbers, with the columns of a record, ``mean`` and ``std`` in percent."""
    with (files("npmerge") / "paper.csv").open() as file:
        return pd.read_csv(file)


@dataclass(frozen=True)
class Claim:
    """A statement of the paper with the comparisons it makes.

    Attributes:
        section: where the paper makes it.
        text: what it says, in our words.
        better: methods that must score higher ...
        worse: ... than these: one to one if there are equally many, else each than all.
    """

    section: str
    text: str
    better: tuple[str, ...]
    worse: tuple[str, ...]


@dataclass(frozen=True)
class Verdict:
    """What records say about a claim in one setting.

    Attributes:
        claim: the claim.
        place: where it was checked, as a reader would say it.
        status: ``"reproduced"`` if every comparison holds in every seed, ``"not reproduced"`` if one fails in every
            seed, ``"inconclusive"`` if seeds disagree or there is only one, ``"not run"`` if a number is missing.
        evidence: the comparison with the smallest margin, in percentage points.
    """

    claim: Claim
    place: str
    status: Status
    evidence: str


PLACE = ["dataset", "model", "setting", "examples_per_class"]
"""What tells one column of a table from another."""

_MERGING = ("direct", "permute", "weight_matching", "cca")
_NP = ("np_permute", "np_weight_matching")
_FINETUNE = ("finetune_permute", "finetune_weight_matching")
_TUNED = ("finetune_tuned_permute", "finetune_tuned_weight_matching")

_SPLITS = (
    Claim("IV-C", "NP-P beats every earlier merging method", ("np_permute",), _MERGING),
    Claim("IV-C", "NP-WM beats every earlier merging method", ("np_weight_matching",), _MERGING),
    Claim("IV-C", "NP beats the base models", _NP, ("base_avg",)),
    Claim("IV-C", "NP beats the ensemble", _NP, ("ensemble",)),
    Claim("IV-C", "NP beats fine-tuning after the same alignment", _NP, _FINETUNE),
    Claim("ours", "NP beats fine-tuning with a tuned learning rate", _NP, _TUNED),
)

CLAIMS: dict[str, tuple[Claim, ...]] = {
    "same_data": (
        Claim(
            "IV-B",
            "NP-P beats every earlier merging method",
            ("np_permute",),
            _MERGING,
        ),
        Claim(
            "IV-B",
            "NP-WM beats every earlier merging method",
            ("np_weight_matching",),
            _MERGING,
        ),
        Claim(
            "IV-B",
            "NP beats fine-tuning, both at the paper's learning rate",
            ("np_permute", "np_weight_matching"),
            ("finetune_permute", "finetune_weight_matching"),
        ),
        Claim(
            "IV-B",
            "NP-P closes at least half of the gap from Permute to the ensemble",
            ("np_permute",),
            ("half_gap",),
        ),
        Claim(
            "ours",
            "NP beats fine-tuning with a tuned learning rate",
            ("np_permute", "np_weight_matching"),
            ("finetune_tuned_permute", "finetune_tuned_weight_matching"),
        ),
    ),
    "disjoint_splits": _SPLITS,
    "imagenet": _SPLITS,
    "data_size": (
        Claim(
            "IV-D",
            "NP beats the merged model without optimisation",
            _NP,
            ("permute", "weight_matching"),
        ),
        Claim("IV-D", "NP beats fine-tuning after the same alignment", _NP, _FINETUNE),
        Claim("ours", "NP beats fine-tuning with a tuned learning rate", _NP, _TUNED),
    ),
    "many_models": (
        Claim(
            "IV-E", "NP-P beats Permute and CCA, all to one", ("np_permute",), ("permute", "cca")
        ),
        Claim(
            "IV-E",
            "NP-WM beats Permute and CCA, all to one",
            ("np_weight_matching",),
            ("permute", "cca"),
        ),
        Claim(
            "ours",
            "NP beats the same tournament with plain averaging",
            _NP,
            ("tournament_permute", "tournament_weight_matching"),
        ),
        Claim(
            "ours",
            "NP-P beats a fine-tuning tournament of equal length",
            ("np_permute",),
            ("finetune_permute",),
        ),
        Claim("ours", "NP beats MergeMany", _NP, ("merge_many",)),
    ),
    "cost": (),
}
"""Each experiment's claims; the section "ours" marks a check that the paper does not make."""


def scores(table: pd.DataFrame) -> pd.DataFrame:
    """Top-1 accuracies: a row for each (dataset, model, setting, examples a class, seed), a column for each method.

    Args:
        table: from :func:`npmerge.results.table`.

    Returns:
        Percent; ``half_gap`` is the middle between Permute and the ensemble.
    """
    top1 = table[table["metric"] == "top1"].fillna({"examples_per_class": ""})
    top1 = top1.astype({"examples_per_class": str})
    wide = top1.pivot_table(index=[*PLACE, "seed"], columns="method", values="value", sort=False)
    if {"permute", "ensemble"} <= set(wide.columns):
        wide["half_gap"] = (wide["permute"] + wide["ensemble"]) / 2
    return wide


def judge(claim: Claim, found: pd.DataFrame) -> tuple[Status, str]:
    """Hold a claim against the scores of one setting.

    Args:
        claim: the claim.
        found: rows of :func:`scores`, one a seed.

    Returns:
        The status and the evidence; see :class:`Verdict`.
    """
    pairs = _pairs(claim)
    if not {method for pair in pairs for method in pair} <= set(found.columns):
        return "not run", ""
    margins = {pair: found[pair[0]] - found[pair[1]] for pair in pairs}
    tightest = min(margins, key=lambda pair: margins[pair].mean())
    margin = margins[tightest]
    evidence = f"{label(tightest[0])} \N{MINUS SIGN} {label(tightest[1])}: {signed(margin.mean())}"
    if margin.isna().any():
        return "not run", ""
    if len(found) < 2:
        return "inconclusive", f"{evidence} (one seed)"
    if all((m > 0).all() for m in margins.values()):
        return "reproduced", evidence
    if any((m <= 0).all() for m in margins.values()):
        return "not reproduced", evidence
    return "inconclusive", f"{evidence} (seeds disagree)"


def verdicts(experiment: str, table: pd.DataFrame) -> list[Verdict]:
    """The verdict on each claim of an experiment in each of its settings.

    Args:
        experiment: its name.
        table: from :func:`npmerge.results.table`.
    """
    found = scores(table)
    return [
        Verdict(claim, place_label(*map(str, place)), *judge(claim, rows))
        for claim in CLAIMS[experiment]
        for place, rows in found.groupby(level=PLACE, sort=False)
    ]


def place_label(dataset: str, model: str, setting: str, examples: object = "") -> str:
    """How the tables name a column.

    Args:
        dataset: the data set.
        model: the network with its width.
        setting: the split, as in the records.
        examples: optimisation images a class, if the experiment varies them.
    """
    split = {"same": "", "split_80_20": ", 80-20", "dirichlet": ", Dirichlet"}.get(
        setting, f", {setting}"
    )
    known = {"all": ", all images"} | dict.fromkeys(("", "nan", "None"), "")
    return f"{model}, {dataset}{split}{known.get(str(examples), f', {examples} a class')}"


def signed(points: float) -> str:
    """Percentage points with their sign and one decimal.

    Args:
        points: the number.
    """
    return f"{points:+.1f}".replace("-", "\N{MINUS SIGN}")


def label(method: str) -> str:
    """The paper's label of a method."""
    return {"half_gap": "half-way to the ensemble"}.get(method) or METHODS.get(method, method)


def _pairs(claim: Claim) -> Sequence[tuple[str, str]]:
    if len(claim.better) == len(claim.worse):
        return list(zip(claim.better, claim.worse, strict=True))
    return [(x, y) for x in claim.better for y in claim.worse]
