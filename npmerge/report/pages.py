"""What chapters show of the records that come with the project."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from itertools import chain
from typing import Any

import pandas as pd

from npmerge import experiments
from npmerge.parameters import PUBLISHED
from npmerge.report.claims import Verdict, verdicts
from npmerge.report.tables import sources, verdict_table
from npmerge.report.words import STALE, listed, seeds_text, stale_sentence
from npmerge.store.records import Cell, Record, Records


def show(*things: object) -> None:
    """Display something in a notebook.

    Args:
        things: tables or figures; a text is Markdown.
    """
    notebook: Any = import_module("IPython.display")  # only notebooks need it
    for thing in things:
        notebook.display(notebook.Markdown(thing) if isinstance(thing, str) else thing)


def published(
    experiment: str, *shown: Callable[[list[Record]], Any], folder: str = PUBLISHED
) -> dict[str, list[Record]]:
    """Show what the records of larger scale say, profile by profile, the largest first.

    A sentence at the end names the profiles without records.

    Args:
        experiment: its name.
        shown: what to make of a profile's records: a table, a sentence (Markdown), or several of them in a list.
        folder: of the records.

    Returns:
        The records by the name of their profile; profiles without any are left out.
    """
    found, missing = {}, []
    for profile in experiments.load_profiles(demonstration=False):
        if experiments.EXPERIMENTS[experiment].parameters(profile) is None:
            continue
        records = Records(folder).read(profile.name, experiment)
        if not records:
            missing.append(f"`{profile.name}`")
            continue
        found[profile.name] = records
        old = stale(records)
        seeds = seeds_text(record.cell.seed for record in records)
        mark = f" {STALE}" * bool(old)
        show(f"**Profile `{profile.name}`** ({profile.title}), published records, {seeds}{mark}:")
        for make in shown:
            made = make(records)
            show(*(made if isinstance(made, list) else [made]))
        if old:
            names = [f"{record.cell.setting}/seed{record.cell.seed}" for record in old]
            show(stale_sentence(names, len(records)))
    if missing:
        show(f"No records are published yet for {listed(missing)}.")
    return found


def sources_of(found: Mapping[str, list[Record]], records: Sequence[Record]) -> pd.DataFrame:
    """Where a page's numbers come from.

    Args:
        found: from :func:`published`.
        records: those that the page has made.
    """
    every = [*chain.from_iterable(found.values()), *records]
    return sources(every, stale(every))


def everything(folder: str, profile: str) -> list[Record]:
    """The records of all experiments at one profile.

    Args:
        folder: of the records.
        profile: name of the parameter set.
    """
    kept = Records(folder)
    return [one for name in experiments.EXPERIMENTS for one in kept.read(profile, name)]


def verdict_tables(records: Sequence[Record]) -> list[pd.DataFrame | str]:
    """The verdicts on the claims, and the comparison that decides each.

    Args:
        records: of one experiment at one profile.
    """
    return told(verdicts(records))


def told(found: Sequence[Verdict]) -> list[pd.DataFrame | str]:
    """Verdicts to show: those that say something, how many do not, and the evidence.

    Args:
        found: the verdicts.

    Returns:
        A table of the claims that are judged in some setting, or of a demonstration; a sentence that counts the others;
        and the comparison that decides each, in a table that is folded. What would be empty is left out.
    """
    claims = dict.fromkeys(one.claim for one in found)
    known = {one.claim for one in found if one.says}
    compared = {one.claim for one in found if one.evidence}
    parts: list[pd.DataFrame | str] = []
    if known:
        parts.append(verdict_table([one for one in found if one.claim in known]))
    if others := len(claims) - len(known):
        parts.append(
            f"{others} {'further ' * bool(known)}claim{'s are' if others > 1 else ' is'} not judged at this profile: "
            "too few seeds, or nothing to compare."
        )
    if compared:
        parts.append(verdict_table([one for one in found if one.claim in compared], "evidence"))
    return parts


def today(records: Sequence[Record]) -> list[Record]:
    """The records that today's configuration gives.

    Args:
        records: of any experiments.
    """
    old = stale(records)
    return [record for record in records if record not in old]


def stale(records: Sequence[Record]) -> list[Record]:
    """The records that today's configuration would not give.

    Args:
        records: of any experiments.
    """
    seeds = sorted({record.cell.seed for record in records})
    today = {
        (profile, cell.label, cell.config_hash)
        for profile, name in {(one.cell.profile, one.cell.experiment) for one in records}
        for cell in experiments.cells(name, profile, seeds)
    }
    return [
        record
        for record in records
        if (record.cell.profile, _label(record), record.config_hash) not in today
    ]


def _label(record: Record) -> str:
    return Cell(**record.cell.model_dump(), config=record.config).label
