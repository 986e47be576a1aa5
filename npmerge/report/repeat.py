"""A merge of published base models, repeated now and shown beside its record."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import pandas as pd

from npmerge.experiments import cells
from npmerge.parameters import PUBLISHED
from npmerge.report.numbers import method_of
from npmerge.report.words import NOTHING, duration
from npmerge.run.engine import run_experiments
from npmerge.run.work import base_models
from npmerge.store.records import Cell, Record, Records
from npmerge.store.zoo import Zoo

MERGES = ("permute-mean", "permute-np_merge")
"""The cells that are repeated: the matched average and NP Merge."""


def repeat_merge(
    models: Path | str,
    *,
    experiment: str = "same_data",
    profile: str = "short",
    seeds: Sequence[int] = (0, 1, 2),
    merges: Sequence[str] = MERGES,
    device: str = "auto",
    results: Path | str = PUBLISHED,
    progress: bool = False,
) -> pd.DataFrame:
    """Merge the first pair of base models that is published, from the alignment to the score, and keep nothing.

    Args:
        models: folder of the published base models.
        experiment: whose pairs to look through.
        profile: name of the parameter set.
        seeds: of the pairs.
        merges: names of the cells.
        device: where to do it.
        results: folder of the records to compare with.
        progress: show progress bars on stderr.

    Returns:
        A row a merge: its top-1 accuracy in percent and its wall-clock time, now and in the record; a dash where there
        is no record of these very base models.

    Raises:
        FileNotFoundError: no pair is published.
        DataError: the images are not there.
        CellsFailedError: a merge failed.
    """
    chosen = _first_published(cells(experiment, profile, seeds), merges, Zoo(models))
    if not chosen:
        raise FileNotFoundError(
            f"{models} has no pair of base models of {experiment} at {profile!r}: publish one with "
            f"`npmerge models {experiment} --profile {profile} --publish`"
        )
    with TemporaryDirectory(prefix="npmerge-") as folder:
        for cell in chosen:
            run_experiments(
                experiment, profile=profile, seeds=[cell.seed], pattern=cell.label, device=device,
                results=folder, zoo=Path(folder) / "zoo", models=models, workers=1,
                progress=progress,
            )  # fmt: skip
        repeated = Records(folder).read(profile, experiment, chosen)
    known = {_identity(record): record for record in Records(results).whole(profile, experiment)}
    rows = {method_of(one).label: _row(one, known.get(_identity(one))) for one in repeated}
    title = f"{chosen[0].setting}, seed {chosen[0].seed}"
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis(title)


def _first_published(todo: Sequence[Cell], merges: Sequence[str], zoo: Zoo) -> list[Cell]:
    """The merges of the first pair that the zoo has."""
    for first in todo:
        if first.name in merges and all(map(zoo.copies, base_models(first))):
            place = (first.setting, first.seed)
            return [c for c in todo if c.name in merges and (c.setting, c.seed) == place]
    return []


def _identity(record: Record) -> tuple[str, ...]:
    """What two records have in common whose numbers are to be the same."""
    bases = record.provenance.base_models.values()
    return record.config_hash, *(str(base.get("digest")) for base in bases)


def _row(now: Record, then: Record | None) -> dict[str, str]:
    return {
        "accuracy": _accuracy(now),
        "in the record": _accuracy(then) if then else NOTHING,
        "took": duration(now.provenance.seconds),
        "took the record": duration(then.provenance.seconds) if then else NOTHING,
    }


def _accuracy(record: Record) -> str:
    return f"{next(row.value for row in record.rows if row.metric == 'top1'):.2f}"
