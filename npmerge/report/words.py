"""Names and sentences: what a column is called, numbers as text, where a record comes from."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from npmerge.methods import METHODS, Combination

if TYPE_CHECKING:
    from npmerge.report.numbers import Place, Size
    from npmerge.store.records import Provenance

NOTHING = "\N{EN DASH}"
"""What a table says where there is no number."""
STALE = "\N{DAGGER}"
"""Marks a record that was made under another configuration than today's."""


def place_labels(places: Iterable[Place]) -> dict[Place, str]:
    """How tables name their columns, e.g. ``"resnet20x1, cifar100, Dirichlet, 5 a class"``.

    The number of models is said where a place has more than two, and the setting's own name where the rest does not
    tell two places apart.

    Args:
        places: all that are named in one table.
    """
    known = list(dict.fromkeys(places))
    many = any(place.models != 2 for place in known)

    def words(place: Place) -> str:
        models = f"{place.models} models" * many
        split, images = (place.split or "").capitalize(), size_label(place.examples, "all images")
        return ", ".join(filter(None, (place.model, place.dataset, split, models, images)))

    count = Counter(map(words, known))
    return {
        place: words(place) + f" ({place.setting})" * (count[words(place)] > 1) for place in known
    }


def size_label(examples: Size, whole: str = "all") -> str:
    """How many optimisation images there are.

    Args:
        examples: images a class, ``"all"``, or ``None`` if nobody varies them.
        whole: stands for all of them.
    """
    if examples is None:
        return ""
    return whole if examples == "all" else f"{examples} a class"


def aggregation_label(method: Combination) -> str:
    """What a combination does after the alignment.

    Args:
        method: the combination.
    """
    return METHODS[method.aggregate].label + ", tuned (ours)" * method.tuned


def signed(points: float) -> str:
    """Percentage points with their sign and one decimal.

    Args:
        points: the number.
    """
    return f"{points:+.1f}".replace("-", "\N{MINUS SIGN}")


def plus_minus(mean: float, std: float) -> str:
    """Mean ± standard deviation.

    Args:
        mean: in percent.
        std: left out if it is NaN.
    """
    return f"{mean:.2f}" if math.isnan(std) else f"{mean:.2f} ± {std:.2f}"


def span(values: Iterable[float], form: str) -> str:
    """The lowest and the highest of some numbers; one of them if they look the same.

    Args:
        values: at least one.
        form: of :func:`format`.
    """
    known = list(values)
    ends = (format(end, form).replace("-", "\N{MINUS SIGN}") for end in (min(known), max(known)))
    return " to ".join(dict.fromkeys(ends))


def listed(words: Iterable[str], last: str = "and") -> str:
    """Words with commas between them, and a word before the last one.

    Args:
        words: at least one.
        last: the word, such as ``"or"``.
    """
    *most, end = words
    return f"{', '.join(most)} {last} {end}" if most else end


def duration(seconds: float | None) -> str:
    """Seconds as text, in the unit that suits them.

    Args:
        seconds: ``None`` if nobody knows.
    """
    if seconds is None:
        return "unknown"
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def device_text(provenance: Provenance) -> str:
    """The device of a record, and with how many threads.

    Args:
        provenance: a record's.
    """
    return f"{provenance.device}, threads: {provenance.threads}"


def short_revision(revision: str) -> str:
    """The first digits of a source's revision, ``+`` behind them if it was changed.

    Args:
        revision: from a record.
    """
    return revision.removeprefix("version ").removesuffix("+")[:8] + "+" * revision.endswith("+")


def seeds_text(seeds: Iterable[int]) -> str:
    """Seeds, each once.

    Args:
        seeds: in any order.
    """
    known = sorted(set(seeds))
    return f"seed{'s' * (len(known) > 1)} {', '.join(map(str, known))}"


def seed_count(count: int) -> str:
    """How many seeds there are, e.g. ``"3 seeds"``.

    Args:
        count: the number.
    """
    return f"{count} seed{'s' * (count != 1)}"


def stale_sentence(names: Sequence[str], count: int) -> str:
    """Says which records were made under another configuration than today's.

    Args:
        names: of their settings and seeds, each once a record.
        count: of all records shown.
    """
    where = ", ".join(dict.fromkeys(names))
    return (
        f"{STALE} {len(names)} of {count} records ({where}) were made under another configuration than today's. "
        "They are shown as they were found; a new run would make them again."
    )
