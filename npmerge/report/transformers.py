"""What records of transformers say: does NP Merge carry over, and what does matching heads bring?"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import pandas as pd

from npmerge import experiments
from npmerge.experiments.transformers import HEADS
from npmerge.methods import METHODS, Combination
from npmerge.report.captions import captioned, whose
from npmerge.report.claims import BASE, ENSEMBLE, SEEDS, Claim, Verdict, judge
from npmerge.report.margins import Margin, paired_margin
from npmerge.report.numbers import by_method
from npmerge.report.pages import told
from npmerge.report.words import listed, place_labels, seed_count, span
from npmerge.store.records import Record, table

Numbers = Mapping[Combination, "pd.Series[float]"]
"""Of one setting: each method's, by seed."""

ALIGNS = ("permute", "weight_matching", "cca")
AVERAGES = tuple(Combination("mean", align) for align in ALIGNS)
NP = tuple(Combination("np_merge", align, tuned=True) for align in ALIGNS)
FINETUNE = tuple(replace(method, aggregate="finetune") for method in NP)
_PAIRS = ((HEADS[0], HEADS[1]), (HEADS[2], HEADS[3]))
DIMENSIONS = ("one permutation for all heads", "one for each head")
"""How the dimensions inside heads are matched, in the order of the pairs of alignments that hold and match heads."""
CLAIMS = (
    Claim("ours", "NP beats the averages after the same alignments", NP, AVERAGES),
    Claim("ours", "NP beats fine-tuning, with equal steps, data and tuning", NP, FINETUNE),
    Claim("ours", "NP beats the base models", NP, (BASE,)),
    Claim("ours", "NP beats the ensemble", NP, (ENSEMBLE,)),
    *(
        Claim(
            "ours",
            f"matched heads beat held ones, {before}",
            tuple(Combination(aggregate, matched, tuned) for _, matched in _PAIRS),
            tuple(Combination(aggregate, held, tuned) for held, _ in _PAIRS),
        )
        for before, aggregate, tuned in (
            ("averaged", "mean", False),
            ("before NP Merge", "np_merge", True),
        )
    ),
)
"""What this project asks of transformers; the paper has none."""


def findings(records: Sequence[Record]) -> str:
    """What was found, as Markdown: a few sentences a setting.

    Args:
        records: of the experiment at one profile.

    Returns:
        How far averages get, NP Merge against fine-tuning, and what matching heads changes. Ranges are over the
        alignments, of means over the seeds; nothing is picked by its score.
    """
    found = by_method(table(records))
    names = place_labels(found)
    lines = [f"- **{names[place]}**: {' '.join(_sentences(here))}" for place, here in found.items()]
    return "\n".join(lines)


def _sentences(here: Numbers) -> Iterator[str]:
    averaged, learned = ([m for m in some if m in here] for some in (AVERAGES, NP))
    if averaged and BASE in here:
        yield (
            f"Averaged after {_after(averaged)}, two networks reach {_range(here, averaged)} % where each "
            f"alone has {here[BASE].mean():.1f} %."
        )
    rivals = [replace(method, aggregate="finetune") for method in learned]
    both = [(x, y) for x, y in zip(learned, rivals, strict=True) if y in here]
    if both:
        margins = [_margin(here, x, y) for x, y in both]
        yield (
            f"With NP Merge they reach {_range(here, [x for x, _ in both])} %, with fine-tuning tuned alike "
            f"{_range(here, [y for _, y in both])} %: {_lead(margins, [x for x, _ in both])}."
        )
    alone = Combination("np_merge", "identity", tuned=True)
    if alone in here:
        yield f"Without any alignment NP Merge reaches {_range(here, [alone])} %."
    heads = [
        f"{what} by {span((m.mean for m in margins), '+.1f')} points ({_beyond(margins)})"
        for what, aggregate, tuned in (
            ("an average", "mean", False),
            ("NP Merge", "np_merge", True),
        )
        if (margins := list(_heads(here, aggregate, tuned=tuned).values()))
    ]
    if heads:
        yield f"Heads that are matched, and not held in place, change {' and '.join(heads)}."


