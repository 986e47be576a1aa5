"""The ledger: every empirical claim of the paper, what its own tables say of it, and what records say."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from typing import Literal

import pandas as pd

from npmerge.aggregate import QUANTILES
from npmerge.experiments import EXPERIMENTS, load_profiles
from npmerge.methods import Combination
from npmerge.report.claims import (
    CLAIMS,
    FINETUNE,
    NP_MANY,
    NP_P,
    NP_WM,
    PERMUTE,
    WEIGHT_MATCHING,
    Claim,
    Group,
    decide,
)
from npmerge.report.numbers import Place, by_method, method_of, paper_summary, place_of, size_order
from npmerge.report.words import place_labels, signed
from npmerge.store.records import Record, table

MINUS = "\N{MINUS SIGN}"
WITHIN = 1.0
"""Points up to which two accuracies count as alike: our threshold, the paper gives none."""
FEW = 5
"""Images a class down to which the paper calls NP Merge stable."""
NEAR = 0.25
"""How far from one half a coefficient of alpha may lie and count as near: our threshold."""
POINTS, NATS, ALPHA = "points of accuracy", "hundredths of a nat", "hundredths of alpha"

Scores = Mapping[Place, Mapping[Combination, "pd.Series[float]"]]


@dataclass(frozen=True)
class Evidence:
    """The numbers of one experiment, the paper's or those of one profile.

    Attributes:
        scores: top-1 accuracies in percent by place and method, a value a seed.
        records: what they come from; the paper has none.
    """

    scores: Scores
    records: Sequence[Record] = ()


@dataclass(frozen=True)
class Entry:
    """An empirical claim of the paper.

    Attributes:
        experiment: the name of the experiment that tests it.
        section: where the paper makes it.
        text: what it says, in our words; a threshold that is ours is said.
        effects: what speaks for it, from the numbers of its experiment.
        unit: of the effects.
    """

    experiment: str
    section: str
    text: str
    effects: Callable[[Evidence], list[Group]]
    unit: str = POINTS

    @property
    def table(self) -> str:
        """The paper's table or figure with its numbers."""
        name = EXPERIMENTS[self.experiment].table
        return name if " " in name else f"Table {name}"


Outcome = Literal["reproduced", "not reproduced", "inconclusive", "not judged", "not run"]
ICONS: dict[Outcome, str] = {
    "reproduced": "\N{HEAVY CHECK MARK}",
    "not reproduced": "\N{HEAVY BALLOT X}",
    "inconclusive": "\N{ALMOST EQUAL TO}",
    "not judged": "\N{DOTTED CIRCLE}",
    "not run": "\N{EN DASH}",
}
"""A sign for each; words always stand beside it."""


@dataclass(frozen=True)
class Finding:
    """What the numbers of one profile, or the paper's, say about a claim.

    Attributes:
        status: as :func:`npmerge.report.claims.decide` says it; of the paper ``"borne out"``, ``"not borne out"`` or
            ``"no numbers"``.
        evidence: the comparison that decides, with its effect; empty without numbers.
    """

    status: str
    evidence: str

    @property
    def outcome(self) -> Outcome:
        """The status without its details."""
        known: tuple[Outcome, ...] = ("reproduced", "not reproduced", "inconclusive", "not run")
        return next((one for one in known if one == self.status), "not judged")


@dataclass(frozen=True)
class Row:
    """A claim with all that is known about it.

    Attributes:
        entry: the claim.
        paper: whether the paper's own tables bear it out.
        ours: what records say, by profile, the largest first; profiles that do not test it are left out.
    """

    entry: Entry
    paper: Finding
    ours: Mapping[str, Finding]

    @property
    def best(self) -> tuple[str, Finding]:
        """The profile that says most, and what it says: the largest that judges it, else the largest with numbers."""
        judged = ("reproduced", "not reproduced", "inconclusive")
        for wanted in (judged, ("not judged",), ("not run",)):
            for profile, finding in self.ours.items():
                if finding.outcome in wanted:
                    return profile, finding
        return "", Finding("not run", "")


def hold_claims(records: Mapping[str, Sequence[Record]]) -> list[Row]:
    """Every claim, held against the paper's tables and against records.

    Args:
        records: of any experiments by profile; those that today's configuration would not give are the caller's to
            leave out.
    """
    profiles = [*chain(*(load_profiles(demonstration=one) for one in (False, True)))]
    found = {
        (profile.name, name): _evidence(records.get(profile.name, ()), name)
        for profile in profiles
        for name in dict.fromkeys(entry.experiment for entry in ENTRIES)
        if EXPERIMENTS[name].parameters(profile) is not None
    }
    return [
        Row(
            entry,
            _in_paper(entry),
            {
                profile.name: Finding(
                    *decide(
                        entry.effects(found[profile.name, entry.experiment]),
                        demonstration=profile.demonstration,
                    )
                )
                for profile in profiles
                if (profile.name, entry.experiment) in found
            },
        )
        for entry in ENTRIES
    ]


