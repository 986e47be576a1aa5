"""The paper's claims as data, and verdicts: what records say about them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Literal

import pandas as pd

from npmerge.methods import Combination
from npmerge.report.numbers import by_method, in_order, is_merged
from npmerge.report.words import place_labels, signed
from npmerge.store.records import Record, table

Status = Literal["reproduced", "not reproduced", "inconclusive", "not run"]


@dataclass(frozen=True)
class Midpoint:
    """The middle between the accuracies of two methods.

    Attributes:
        low, high: the methods.
        label: what evidence calls it.
    """

    low: Combination
    high: Combination
    label: str


Side = Combination | Midpoint
"""What a claim compares."""


@dataclass(frozen=True)
class Claim:
    """A statement of the paper with the comparisons it makes.

    Attributes:
        section: where the paper makes it; "ours" marks a check that the paper does not make.
        text: what it says, in our words.
        better: methods that must score higher ...
        worse: ... than these: one to one if there are equally many, else each than all.
    """

    section: str
    text: str
    better: tuple[Side, ...]
    worse: tuple[Side, ...]

    @property
    def pairs(self) -> list[tuple[Side, Side]]:
        """The comparisons, the better one first."""
        if len(self.better) == len(self.worse):
            return list(zip(self.better, self.worse, strict=True))
        return [(x, y) for x in self.better for y in self.worse]


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


BASE, ENSEMBLE = Combination("base_models"), Combination("ensemble")
PERMUTE, WEIGHT_MATCHING, CCA = (
    Combination("mean", align) for align in ("permute", "weight_matching", "cca")
)
EARLIER = (Combination("mean", "identity"), PERMUTE, WEIGHT_MATCHING, CCA)
NP_P, NP_WM = (Combination("np_merge", align) for align in ("permute", "weight_matching"))
FINETUNE = tuple(Combination("finetune", align) for align in ("permute", "weight_matching"))
TUNED = tuple(replace(method, tuned=True) for method in FINETUNE)
HALF_GAP = Midpoint(PERMUTE, ENSEMBLE, "half-way to the ensemble")


def _many(how: str, *methods: Combination) -> tuple[Combination, ...]:
    return tuple(replace(method, many=how) for method in methods)


NP_P_MANY, NP_WM_MANY = _many("tournament", NP_P, NP_WM)
ALL_TO_ONE = _many("all_to_one", PERMUTE, CCA)

_TUNED = Claim("ours", "NP beats fine-tuning with a tuned learning rate", (NP_P, NP_WM), TUNED)
_FINETUNED = "NP beats fine-tuning after the same alignment"
_SPLITS = (
    Claim("IV-C", "NP-P beats every earlier merging method", (NP_P,), EARLIER),
    Claim("IV-C", "NP-WM beats every earlier merging method", (NP_WM,), EARLIER),
    Claim("IV-C", "NP beats the base models", (NP_P, NP_WM), (BASE,)),
    Claim("IV-C", "NP beats the ensemble", (NP_P, NP_WM), (ENSEMBLE,)),
    Claim("IV-C", _FINETUNED, (NP_P, NP_WM), FINETUNE),
    _TUNED,
)

CLAIMS: dict[str, tuple[Claim, ...]] = {
    "same_data": (
        Claim("IV-B", "NP-P beats every earlier merging method", (NP_P,), EARLIER),
        Claim("IV-B", "NP-WM beats every earlier merging method", (NP_WM,), EARLIER),
        Claim(
            "IV-B",
            "NP beats fine-tuning, both at the paper's learning rate",
            (NP_P, NP_WM),
            FINETUNE,
        ),
        Claim(
            "IV-B",
            "NP-P closes at least half of the gap from Permute to the ensemble",
            (NP_P,),
            (HALF_GAP,),
        ),
        _TUNED,
    ),
    "disjoint_splits": _SPLITS,
    "imagenet": _SPLITS,
    "data_size": (
        Claim(
            "IV-D",
            "NP beats the merged model without optimisation",
            (NP_P, NP_WM),
            (PERMUTE, WEIGHT_MATCHING),
        ),
        Claim("IV-D", _FINETUNED, (NP_P, NP_WM), FINETUNE),
        _TUNED,
    ),
    "many_models": (
        Claim("IV-E", "NP-P beats Permute and CCA, all to one", (NP_P_MANY,), ALL_TO_ONE),
        Claim("IV-E", "NP-WM beats Permute and CCA, all to one", (NP_WM_MANY,), ALL_TO_ONE),
        Claim(
            "ours",
            "NP beats the same tournament with plain averaging",
            (NP_P_MANY, NP_WM_MANY),
            _many("tournament", PERMUTE, WEIGHT_MATCHING),
        ),
        Claim(
            "ours",
            "NP-P beats a fine-tuning tournament of equal length",
            (NP_P_MANY,),
            _many("tournament", FINETUNE[0]),
        ),
        Claim(
            "ours",
            "NP beats MergeMany",
            (NP_P_MANY, NP_WM_MANY),
            _many("merge_many", WEIGHT_MATCHING),
        ),
    ),
}
"""Each experiment's claims by its name; one without has no verdicts."""


