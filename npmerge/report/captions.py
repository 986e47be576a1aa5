"""Captions of tables: what a table shows, and at which scale its numbers were made."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from html import escape

import pandas as pd

from npmerge.experiments import EXPERIMENTS, load_profile
from npmerge.report.words import listed, seeds_text
from npmerge.store.records import Record

PAPER = "paper"
"""The profile with the paper's protocol; the base training in it is that of the authors' earlier code."""


class Captioned(pd.DataFrame):
    """A table that says in a sentence what it shows.

    Attributes:
        caption: the sentence.
        folded: whether a page shows the sentence alone until its reader opens the table.
    """

    _metadata = ["caption", "folded"]  # noqa: RUF012 (pandas asks for a list)
    caption: str
    folded: bool

    def _repr_html_(self) -> str:
        table, said = self.to_html(), escape(self.caption, quote=False)
        if self.empty:
            return f"<p>{said}</p>"
        if self.folded:
            return f"<details><summary>{said}</summary>\n{table}\n</details>"
        return table.replace(">", f">\n  <caption>{said}</caption>", 1)


def captioned(table: pd.DataFrame, caption: str, *, folded: bool = False) -> Captioned:
    """A table with a caption.

    Args:
        table: what is shown.
        caption: a sentence that says what it shows.
        folded: whether it is long, and evidence more than a finding.
    """
    result = Captioned(table)
    result.caption, result.folded = caption, folded
    return result


def whose(records: Sequence[Record], *, paper: bool = False) -> str:
    """Whose numbers a table has, e.g. ``"profile short, seeds 0, 1"``.

    Args:
        records: of one experiment at one profile.
        paper: whether the paper's numbers stand beside them; then it also says at which scale both were made.
    """
    cell = records[0].cell
    ours = f"profile {cell.profile}, {seeds_text(record.cell.seed for record in records)}"
    section = EXPERIMENTS[cell.experiment].parameters(load_profile(PAPER)) if paper else None
    if section is None:
        return ours
    settings = [record.config.get("setting", {}) for record in records]
    here = [
        _sizes(record.rows[0].image_size for record in records),
        *_epochs("base training", (one.get("recipe", {}).get("epochs") for one in settings)),
        *_epochs("merging", map(_learned, records)),
    ]
    there = [
        _sizes(one.image_size for one in section.settings),
        *_epochs("base training", (one.recipe.epochs for one in section.settings)),
        *_epochs("merging", [section.optimisation.options["np_merge"]["epochs"]]),
    ]
    return f"ours: {ours}, {', '.join(here)}; the paper's: {', '.join(there)}"


def _sizes(pixels: Iterable[int]) -> str:
    known = (f"{one}\N{MULTIPLICATION SIGN}{one}" for one in sorted(set(pixels)))
    return f"{listed(known, 'or')} pixels"


def _epochs(what: str, counts: Iterable[int | None]) -> Iterator[str]:
    known = sorted({count for count in counts if count is not None})
    if known:
        yield f"{listed(map(str, known), 'or')} epoch{'s' * (known != [1])} of {what}"


def _learned(record: Record) -> int | None:
    aggregate = record.config.get("aggregate") or {}
    count: int | None = aggregate.get("options", {}).get("epochs")
    return count
