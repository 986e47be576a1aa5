"""Readers of files against bytes that nobody has written: ``python readers.py NAME FOLDER [libFuzzer's options]``.

A target is given bytes, puts right the checksum that they would need, and reads them. It may raise what its reader
documents, and nothing else; and nothing in a pickle may ever be called.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from hashlib import sha256 as hash_of
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

try:
    import atheris
except ImportError:  # not on every system
    atheris = None

if __name__ == "__main__" and atheris is not None:
    with atheris.instrument_imports(
        include=["npmerge", "yaml", "ast"], enable_loader_override=False
    ):
        import npmerge.align
        import npmerge.cli
        import npmerge.data.user
        import npmerge.experiments
        import npmerge.store.checkpoints
        import npmerge.store.records  # noqa: F401 - so that libFuzzer sees their branches

import killed
import torch
from safetensors.torch import save
from tiny import net

from npmerge import cli
from npmerge._resume import Resume
from npmerge.align import Alignment
from npmerge.data.images import DataError
from npmerge.data.user import Preprocessing, open_data
from npmerge.experiments import load_profile, profile
from npmerge.store import checkpoints
from npmerge.store.files import canonical, sha256
from npmerge.store.records import Outcome, Records
from npmerge.symmetry import find_symmetry
from torture.common import tiny_cells

REGRESSIONS = Path(__file__).with_name("regressions")
"""What readers once fell over, a folder a reader."""


class Marked:
    """What a pickle may not do when it is read: make a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str, ...]]:
        return os.mkdir, (str(self.marker),)


@dataclass(frozen=True)
class Reader:
    """A reader of files.

    Attributes:
        read: reads bytes, by way of a file in a folder.
        seeds: bytes to begin with, by what they are, of a folder in which no file may be made.
        allowed: what it documents to raise.
    """

    read: Callable[[bytes, Path], object]
    seeds: Callable[[Path], dict[str, bytes]]
    allowed: tuple[type[Exception], ...] = (ValueError, OSError)


def _written(folder: Path, name: str, data: bytes) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def _record(data: bytes, folder: Path) -> object:
    """With the digest that it would need."""
    records, (cell, *_) = Records(folder), tiny_cells()
    try:
        content = json.loads(data)
        if isinstance(content, dict):
            rest = {key: value for key, value in content.items() if key != "digest"}
            data = json.dumps({**rest, "digest": sha256([canonical(rest)])}).encode()
    except (ValueError, RecursionError):
        pass
    _written(folder, str(records.path(cell).relative_to(folder)), data)
    return records.state(cell), records.read("tiny", "same_data", [cell], stale=True)


def _record_seeds(folder: Path) -> dict[str, bytes]:
    (cell, *_), row = tiny_cells(), {
        "dataset": "digits", "image_size": 4, "model": "vgg11", "width": 0.5, "split": None, "models": 2, "many": None,
        "align": None, "aggregate": "mean", "tuned": False, "correct": None, "examples_per_class": None,
        "metric": "top1", "value": 50.0,
    }  # fmt: skip
    origin = {
        "revision": "r", "device": "CPU", "threads": 1, "python": "3.11", "versions": {}, "finished": "2026",
        "seconds": 1.0,
    }  # fmt: skip
    path = Records(folder).write(cell, Outcome([row], {"curve": [1.0]}, {}), origin)
    return {"record": path.read_bytes(), "nested": b"[" * 5000, "other": b'{"digest": 1e999}'}


def _checkpoint(data: bytes, folder: Path) -> object:
    return checkpoints.load_state(_written(folder, "checkpoint.pt", data))


def _checkpoint_seeds(folder: Path) -> dict[str, bytes]:
    state = {"weight": torch.arange(6.0).reshape(2, 3), "count": torch.tensor(3)}
    found = {"safetensors": save(state)}
    evil = {"weight": Marked(folder / "made")}
    for name, content in (
        ("pt", state),
        ("inside", {"state_dict": state, "epoch": 3}),
        ("evil", evil),
    ):
        for zipped in (True, False):
            buffer = io.BytesIO()
            torch.save(content, buffer, _use_new_zipfile_serialization=zipped)
            found[f"{name}{zipped:d}"] = buffer.getvalue()
    return found | {"pickle": pickle.dumps(evil), "header": (2**40).to_bytes(8, "little") + b"{"}


def _signed(data: bytes, folder: Path, name: str = "signed.safetensors") -> Path:
    """A file with the signature that it would need."""
    path = _written(folder, name, data)
    signature = checkpoints._sign(path).encode()
    with path.open("r+b") as file:
        file.seek(checkpoints._PLACE)
        file.write(signature)
    return path


def _checked(data: bytes, folder: Path) -> object:
    return checkpoints.read_checked(_signed(data, folder), {"x": 1})


def _checked_seeds(folder: Path) -> dict[str, bytes]:
    path = folder / "seed.safetensors"
    checkpoints.write_checked(
        path, {"weight": torch.arange(6.0)}, {"made_of": {"x": 1}, "seconds": 1}
    )
    return {"signed": path.read_bytes(), "plain": save({"weight": torch.arange(6.0)})}


