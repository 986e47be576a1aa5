"""Machines in trouble: a full disk, a read-only folder, no home folder, no network, nobody who reads."""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from tiny import net

from npmerge.store.checkpoints import load_state
from npmerge.store.files import sha256
from torture.common import COMMAND, Case, Folders, environment, scratch

PART = "places"
ALONE = ["unshare", "--map-root-user", "--mount", "--net"]
"""Gives a command mounts and a network of its own, where the machine allows it."""
SIZES = (16, 64, 128, 256, 512)
"""KiB that a disk has."""
HOMES = {
    "no home folder": "unset HOME",
    "a home folder that cannot be written": "export HOME=/proc/nobody",
}
SMALL = (
    "full disk: run", "read-only folder: merge", "no home folder: merge", "no network: data",
    "a full disk for the output: methods", "nobody who reads: methods",
)  # fmt: skip
"""What is tried in small, each once."""


@dataclass(frozen=True)
class Trial:
    """A command in trouble.

    Attributes:
        kind: what the trouble is.
        words: of the command, in which ``{place}`` is the folder in trouble.
        before: a line of shell that makes the trouble, from ``{place}``.
        works: whether the command is to work nevertheless; with ``None`` it may.
        after: what to do with the command's output.
        unset: variables of the environment that it does not get.
    """

    kind: str
    words: str
    before: str = ""
    works: bool | None = False
    after: str = ""
    unset: tuple[str, ...] = ()


RUN = "run same_data --profile tiny --seeds 0 --device cpu --workers {workers} --cells '*/permute-mean' --quiet"
MERGE = "merge {top}/a.pt {top}/b.pt --model mine:net --data mine:batches --aggregate mean --quiet --device cpu"
BOOK = "book --root {top}/project --seeds 0 --device cpu --quiet"
STORES = "--results {place}/results --zoo {place}/zoo --models {place}/models"
ELSEWHERE = "--results {top}/results --zoo {top}/zoo --models {top}/models"


def trials() -> Iterator[Trial]:
    """All of them."""
    one, two = (f"{RUN} {STORES}".replace("{workers}", workers) for workers in "12")
    merge = f"{MERGE} --output {{place}}/merged.safetensors"
    book = f"{BOOK} {ELSEWHERE} --output {{place}}/built"
    beside = "--save-alignment {place}/alignment.safetensors --history {place}/history.csv"
    data: tuple[str, ...] = ("NPMERGE_DATA",)
    for size in SIZES:
        kind, full = "full disk", f"mount -t tmpfs -o size={size}k tmpfs {{place}}"
        yield Trial(f"{kind}: run", one, full, None)
        yield Trial(f"{kind}: run, 2 workers", two, full, None)
        yield Trial(f"{kind}: merge", merge, full, None)
        yield Trial(f"{kind}: merge and more", f"{merge} {beside}", full, None)
        yield Trial(f"{kind}: book", book, full)
    kind, before = "read-only folder", "mount -t tmpfs -o size=1m,ro tmpfs {place}"
    for name, words in {"run": one, "merge": merge, "book": book}.items():
        yield Trial(f"{kind}: {name}", words, before)
    yield Trial(f"{kind}: data", "data cifar10", f"{before}; export HOME={{place}}", unset=data)
    kind, before = "a file in the folder's place", "rmdir {place}; touch {place}"
    for name, words in {"run": one, "merge": merge}.items():
        yield Trial(f"{kind}: {name}", words, before)
    for kind, before in HOMES.items():
        for name, words in {"run": one, "merge": merge, "status": f"status {STORES}"}.items():
            yield Trial(f"{kind}: {name}", words, before, works=True)
        yield Trial(f"{kind}: data", "data cifar10", before, unset=data)
    kind, before = "no network", "export HOME={place}"
    cifar = f"run same_data --profile short --seeds 0 --device cpu --quiet {STORES}"
    yield Trial(f"{kind}: data", "data cifar10", before, unset=data)
    yield Trial(f"{kind}: run with CIFAR", cifar, before, unset=data)
    yield Trial(f"{kind}: run with digits", one, before, works=True)
    on_cifar = merge.replace("mine:batches", "cifar10")
    yield Trial(f"{kind}: merge with CIFAR", on_cifar, before, unset=data)
    results = "--results {top}/results"
    for name, more in {"methods": "", "status": results, "records --csv": results}.items():
        yield Trial(f"a full disk for the output: {name}", f"{name} {more}", after="> /dev/full")
        yield Trial(f"nobody who reads: {name}", f"{name} {more}", works=None, after="| true")


