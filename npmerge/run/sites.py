"""What is at the place where cells are done: the device, the versions, the data, and whose folders it sees."""

from __future__ import annotations

import platform
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any
from uuid import uuid4

from npmerge.device import gains_from_bfloat16, pick_device
from npmerge.run.cluster import ClusterError
from npmerge.run.schedule import Task, Training
from npmerge.run.work import base_models, load_images
from npmerge.store.files import LOCKS, is_locked, locked, write_atomically
from npmerge.store.origins import device_label, provenance, revision
from npmerge.store.records import Cell, Records
from npmerge.store.zoo import BaseModel, Zoo

Do = Callable[..., float]
"""Does a task, given ``records`` and ``zoo`` where it has none, and returns its seconds."""
Files = dict[str, bytes]
"""Contents by names such as ``zoo/x.safetensors``, which begin with one of :data:`TOPS`."""
TOPS = ("results", "zoo", "models")


@dataclass(frozen=True)
class Site:
    """What is at the place where cells are done.

    Attributes:
        device: what records call it.
        revision: of the source.
        versions: of the packages.
        kernels: what decides the last bits beside them.
        shared: whether the folders of results and base models are those of the command, and locks hold in both.
        names: what the files of base models that are trained there are called.
    """

    device: str
    revision: str
    versions: dict[str, str]
    kernels: str
    shared: bool
    names: dict[BaseModel, str]

    def check_source(self) -> None:
        """Raise if this process has another npmerge, or other packages that its numbers depend on.

        Raises:
            ClusterError: it has.
        """
        mine = {"npmerge's revision": revision(), **_computing("cpu")[0]}
        theirs = {"npmerge's revision": self.revision, **self.versions}
        _check_same(theirs, mine, "this command")


def look(
    device: str,
    settings: Iterable[Mapping[str, Any]],
    bases: Iterable[BaseModel],
    folders: Sequence[Path] = (),
) -> Site:
    """Look around, and load every image set once: one that is not there is known before the first cell.

    Args:
        device: as the user says it.
        settings: of the cells.
        bases: their base models.
        folders: of the command; see :func:`marked`.

    Raises:
        ValueError: no such device here.
        DataError: an image set is not here.
    """
    where = pick_device(device)
    for one in {(s["dataset"], s["image_size"], s.get("images")): s for s in settings}.values():
        load_images(one)
    versions, kernels = _computing(device)
    names = {base: Zoo("").path(base, device=where).name for base in bases}
    return Site(device_label(where), revision(), versions, kernels, _sees(folders), names)


def marked(stack: ExitStack, folders: Sequence[Path]) -> list[Path]:
    """Mark folders for as long as a command runs, so that whoever sees them can tell; locks are the marks.

    Args:
        stack: that removes the marks.
        folders: to mark.

    Returns:
        For each what :func:`look` is to be given.
    """
    marks = [folder.absolute() / f"cluster-{uuid4().hex}" for folder in folders]
    for mark in marks:
        file = mark.parent / LOCKS / f"{mark.name}.lock"
        stack.callback(file.unlink, missing_ok=True)
        stack.enter_context(locked(mark))
    return marks


def do_there(do: Do, device: str, site: Site, marks: Sequence[Path], task: Task) -> float:
    """In a worker that sees the command's folders: do a task.

    Args:
        do: does it.
        device: as the user says it.
        site: what was found at first, which must be so here.
        marks: from :func:`marked`.
        task: what to do.

    Returns:
        Its seconds.

    Raises:
        ClusterError: this worker is of another kind than the first one.
    """
    _check_same_kind(site, device)
    if not _sees(marks):
        folder = marks[0].parent
        raise ClusterError(
            f"a worker does not see {folder} as the first one did: let all workers share it, or none"
        )
    return do(task)


def do_apart(do: Do, device: str, site: Site, task: Task, files: Files) -> tuple[float, Files]:
    """In a worker that has only what comes with a task: do it, in the worker's own folder.

    Alignments and statistics stay there for other cells as long as the worker lives.

    Args:
        do: does it.
        device: as the user says it.
        site: what was found at first, which must be so here.
        task: what to do.
        files: from :func:`packed`.

    Returns:
        Its seconds, and its record and the base models that did not come with it.

    Raises:
        ClusterError: this worker is of another kind than the first one.
    """
    from distributed import get_worker

    _check_same_kind(site, device)
    folder = Path(get_worker().local_directory) / "npmerge"
    for top in ("results", "models"):
        shutil.rmtree(folder / top, ignore_errors=True)
    for path in (folder / "zoo").glob("*.safetensors"):  # of another task, or another command
        path.unlink()
    unpack(files, {top: folder / top for top in TOPS})
    records = Records(folder / "results")
    seconds = do(task, records=records, zoo=Zoo(folder / "zoo", published=[folder / "models"]))
    made = [f"zoo/{site.names[base]}" for base in needed(task)]
    if isinstance(task, Cell):
        made.append(f"results/{records.path(task).relative_to(records.folder)}")
    new = [name for name in made if name not in files and (folder / name).exists()]
    return seconds, {name: (folder / name).read_bytes() for name in new}


def packed(task: Task, site: Site, records: Records, zoo: Zoo) -> Files:
    """The base models that a task needs, as far as they are there, and a record that another command has made.

    Args:
        task: what is to be done.
        site: where.
        records: of the command.
        zoo: of the command.
    """
    files: Files = {}
    for base in needed(task):
        own = zoo.folder / site.names[base]
        for path in zoo.places(base, own):
            if path.exists():
                files[f"{'zoo' if path == own else 'models'}/{path.name}"] = path.read_bytes()
    if isinstance(task, Cell) and records.done(task):
        path = records.path(task)
        files[f"results/{path.relative_to(records.folder)}"] = path.read_bytes()
    return files


def unpack(files: Files, folders: Mapping[str, Path]) -> None:
    """Write files, each in one piece.

    Args:
        files: from :func:`packed` or :func:`do_apart`.
        folders: where the files of each of :data:`TOPS` belong.

    Raises:
        OSError: one cannot be written.
    """
    for name, content in files.items():
        top, _, rest = name.partition("/")
        write_atomically(folders[top] / rest, partial(Path.write_bytes, data=content))


def needed(task: Task) -> list[BaseModel]:
    """The base models that a task reads or trains, and those that they go on from.

    Args:
        task: a cell, or a base model to train.
    """
    bases = [task.base] if isinstance(task, Training) else base_models(task)
    trunks = [base.trunk for base in bases if base.trunk is not None]
    return list(dict.fromkeys([*trunks, *bases]))


def _sees(marks: Sequence[Path]) -> bool:
    return all(is_locked(mark) for mark in marks)


def _check_same_kind(site: Site, device: str) -> None:
    versions, kernels = _computing(device)
    _check_same(
        {"kernels": kernels, **versions}, {"kernels": site.kernels, **site.versions}, "the first"
    )


def _check_same(theirs: Mapping[str, str], ours: Mapping[str, str], whose: str) -> None:
    for name, value in ours.items():
        if theirs.get(name) != value:
            raise ClusterError(
                f"a worker on {platform.node()} has {name} {theirs.get(name)}, {whose} has {value}: "
                "let all compute alike, or their numbers would not belong together"
            )


@cache
def _computing(device: str) -> tuple[dict[str, str], str]:
    """The versions and the kernels of this process."""
    where = pick_device(device)
    origin = provenance(where, seconds=0, source="")
    precision = "-bfloat16" * gains_from_bfloat16(where)
    return origin["versions"], origin["kernels"] + precision
