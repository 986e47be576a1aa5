"""The paper's claims as data, and verdicts: what records say about them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain

import pandas as pd

from npmerge import experiments
from npmerge.methods import Combination
from npmerge.report.margins import Margin, paired_margin
from npmerge.report.numbers import by_method, in_order, is_merged
from npmerge.report.words import place_labels, seed_count
from npmerge.store.records import Record, table

SEEDS = 3
"""Fewer give no verdict."""


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


Group = Mapping[str, "pd.Series[float]"]
"""Comparisons of which one must hold: each one's effect by seed, above zero where it speaks for the claim."""


@dataclass(frozen=True)
class Claim:
    """A statement of the paper with the comparisons it makes.

    Attributes:
        section: where the paper makes it; "ours" marks a check that the paper does not make.
        text: what it says, in our words.
        better: methods that must score higher ...
        worse: ... than these: one to one if there are equally many, else each than all.
        some: whether it is enough that one of them does: the paper says that NP Merge *can*.
    """

    section: str
    text: str
    better: tuple[Side, ...]
    worse: tuple[Side, ...]
    some: bool = False

    @property
    def pairs(self) -> list[tuple[Side, Side]]:
        """The comparisons, the better one first."""
        if len(self.better) == len(self.worse):
            return list(zip(self.better, self.worse, strict=True))
        return [(x, y) for x in self.better for y in self.worse]

    def effects(self, found: Mapping[Combination, pd.Series[float]]) -> list[Group]:
        """The margins of its comparisons in one setting, by seed.

        Args:
            found: the numbers of each method, from :func:`npmerge.report.numbers.by_method`.
        """
        margins = {
            f"{better.label} \N{MINUS SIGN} {worse.label}": _values(found, better)
            - _values(found, worse)
            for better, worse in self.pairs
        }
        return [margins] if self.some else [{name: one} for name, one in margins.items()]


@dataclass(frozen=True)
class Verdict:
    """What records say about a claim in one setting.

    Attributes:
        claim: the claim.
        place: where it was checked, as a reader would say it.
        status: see :func:`judge`.
        evidence: the comparison that decides and its margin, in percentage points; empty if nothing was run.
    """

    claim: Claim
    place: str
    status: str
    evidence: str

    @property
    def says(self) -> bool:
        """Whether there is more to it than that nothing was judged: a judgement, or a demonstration's margin."""
        return self.status != "not run" and "not judged" not in self.status


BASE, ENSEMBLE = Combination("base_models"), Combination("ensemble")
PERMUTE, WEIGHT_MATCHING, CCA = (
    Combination("mean", align) for align in ("permute", "weight_matching", "cca")
)
AVERAGED = (Combination("mean", "identity"), PERMUTE, WEIGHT_MATCHING)
NP_P, NP_WM = (Combination("np_merge", align) for align in ("permute", "weight_matching"))
FINETUNE = tuple(Combination("finetune", align) for align in ("permute", "weight_matching"))
NP_TUNED, FINETUNE_TUNED = (
    tuple(replace(method, tuned=True) for method in methods)
    for methods in ((NP_P, NP_WM), FINETUNE)
)
HALF_GAP = Midpoint(PERMUTE, ENSEMBLE, "half-way to the ensemble")


def _many(how: str, *methods: Combination) -> tuple[Combination, ...]:
    return tuple(replace(method, many=how) for method in methods)


def _earlier(section: str) -> tuple[Claim, ...]:
    """That NP Merge beats every earlier merging method; CCA Merge, which permutes nothing, in a line of its own."""
    rivals = {"direct averaging, Permute and Weight Matching": AVERAGED, "CCA Merge": (CCA,)}
    return tuple(
        Claim(section, f"NP-P and NP-WM beat {text}", (NP_P, NP_WM), theirs)
        for text, theirs in rivals.items()
    )


NP_MANY = _many("tournament", NP_P, NP_WM)

_TUNED = Claim(
    "ours",
    "tuned NP beats tuned fine-tuning, with equal steps, data and tuning",
    NP_TUNED,
    FINETUNE_TUNED,
)
_FINETUNED = "NP beats fine-tuning after the same alignment"
_SPLITS = (
    *_earlier("IV-C"),
    Claim("IV-C", "NP can beat the base models", (NP_P, NP_WM), (BASE,), some=True),
    Claim("IV-C", "NP can beat the ensemble", (NP_P, NP_WM), (ENSEMBLE,), some=True),
    Claim("IV-C", _FINETUNED, (NP_P, NP_WM), FINETUNE),
    _TUNED,
)