def _evidence(records: Sequence[Record], experiment: str) -> Evidence:
    mine = [record for record in records if record.cell.experiment == experiment]
    return Evidence(by_method(table(mine)) if mine else {}, mine)


def _in_paper(entry: Entry) -> Finding:
    """The same effects, of the paper's means."""
    numbers = paper_summary(EXPERIMENTS[entry.experiment].table)
    scores = {
        place: {method: pd.Series([mean]) for method, (mean, _) in here.items()}
        for place, here in numbers.items()
    }
    groups = entry.effects(Evidence(scores))
    known = [{name: one for name, one in group.items() if one.notna().any()} for group in groups]
    if not all(known) or not known:
        return Finding("no numbers", "")
    best = [max((float(one.mean()), name) for name, one in group.items()) for group in known]
    effect, name = min(best)
    return Finding("borne out" if effect > 0 else "not borne out", f"{name}: {signed(effect)}")


def _everywhere(claim: Claim, evidence: Evidence) -> list[Group]:
    """The comparisons of a claim at every place that is asked for."""
    names = place_labels(evidence.scores)
    alone = len(names) == 1
    return [
        {name if alone else f"{name}, {names[place]}": one for name, one in group.items()}
        for place, here in evidence.scores.items()
        for group in claim.effects(here)
    ]


def _weight_matching_ahead(evidence: Evidence) -> list[Group]:
    """NP-WM's lead over NP-P in tournaments of models that saw different images."""
    claim = Claim("IV-E", "", NP_MANY[1:], NP_MANY[:1])
    split = {place: here for place, here in evidence.scores.items() if place.split is not None}
    return _everywhere(claim, Evidence(split))


def _more_in_resnets(evidence: Evidence) -> list[Group]:
    """NP Merge's lead over fine-tuning in residual networks, minus that in VGG."""
    leads = {
        kind: [
            {pair: here[pair[0]] - here[pair[1]] for pair in _learned(here)}
            for place, here in evidence.scores.items()
            if place.model.startswith(kind)
        ]
        for kind in ("resnet", "vgg")
    }
    return [
        {
            f"lead of {ours.label} over {theirs.label}, ResNet {MINUS} VGG": residual[ours, theirs]
            - plain[ours, theirs]
        }
        for residual in leads["resnet"]
        for plain in leads["vgg"]
        for ours, theirs in residual
        if (ours, theirs) in plain
    ]


_PAIRS = tuple(zip((NP_P, NP_WM), FINETUNE, strict=True))
_PERMUTE_FIRST = Claim("IV-C", "", (NP_P,), (NP_WM,))


def _learned(here: Mapping[Combination, pd.Series[float]]) -> list[tuple[Combination, Combination]]:
    return [pair for pair in _PAIRS if all(method in here for method in pair)]


def _alike(evidence: Evidence) -> list[Group]:
    """How much of the allowed distance is left between NP-P and NP-WM, on either side."""
    names = place_labels(evidence.scores)
    groups: list[Group] = []
    for place, here in evidence.scores.items():
        if NP_P in here and NP_WM in here:
            lead = here[NP_P] - here[NP_WM]
            groups += [
                {f"{WITHIN:g} {MINUS} |{NP_P.label} {MINUS} {NP_WM.label}|, {names[place]}": one}
                for one in (WITHIN - lead, WITHIN + lead)
            ]
    return groups


def _ordered(
    scores: Scores, key: Literal["examples", "models"]
) -> Iterator[list[tuple[Place, Mapping[Combination, pd.Series[float]]]]]:
    """Places that differ in nothing else, from few images or models to many."""
    groups: dict[Place, list[Place]] = {}
    for place in scores:
        plain = replace(place, examples=None) if key == "examples" else replace(place, models=2)
        groups.setdefault(plain, []).append(place)
    for places in groups.values():
        ordered = sorted(places, key=lambda one: (one.models, size_order(one.examples)))
        if len(ordered) > 1:
            yield [(place, scores[place]) for place in ordered]


def _shrinking_data(evidence: Evidence) -> list[Group]:
    """What each method loses from all images to the fewest."""
    groups: list[Group] = []
    for places in _ordered(evidence.scores, "examples"):
        (_, few), (_, many) = places[0], places[-1]
        groups += [
            {f"{method.label}, all images {MINUS} {places[0][0].examples} a class": many[method] - few[method]}
            for method in (PERMUTE, WEIGHT_MATCHING, NP_P, NP_WM, *FINETUNE)
            if method in few and method in many
        ]  # fmt: skip
    return groups


def _steadier(evidence: Evidence) -> list[Group]:
    """What fine-tuning loses down to a few images a class, minus what NP Merge loses."""
    groups: list[Group] = []
    for places in _ordered(evidence.scores, "examples"):
        known = {place.examples: here for place, here in places}
        if FEW not in known:
            continue
        few, many = known[FEW], places[-1][1]
        groups += [
            {f"loss of {theirs.label} {MINUS} loss of {ours.label}, all to {FEW} a class":
                (many[theirs] - few[theirs]) - (many[ours] - few[ours])}
            for ours, theirs in _learned(few) if ours in many and theirs in many
        ]  # fmt: skip
    return groups


