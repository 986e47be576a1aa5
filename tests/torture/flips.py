"""One flipped bit in each kind of file: whether it is told, with the file's name, and what is done then."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import killed
import pytest
import torch
from safetensors.torch import save_file
from tiny import net, tiny_profile
from torch import Tensor

from npmerge.align import Alignment
from npmerge.data import load
from npmerge.data.user import Preprocessing, open_data
from npmerge.run.engine import run_experiments
from npmerge.run.work import base_models, load_images
from npmerge.store.checkpoints import load_into, load_state, write_checked
from npmerge.store.zoo import Zoo
from torture.common import Case, Folders, messages, tiny_cells

PART = "flips"
CIFAR = {"cifar10": "cifar-10-batches-py", "cifar100": "cifar-100-python"}


def flips(folder: Path, *, scale: float, seed: int = 0) -> Iterator[Case]:
    """Flip bits, each time one a file.

    Args:
        folder: where to work.
        scale: how many, 1 for some 500.
        seed: of the bits.
    """
    draw = random.Random(seed)
    torch.set_num_threads(1)
    peace = Folders(folder / "peace")
    kinds: list[tuple[Callable[[Path, Folders, random.Random, int], Iterator[Case]], int]] = [
        (_records, 104), (_notes, 24), (_shared, 84), (_base_models, 40), (_published, 24),
        (_resumes, 40), (_alignments, 60), (_checkpoints, 80), (_images, 30), (_data, 36),
    ]  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        tiny_profile(patch)
        _run(peace)
        for flip, count in kinds:
            place = folder / flip.__name__
            place.mkdir()
            yield from flip(place, peace, draw, max(2, round(count * scale)))
            shutil.rmtree(place)


def flipped(path: Path, draw: random.Random) -> str:
    """Flip a bit of a file, and say where."""
    place, bit = draw.randrange(path.stat().st_size), draw.randrange(8)
    with path.open("r+b") as file:
        file.seek(place)
        (byte,) = file.read(1)
        file.seek(place)
        file.write(bytes([byte ^ 1 << bit]))
    return f"bit {bit} of byte {place}"


def _copied(place: Path, peace: Folders) -> Folders:
    shutil.rmtree(place, ignore_errors=True)
    shutil.copytree(peace.top, place)
    return Folders(place)


def _run(folders: Folders, **options: Any) -> list[str]:
    """Run the cells in this process; returns the warnings."""
    with messages() as said:
        run_experiments(
            "same_data", profile="tiny", seeds=[0], device="cpu", workers=1, results=folders.results,
            zoo=folders.zoo, models=folders.top / "models", **options,
        )  # fmt: skip
    return said


def _made_again(kind: str, path: Path, said: list[str], same: bool, where: str) -> Case:
    """The case of a file that was to be told, and made again."""
    if not any(str(path) in line for line in said):
        return Case(PART, kind, "undetected", f"{where} of {path.name}")
    return Case(
        PART,
        kind,
        "remade" if same else "remade otherwise",
        "" if same else f"{where} of {path.name}",
    )


def _records(folder: Path, peace: Folders, draw: random.Random, count: int) -> Iterator[Case]:
    todo = tiny_cells()
    while count > 0:
        here = _copied(folder / "run", peace)
        paths = [here.records.path(cell) for cell in draw.sample(todo, min(count, len(todo)))]
        before = {path: json.loads(path.read_bytes()) for path in paths}
        where = {path: flipped(path, draw) for path in paths}
        same = {path for path in paths if _json(path) == before[path]}
        said = _run(here)
        for path in paths:
            if path in same and not any(str(path) in line for line in said):
                yield Case(PART, "record", "harmless")
                continue
            below = path.relative_to(here.top)
            equal = here.content(below) == peace.content(below)
            yield _made_again("record", path, said, equal, where[path])
        count -= len(paths)


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except ValueError:
        return None


def _notes(folder: Path, _: Folders, draw: random.Random, count: int) -> Iterator[Case]:
    records, (cell, *_rest) = Folders(folder).records, tiny_cells()
    for _number in range(count):
        path = records.fail(cell, "RuntimeError: the loss is nan in epoch 3")
        before = json.loads(path.read_bytes())
        where = flipped(path, draw)
        same = _json(path) == before
        with messages() as said:
            note, state = records.failure(cell), records.state(cell)
        if note is not None:
            yield Case(
                PART,
                "note of a failure",
                "harmless" if same else "undetected",
                "" if same else where,
            )
        else:
            told = state == "missing" and any(str(path) in line for line in said)
            yield Case(
                PART,
                "note of a failure",
                "refused" if told else "undetected",
                "" if told else where,
            )


def _shared(folder: Path, peace: Folders, draw: random.Random, count: int) -> Iterator[Case]:
    """Alignments, statistics and models that cells share: all, as what is not needed is not read."""
    while count > 0:
        here = _copied(folder / "run", peace)
        paths = sorted((here.zoo / "artifacts").glob("*.safetensors"))
        where = {path: flipped(path, draw) for path in paths}
        said = _run(here, recompute=True)
        for path in paths:
            kind = f"shared {path.name.partition('-')[0]}"
            equal = _equal(path, peace.top / path.relative_to(here.top))
            yield _made_again(kind, path, said, equal, where[path])
        count -= len(paths)


def _equal(x: Path, y: Path) -> bool:
    first, second = load_state(x), load_state(y)
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


def _base_models(folder: Path, peace: Folders, draw: random.Random, count: int) -> Iterator[Case]:
    cell = tiny_cells()[0]
    data, bases = load_images(cell.config["setting"]), base_models(cell)
    for number in range(count):
        zoo, base = Zoo(folder), bases[number % len(bases)]
        path = zoo.path(base)
        whole = peace.zoo / path.name
        shutil.copy(whole, path)
        where = flipped(path, draw)
        with messages() as said:
            zoo.load(base, data)
        yield _made_again("base model", path, said, _equal(path, whole), where)


def _published(folder: Path, peace: Folders, draw: random.Random, count: int) -> Iterator[Case]:
    cell = tiny_cells()[0]
    data, (base, *_) = load_images(cell.config["setting"]), base_models(cell)
    for number in range(count):
        own, published = folder / f"zoo{number}", folder / "models"
        published.mkdir(exist_ok=True)
        zoo = Zoo(own, published=[published])
        path = published / zoo.path(base).name
        whole = peace.zoo / path.name
        shutil.copy(whole, path)
        where = flipped(path, draw)
        with messages() as said:
            zoo.load(base, data)
        made = zoo.path(base)
        yield _made_again(
            "published model", path, said, made.exists() and _equal(made, whole), where
        )


def _resumes(folder: Path, _: Folders, draw: random.Random, count: int) -> Iterator[Case]:
    """How far a training was: what is damaged is begun anew."""
    whole, path = folder / "whole", folder / "training"
    with pytest.raises(KeyboardInterrupt):
        killed.train("adam", killed.batches(_Stopping), whole)
    expected = killed.train("adam", killed.batches())[0].state_dict()
    for _number in range(count):
        shutil.copy(whole, path)
        where = flipped(path, draw)
        with messages() as said:
            found = killed.train("adam", killed.batches(), path)[0].state_dict()
        equal = all(torch.equal(expected[name], found[name]) for name in expected)
        yield _made_again("interrupted training", path, said, equal, where)


class _Stopping(killed.Batches):
    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        if self.epoch == 3:
            raise KeyboardInterrupt
        return super().__iter__()


def _alignments(folder: Path, peace: Folders, draw: random.Random, count: int) -> Iterator[Case]:
    """Alignments that were saved: permutations and matrices."""
    every = sorted((peace.zoo / "artifacts").glob("alignment-*.safetensors"))
    path = folder / "alignment.safetensors"
    for number in range(count):
        _packed(every[number % len(every)]).save(path)
        yield _refused("saved alignment", path, draw, Alignment.load, lambda found: found.pack()[0])


def _packed(path: Path) -> Alignment:
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        words = json.loads(file.metadata()["npmerge"])["says"]
    return Alignment.unpack(load_state(path), words)


def _refused(
    kind: str,
    path: Path,
    draw: random.Random,
    read: Callable[[Path], Any],
    tensors: Callable[[Any], dict[str, Tensor]],
    undetected: str = "undetected",
) -> Case:
    """The case of a file that is to be refused."""
    before = tensors(read(path))
    where = flipped(path, draw)
    try:
        after = tensors(read(path))
    except (ValueError, OSError, RuntimeError) as error:
        own = type(error).__module__.startswith("npmerge.")
        if not own and type(error) not in (ValueError, OSError, FileNotFoundError):
            return Case(PART, kind, "raw error", f"{type(error).__name__}: {error}")
        named = str(path) in str(error) or str(path.parent) in str(error)
        return Case(PART, kind, "refused" if named else "not named", "" if named else str(error))
    same = before.keys() == after.keys() and all(
        before[k].dtype == after[k].dtype and torch.equal(before[k], after[k]) for k in before
    )
    return Case(PART, kind, "harmless" if same else undetected, "" if same else where)


def _checkpoints(folder: Path, peace: Folders, draw: random.Random, count: int) -> Iterator[Case]:
    """What users merge: a zip of ``torch.save``, a model of ours, and a file of others without a checksum."""
    model = net()

    def read(path: Path) -> dict[str, Tensor]:
        return dict(load_into(net(1), path).state_dict())

    for number in range(count):
        if number % 4 == 0:
            path = folder / "ours.safetensors"
            write_checked(path, model.state_dict(), {"made_of": {}})
            yield _refused("checkpoint of npmerge, .safetensors", path, draw, read, dict)
        elif number % 4 == 1:
            path = folder / "theirs.safetensors"
            save_file(model.state_dict(), path)
            none = "no checksum to tell by"
            yield _refused("checkpoint of others, .safetensors", path, draw, read, dict, none)
        else:
            path = folder / "checkpoint.pt"
            torch.save(model.state_dict(), path)
            yield _refused("checkpoint, .pt", path, draw, read, dict)


def _images(folder: Path, _: Folders, draw: random.Random, count: int) -> Iterator[Case]:
    """A folder of images."""
    from PIL import Image

    for label in "ab":
        (folder / label).mkdir()
        pixels = torch.randint(0, 256, (16, 16, 3), dtype=torch.uint8).numpy()
        Image.fromarray(pixels).save(folder / label / "image.png")
    path = folder / "a" / "image.png"
    whole = path.read_bytes()

    def read(_: Path) -> dict[str, Tensor]:
        parts = open_data(str(folder), Preprocessing(image_size=16), batch_size=2)
        return dict(enumerate(images for images, _ in parts.train))  # type: ignore[arg-type]

    for _number in range(count):
        path.write_bytes(whole)
        yield _refused("image of a folder, .png", path, draw, read, dict)


def _data(folder: Path, _: Folders, draw: random.Random, count: int) -> Iterator[Case]:
    """CIFAR-10 and CIFAR-100, where they are at hand: the files are copied."""
    given = os.environ.get("NPMERGE_DATA")
    if not given or not all((Path(given) / name).is_dir() for name in CIFAR.values()):
        yield Case(PART, "CIFAR", "left out", "NPMERGE_DATA names no folder with both")
        return
    for name, below in CIFAR.items():
        shutil.copytree(Path(given) / below, folder / below)
        files = sorted(
            path for path in (folder / below).iterdir() if path.stem not in ("readme", "file")
        )

        def read(path: Path, name: str = name) -> dict[str, Tensor]:
            load(name, folder=folder)
            return {}

        for number in range(count // 2):
            path = files[number % len(files)]
            whole = path.read_bytes()
            case = _refused(name, path, draw, read, dict)
            path.write_bytes(whole)
            if case.outcome == "harmless":  # it was read as if nothing were
                case = Case(PART, name, "undetected", path.name)
            yield case
        shutil.rmtree(folder / below)