CLAIMS: dict[str, tuple[Claim, ...]] = {
    "same_data": (
        *_earlier("IV-B"),
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
        *(
            Claim(
                "IV-E",
                f"NP-P and NP-WM in a tournament beat {theirs.label}, all to one",
                NP_MANY,
                _many("all_to_one", theirs),
            )
            for theirs in (PERMUTE, CCA)
        ),
        Claim(
            "ours",
            "NP beats the same tournament with plain averaging",
            NP_MANY,
            _many("tournament", PERMUTE, WEIGHT_MATCHING),
        ),
        Claim(
            "ours",
            "NP-P beats a fine-tuning tournament of equal length",
            NP_MANY[:1],
            _many("tournament", FINETUNE[0]),
        ),
        Claim(
            "ours",
            "NP beats MergeMany",
            NP_MANY,
            _many("merge_many", WEIGHT_MATCHING),
        ),
    ),
}
"""Each experiment's claims by its name; one without has no verdicts."""


def judge(
    claim: Claim, found: Mapping[Combination, pd.Series[float]], *, demonstration: bool = False
) -> tuple[str, str]:
    """Hold a claim against the scores of one setting.

    Args:
        claim: the claim.
        found: the numbers of each method by seed, from :func:`npmerge.report.numbers.by_method`.
        demonstration: whether the profile is one; it is never judged.

    Returns:
        As :func:`decide`.
    """
    return decide(claim.effects(found), demonstration=demonstration)


def decide(groups: Sequence[Group], *, demonstration: bool = False) -> tuple[str, str]:
    """What effects say about a claim.

    A comparison holds if the 95% t-interval of its effect, over the seeds, lies above zero, and fails if it lies below.
    A group holds if one of its comparisons does, and fails if all of them do.

    Args:
        groups: all of which must hold.
        demonstration: whether the profile is one; it is never judged.

    Returns:
        The status: ``"reproduced"`` if every group holds, ``"not reproduced"`` if one fails, else ``"inconclusive"``;
        with fewer than :data:`SEEDS` seeds e.g. ``"1 seed: not judged"``; of a demonstration e.g. ``"demonstration:
        ahead by 1.2"``; ``"not run"`` if no seed has all the numbers: one that lacks some does not count. And the
        evidence: the comparison with the lowest interval, or with the smallest margin where none is judged.
    """
    every = {(at, name): one for at, group in enumerate(groups) for name, one in group.items()}
    whole = pd.DataFrame(dict(enumerate(every.values()))).dropna()
    if whole.empty:
        return "not run", ""
    margins = {key: paired_margin(whole[place]) for place, key in enumerate(every)}

    def decisive(key: Callable[[Margin], float]) -> tuple[Margin, str]:
        """The best comparison of the worst group."""
        best = [
            max(((margins[at, name], name) for name in group), key=lambda one: key(one[0]))
            for at, group in enumerate(groups)
        ]
        margin, name = min(best, key=lambda one: key(one[0]))
        return margin, f"{name}: {margin.text}"

    margin, evidence = decisive(lambda one: one.mean)
    if demonstration:
        return f"demonstration: {_ahead(margin.mean)}", evidence
    if margin.seeds < SEEDS:
        return f"{seed_count(margin.seeds)}: not judged", evidence
    margin, evidence = decisive(lambda one: one.high)
    if margin.high < 0:
        return "not reproduced", evidence
    margin, evidence = decisive(lambda one: one.low)
    return "reproduced" if margin.low > 0 else "inconclusive", evidence


def _ahead(points: float) -> str:
    size = f"{abs(points):.1f}"
    return "level" if size == "0.0" else f"{'ahead' if points > 0 else 'behind'} by {size}"


def verdicts(records: Sequence[Record]) -> list[Verdict]:
    """The verdict on each claim of the records' experiments in each of their settings.

    A method that no claim of an experiment names is held against NP Merge too.

    Args:
        records: of an experiment, or of several, each at one profile.
    """
    found = []
    for name in dict.fromkeys(record.cell.experiment for record in records):
        claims = CLAIMS.get(name, ())
        if not claims:
            continue
        mine = [record for record in records if record.cell.experiment == name]
        demonstration = experiments.load_profile(mine[0].cell.profile).demonstration
        wide = by_method(table(mine))
        labels = place_labels(wide)
        for claim in (*claims, *_beside(claims, in_order(chain(*wide.values())))):
            for place, here in wide.items():
                status, evidence = judge(claim, here, demonstration=demonstration)
                found.append(Verdict(claim, labels[place], status, evidence))
    return found


def _beside(claims: Sequence[Claim], methods: Iterable[Combination]) -> Iterator[Claim]:
    """Claims about the merging methods that no claim names."""
    named = dict.fromkeys(side for claim in claims for pair in claim.pairs for side in pair)
    ours = [m for m in named if isinstance(m, Combination) and m.family == "np" and not m.tuned]
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