def places(folder: Path, *, small: bool) -> Iterator[Case]:
    """Try all, each in a folder of its own.

    Args:
        folder: where to work.
        small: only :data:`SMALL`.
    """
    allowed = not subprocess.run([*ALONE, "true"], capture_output=True, check=False).returncode
    for name, seed in (("a", 0), ("b", 1)):
        torch.save(net(seed).state_dict(), folder / f"{name}.pt")
    shutil.copy(Path(__file__).with_name("mine.py"), folder)
    from torture.kills import project

    project(folder / "project")
    left = {*SMALL}
    for trial in trials():
        if small and trial.kind not in left:
            continue
        left.discard(trial.kind)
        if not allowed:
            yield Case(PART, trial.kind, "left out", "unshare is not allowed on this machine")
            continue
        yield _tried(trial, folder)


def _tried(trial: Trial, folder: Path) -> Case:
    with scratch(folder, "trial") as own:
        place, kept = own / "place", own / "kept"
        place.mkdir()
        done = _run(trial, folder, place, kept)
        half = next(_half_written(kept), "")
    if done is None:
        return Case(PART, trial.kind, "does not end")
    said, code = done.stderr.strip().replace(str(folder), "DIR"), done.returncode
    logged, _, error = said.rpartition("npmerge: ")
    error = error.replace("1 cells failed, the others are done:\n  ", "a cell failed: ")
    error = error.partition(" has all of it:\n")[0]  # what Jupyter Book has said follows
    if half:
        return Case(PART, trial.kind, "half-written", half)
    if "Traceback" in said:
        return Case(PART, trial.kind, "traceback", said[-300:])
    if code == 0:
        right = trial.works is not False
        return Case(PART, trial.kind, "works" if right else "works, and should not", said[-200:])
    if code != 1 or not error or "\n" in error or logged.count("\n") > 1:
        return Case(PART, trial.kind, "more than a line", f"status {code}: {said[-300:]}")
    return Case(PART, trial.kind, "fails, and should not" if trial.works else "one line", error)


def _run(
    trial: Trial, folder: Path, place: Path, kept: Path
) -> subprocess.CompletedProcess[str] | None:
    """Run the command where the trouble is, and copy what it leaves there; ``None`` if it does not end."""
    given = {"place": str(place), "top": str(folder)}
    program = shlex.join([sys.executable, str(COMMAND)])
    script = [
        "ip link set lo up 2> /dev/null",  # Jupyter's processes talk to one another by it
        trial.before.format(**given),
        f"{program} {trial.words.format(**given)} {trial.after}",
        "code=${PIPESTATUS[0]}",
        f"cp -r {place} {kept}",
        "exit $code",
    ]
    env = environment(PYTHONPATH=_path(folder))
    for name in trial.unset:
        env.pop(name, None)
    try:
        return subprocess.run(
            [*ALONE, "bash", "-c", "\n".join(script)], capture_output=True, text=True,
            errors="replace", env=env, cwd=folder, timeout=300, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return None


def _path(folder: Path) -> str:
    """With the folder of the user's own module, and the source of this very npmerge."""
    import npmerge

    return f"{folder}:{Path(npmerge.__file__).parents[1]}"


def _half_written(kept: Path) -> Iterator[str]:
    """Files that are not whole, and parts of files."""
    if not kept.is_dir():
        return
    records = Folders(kept).records
    for path in sorted(
        path for path in kept.rglob("*") if path.is_file() and path.parent.name != ".locks"
    ):
        name = str(path.relative_to(kept))
        if name.startswith((".cache/", "built/", ".config/", ".local/", ".ipython/")):
            continue
        if path.name.endswith(".training"):
            raw = path.read_bytes()
            if sha256([raw[32:]]) != raw[:32].hex():
                yield f"{name} is not whole"
        elif path.name.startswith("."):
            yield f"{name} was left over"
        elif path.suffix == ".safetensors":
            try:
                load_state(path)
            except (ValueError, SafetensorError) as error:
                yield f"{name}: {error}"
        elif path.suffix == ".json":
            try:
                json.loads(path.read_bytes())
                if not list(records.whole("tiny", "same_data")) and ".failed" not in name:
                    yield f"{name} is not whole"
            except ValueError as error:
                yield f"{name}: {error}"
        elif not path.stat().st_size:
            yield f"{name} is empty"