def judge(claim: Claim, found: Mapping[Combination, pd.Series[float]]) -> tuple[Status, str]:
    """Hold a claim against the scores of one setting.

    Args:
        claim: the claim.
        found: the numbers of each method by seed, from :func:`npmerge.report.numbers.by_method`.

    Returns:
        The status and the evidence; see :class:`Verdict`.
    """
    margins = {pair: _values(found, pair[0]) - _values(found, pair[1]) for pair in claim.pairs}
    if any(margin.empty or margin.isna().any() for margin in margins.values()):
        return "not run", ""
    (better, worse), margin = min(margins.items(), key=lambda item: item[1].mean())
    evidence = f"{better.label} \N{MINUS SIGN} {worse.label}: {signed(margin.mean())}"
    if len(margin) < 2:
        return "inconclusive", f"{evidence} (one seed)"
    if all((m > 0).all() for m in margins.values()):
        return "reproduced", evidence
    if any((m <= 0).all() for m in margins.values()):
        return "not reproduced", evidence
    return "inconclusive", f"{evidence} (seeds disagree)"


def verdicts(records: Sequence[Record]) -> list[Verdict]:
    """The verdict on each claim of the records' experiments in each of their settings.

    A method that no claim of an experiment names is held against NP Merge too.

    Args:
        records: of an experiment, or of several.
    """
    found = []
    for name in dict.fromkeys(record.cell.experiment for record in records):
        claims = CLAIMS.get(name, ())
        if not claims:
            continue
        wide = by_method(table([record for record in records if record.cell.experiment == name]))
        labels = place_labels(wide)
        for claim in (*claims, *_beside(claims, in_order(chain(*wide.values())))):
            for place, here in wide.items():
                found.append(Verdict(claim, labels[place], *judge(claim, here)))
    return found


def _beside(claims: Sequence[Claim], methods: Iterable[Combination]) -> Iterator[Claim]:
    """Claims about the merging methods that no claim names."""
    named = dict.fromkeys(side for claim in claims for pair in claim.pairs for side in pair)
    ours = [m for m in named if isinstance(m, Combination) and m.family == "np"]
    for method in methods:
        if method not in named and is_merged(method):
            rivals = [m for m in ours if m.align == method.align] or ours
            text = " and ".join(m.label for m in rivals)
            yield Claim(
                "ours",
                f"{text} beat{'s' * (len(rivals) == 1)} {method.label}",
                tuple(rivals),
                (method,),
            )


def _values(found: Mapping[Combination, pd.Series[float]], side: Side) -> pd.Series[float]:
    if isinstance(side, Midpoint):
        return (_values(found, side.low) + _values(found, side.high)) / 2
    return found.get(side, pd.Series(dtype=float))
