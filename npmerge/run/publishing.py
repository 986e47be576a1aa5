"""Base models that come with the project: small, each checked in every byte, and asked for by a profile."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Sequence
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

from npmerge.run.work import base_models
from npmerge.store.checkpoints import read_checked
from npmerge.store.files import write_atomically
from npmerge.store.records import Cell
from npmerge.store.zoo import BaseModel, Zoo

LARGEST = 1_300_000
"""Bytes that a published file may have."""
ROOM = 30_000_000
"""Bytes that all published files may have."""

Copies = dict[Path, dict[str, Any]]
"""Files of base models, and what each says of itself."""


class PublishingError(ValueError):
    """Base models that cannot be published; nothing was copied."""


def bases_of(cells: Iterable[Cell]) -> list[BaseModel]:
    """The base models that cells need, each once.

    Args:
        cells: of any experiments.
    """
    return list(dict.fromkeys(base for cell in cells for base in base_models(cell)))


def copies_of(bases: Iterable[BaseModel], folder: Path | str) -> Copies:
    """The whole files that a folder has of base models, whatever kernels made them.

    Args:
        bases: what they are functions of.
        folder: a zoo, or the folder of the published ones; it need not exist.
    """
    zoo = Zoo(folder)
    return {path: about for base in bases for path, about in zoo.copies(base).items()}


def publish(bases: Sequence[BaseModel], zoo: Path | str, models: Path | str) -> list[Path]:
    """Copy base models from the zoo to the published ones; what is published already is left as it is.

    Args:
        bases: what they are functions of; those that the zoo has no whole file of are left out.
        zoo: folder of the trained base models.
        models: folder of the published ones; made when the first one is written.

    Returns:
        The new files.

    Raises:
        PublishingError: a file or all of them would be too large, or another file has the place of one.
        OSError: the folder cannot be written.
    """
    missing = [base for base in bases if not copies_of([base], models)]
    first = [list(copies_of([base], zoo).items())[:1] for base in missing]
    new = {Path(models) / path.name: (path, about) for path, about in chain.from_iterable(first)}
    for target, (source, _) in new.items():
        if target.exists():
            raise PublishingError(
                f"{target} is there and is not {source}: it is not overwritten; delete it first"
            )
    check_room([*Path(models).glob("*.safetensors"), *(source for source, _ in new.values())])
    for target, (source, about) in new.items():
        write_atomically(target, partial(_copy, source, about["made_of"]))
    return list(new)


def check_room(files: Iterable[Path]) -> None:
    """Raise if files are too large to come with the project.

    Args:
        files: all that would be published.

    Raises:
        PublishingError: one of them is, or all together.
    """
    sizes = {path: path.stat().st_size for path in files}
    for path, size in sizes.items():
        if size > LARGEST:
            raise PublishingError(
                f"{path} has {megabytes(size)}, more than the {megabytes(LARGEST)} of a published file: "
                "choose other cells"
            )
    if sum(sizes.values()) > ROOM:
        raise PublishingError(
            f"{len(sizes)} published files would have {megabytes(sum(sizes.values()))}, more than "
            f"{megabytes(ROOM)}: choose fewer cells or seeds"
        )


def megabytes(size: int) -> str:
    """A size as text.

    Args:
        size: in bytes.
    """
    return f"{size / 1e6:.2f} MB"


def _copy(source: Path, made_of: dict[str, Any], target: Path) -> None:
    shutil.copyfile(source, target)
    read_checked(target, made_of)