def _growing(evidence: Evidence, *, split: bool, sign: int = 1, slack: float = 0.0) -> list[Group]:
    """What NP Merge gains, or loses, from the fewest to the most models, and how much it may lose."""
    groups: list[Group] = []
    for places in _ordered(evidence.scores, "models"):
        if (places[0][0].split is not None) != split:
            continue
        (first, few), (last, many) = places[0], places[-1]
        ends = (last.models, first.models)[::sign]
        groups += [
            {f"{method.label}, {ends[0]} {MINUS} {ends[1]} models"
                + f", and {slack:g}" * bool(slack): sign * (many[method] - few[method]) + slack}
            for method in NP_MANY if method in few and method in many
        ]  # fmt: skip
    return groups


def _overfitting(evidence: Evidence) -> list[Group]:
    """How much further fine-tuning's test loss lies above its last training loss than NP Merge's."""
    gaps: dict[Place, dict[Combination, dict[int, float]]] = {}
    for record in evidence.records:
        history = record.details.get("history")
        loss = [row.value for row in record.rows if row.metric == "loss"]
        if history and loss:
            here = gaps.setdefault(place_of(record), {})
            here.setdefault(method_of(record), {})[record.cell.seed] = 100 * (loss[0] - history[-1])
    names = place_labels(gaps)
    return [
        {f"gap of {theirs.label} {MINUS} gap of {ours.label}, {names[place]}":
            pd.Series(here[theirs], dtype=float) - pd.Series(here[ours], dtype=float)}
        for place, here in gaps.items()
        for ours, theirs in _PAIRS if ours in here and theirs in here
    ]  # fmt: skip


def _near_half(evidence: Evidence) -> list[Group]:
    """How far inside the allowed range the middle nine tenths of alpha lie at the end."""
    low, high = (QUANTILES.index(share) for share in (0.05, 0.95))
    rest: dict[tuple[Place, Combination], dict[int, float]] = {}
    for record in evidence.records:
        method = method_of(record)
        if method in (NP_P, NP_WM) and (spread := record.details.get("spread")):
            far = max(0.5 - spread[-1][low], spread[-1][high] - 0.5)
            here = rest.setdefault((place_of(record), method), {})
            here[record.cell.seed] = 100 * (NEAR - far)
    names = place_labels(place for place, _ in rest)
    return [
        {f"{100 * NEAR:g} {MINUS} reach of {method.label}, {names[place]}": pd.Series(one)}
        for (place, method), one in rest.items()
    ]


def _compared() -> Iterator[Entry]:
    """The paper's claims that a method is ahead of another."""
    for experiment, claims in CLAIMS.items():
        for claim in claims:
            if claim.section != "ours":
                yield Entry(experiment, claim.section, claim.text, partial(_everywhere, claim))


_MORE = (
    Entry(
        "same_data",
        "III-D",
        "NP overfits less than fine-tuning: its test loss lies less far above its training loss",
        _overfitting,
        NATS,
    ),
    Entry(
        "same_data",
        "III-D",
        f"alpha stays near one half (our threshold: nine tenths of it within {NEAR:g})",
        _near_half,
        ALPHA,
    ),
    Entry(
        "same_data",
        "IV-B",
        "the gain over fine-tuning is larger for ResNet20 on CIFAR-100 than for VGG11 on CIFAR-10",
        _more_in_resnets,
    ),
    Entry(
        "disjoint_splits",
        "IV-C",
        f"NP-P and NP-WM end alike (our threshold: within {WITHIN:g} point)",
        _alike,
    ),
    Entry(
        "disjoint_splits",
        "IV-C",
        "NP ends higher after Permute than after Weight Matching",
        partial(_everywhere, _PERMUTE_FIRST),
    ),
    Entry("data_size", "IV-D", "every method loses accuracy as the data shrink", _shrinking_data),
    Entry(
        "data_size",
        "IV-D",
        f"NP loses less than fine-tuning down to {FEW} images a class",
        _steadier,
    ),
    Entry(
        "many_models",
        "IV-E",
        "balanced: NP keeps its accuracy as models are added "
        f"(our threshold: it loses less than {WITHIN:g} point)",
        partial(_growing, split=False, slack=WITHIN),
    ),
    Entry(
        "many_models",
        "IV-E",
        "balanced: NP's accuracy rises as models are added",
        partial(_growing, split=False),
    ),
    Entry(
        "many_models",
        "IV-E",
        "unbalanced: NP's accuracy falls as models are added",
        partial(_growing, split=True, sign=-1),
    ),
    Entry("many_models", "IV-E", "unbalanced: NP-WM is ahead of NP-P", _weight_matching_ahead),
)
"""Claims that are no comparison of methods in one setting."""
ENTRIES: tuple[Entry, ...] = tuple(
    sorted(chain(_compared(), _MORE), key=lambda entry: EXPERIMENTS[entry.experiment].place)
)
"""The claims, experiment by experiment."""