def heads_table(records: Sequence[Record]) -> pd.DataFrame:
    """Heads held in place against heads that are matched.

    Args:
        records: of the experiment at one profile.

    Returns:
        A row a setting, an aggregation and a way to match the dimensions inside heads: the mean accuracy with heads
        held and matched, in percent, and their margin in percentage points.
    """
    found = by_method(table(records))
    names = place_labels(found)
    rows = {}
    for place, here in found.items():
        for aggregate, tuned in (("mean", False), ("np_merge", True)):
            margins = _heads(here, aggregate, tuned=tuned)
            for (held, matched), inside in zip(_PAIRS, DIMENSIONS, strict=True):
                if (held, matched) in margins:
                    rows[names[place], METHODS[aggregate].label, inside] = {
                        "heads held": f"{here[Combination(aggregate, held, tuned)].mean():.1f}",
                        "heads matched": f"{here[Combination(aggregate, matched, tuned)].mean():.1f}",
                        "matched \N{MINUS SIGN} held": margins[held, matched].text,
                    }
    index = pd.MultiIndex.from_tuples(rows, names=["setting", "then", "dimensions of heads"])
    return captioned(
        pd.DataFrame(list(rows.values()), index=index),
        "Mean accuracy in percent with heads held in place and with heads matched, and the margin in percentage "
        f"points with its 95% interval from two seeds on ({whose(records)}).",
    )


def transformer_verdicts(records: Sequence[Record]) -> list[Verdict]:
    """The verdict on each of :data:`CLAIMS` in each setting.

    Args:
        records: of the experiment at one profile.
    """
    demonstration = experiments.load_profile(records[0].cell.profile).demonstration
    found = by_method(table(records))
    names = place_labels(found)
    return [
        Verdict(claim, names[place], *judge(claim, here, demonstration=demonstration))
        for claim in CLAIMS
        for place, here in found.items()
    ]


def verdict_tables(records: Sequence[Record]) -> list[pd.DataFrame | str]:
    """The verdicts, and the comparison that decides each.

    Args:
        records: of the experiment at one profile.
    """
    return told(transformer_verdicts(records))


def _heads(here: Numbers, aggregate: str, *, tuned: bool) -> dict[tuple[str, str], Margin]:
    """Matched minus held, by the alignments that hold and match."""
    return {
        (held, matched): _margin(here, second, first)
        for held, matched in _PAIRS
        if (first := Combination(aggregate, held, tuned)) in here
        and (second := Combination(aggregate, matched, tuned)) in here
    }


def _margin(here: Numbers, better: Combination, worse: Combination) -> Margin:
    return paired_margin((here[better] - here[worse]).dropna())


def _range(here: Numbers, methods: Sequence[Combination]) -> str:
    return span((float(here[method].mean()) for method in methods), ".1f")


def _after(methods: Sequence[Combination]) -> str:
    return listed((METHODS[str(method.align)].label for method in methods), "or")


def _lead(margins: Sequence[Margin], methods: Sequence[Combination]) -> str:
    """Who is ahead, after which alignments; with too few seeds only by how much."""
    size = f"{span((margin.mean for margin in margins), '+.1f')} points for NP Merge"
    ahead = [m for m, margin in zip(methods, margins, strict=True) if margin.low > 0]
    behind = [m for m, margin in zip(methods, margins, strict=True) if margin.high < 0]
    words = [
        f"{who} beyond the seeds' spread after {_after(some)}"
        for who, some in (("ahead", ahead), ("behind", behind))
        if some and not _few(margins)
    ]
    return f"{size}, {' and '.join(words) or _beyond(margins)}"


def _beyond(margins: Sequence[Margin]) -> str:
    """How many margins are larger than their intervals; of too few seeds none is judged."""
    beyond = sum(abs(margin.mean) > margin.half for margin in margins)
    return (
        _few(margins)
        or f"{beyond or 'none'} of {len(margins)} comparisons beyond the seeds' spread"
    )


def _few(margins: Sequence[Margin]) -> str:
    seeds = min(margin.seeds for margin in margins)
    return f"{seed_count(seeds)}: not judged" if seeds < SEEDS else ""