def _alignment(data: bytes, folder: Path) -> object:
    return Alignment.load(_signed(data, folder))


def _alignment_seeds(folder: Path) -> dict[str, bytes]:
    groups = find_symmetry(net(), torch.zeros(1, 3, 8, 8))
    path = folder / "seed.safetensors"
    Alignment.from_permutations(groups, [torch.arange(group.size) for group in groups]).save(path)
    return {"alignment": path.read_bytes()}


def _resume(data: bytes, folder: Path) -> object:
    """With the digest that it would need, and never of the same training."""
    model = killed.network()
    optimizer = killed.optimizer_of("adam", model, model)
    path = _written(folder, "training", hash_of(data).digest() + data)
    return Resume(path, 0, model, optimizer, killed.batches(), {"other": True}).history()


def _resume_seeds(folder: Path) -> dict[str, bytes]:
    model = killed.network()
    path = folder / "seed.training"
    optimizer = killed.optimizer_of("adam", model, model)
    Resume(path, 0, model, optimizer, killed.batches(), {}).save([1.0])
    buffer = io.BytesIO()
    torch.save({"training": Marked(folder / "made")}, buffer)
    return {"training": path.read_bytes()[32:], "evil": buffer.getvalue(), "nothing": b""}


def _profile(data: bytes, folder: Path) -> object:
    _written(folder, "digits.yaml", data)
    before, profile._FOLDER = profile._FOLDER, folder
    try:
        return load_profile("digits")
    finally:
        profile._FOLDER = before


def _profile_seeds(folder: Path) -> dict[str, bytes]:
    made = str(folder / "made")
    return {
        "digits": (profile._FOLDER / "digits.yaml").read_bytes(),
        "evil": f"title: !!python/object/apply:os.mkdir [{made}]".encode(),
        "list": b"- 1", "empty": b"", "anchors": b"a: &a [x,x]\nb: &b [*a,*a]\nc: [*b,*b]",
    }  # fmt: skip


def _image(data: bytes, folder: Path) -> object:
    _written(folder, "images/a/image.png", data)
    parts = open_data(str(folder / "images"), Preprocessing(image_size=8), batch_size=1)
    return list(parts.train)


def _image_seeds(folder: Path) -> dict[str, bytes]:
    from PIL import Image

    found = {}
    for kind in ("png", "jpeg", "bmp", "gif", "tiff", "webp"):
        buffer = io.BytesIO()
        Image.new("RGB", (8, 8), (1, 2, 3)).save(buffer, kind)
        found[kind] = buffer.getvalue()
    return found


def _options(data: bytes, folder: Path) -> object:
    return cli._pairs([data.decode(errors="surrogateescape")])


def _option_seeds(folder: Path) -> dict[str, bytes]:
    made = str(folder / "made")
    return {
        "number": b"lr=1e-3", "list": b"x=[1, 'a', None]", "nested": b"x=" + b"(" * 200,
        "minus": b"x=" + b"-" * 3000 + b"1",
        "evil": f"x=__import__('os').mkdir({made!r})".encode(), "nothing": b"x=", "null": b"x=\0",
    }  # fmt: skip


READERS = {
    "records": Reader(_record, _record_seeds),
    "checkpoints": Reader(_checkpoint, _checkpoint_seeds),
    "base models and artifacts": Reader(_checked, _checked_seeds),
    "saved alignments": Reader(_alignment, _alignment_seeds),
    "interrupted trainings": Reader(_resume, _resume_seeds, ()),
    "profiles": Reader(_profile, _profile_seeds),
    "folders of images": Reader(_image, _image_seeds, (ValueError, OSError, DataError)),
    "options of methods": Reader(_options, _option_seeds),
}


def tried(name: str, data: bytes, folder: Path) -> None:
    """Give a reader bytes.

    Raises:
        Exception: what it does not document.
        AssertionError: something in the bytes was called.
    """
    reader = READERS[name]
    with suppress(reader.allowed):
        reader.read(data, folder)
    assert not (folder.parent / "seeds" / "made").exists(), "code of the file was run"


def seeds(name: str, folder: Path) -> dict[str, bytes]:
    """What a reader's fuzzing begins with, and what it once fell over."""
    (folder / "seeds").mkdir(parents=True, exist_ok=True)
    found = READERS[name].seeds(folder / "seeds")
    once = sorted((REGRESSIONS / name.replace(" ", "_")).glob("*"))
    return found | {path.name: path.read_bytes() for path in once}


def main() -> None:
    name, folder = sys.argv[1], Path(sys.argv[2])
    work, corpus = folder / "work", folder / "corpus"
    for place in (work, corpus):
        place.mkdir(parents=True, exist_ok=True)
    for key, data in seeds(name, folder).items():
        (corpus / key).write_bytes(data)
    import logging
    import warnings

    logging.disable()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    atheris.Setup([sys.argv[0], *sys.argv[3:], str(corpus)], lambda data: tried(name, data, work))
    atheris.Fuzz()


if __name__ == "__main__":
    main()
