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
from torture.common import COMMAND, Case, Folders, environment

PART = "places"
ALONE = ["unshare", "--map-root-user", "--mount", "--net"]
"""Gives a command mounts and a network of its own, where the machine allows it."""
SIZES = {False: (16, 64, 128, 256, 512), True: (64,)}
"""KiB that a disk has, in full and in small."""


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


def trials(*, small: bool) -> Iterator[Trial]:
    """All of them."""
    run, merge = (
        f"{RUN} {STORES}".replace("{workers}", "1"),
        f"{MERGE} --output {{place}}/merged.safetensors",
    )
    beside = "--save-alignment {place}/alignment.safetensors --history {place}/history.csv"
    for size in SIZES[small]:
        full = f"mount -t tmpfs -o size={size}k tmpfs {{place}}"
        yield Trial(f"full disk, {size} KiB: run", run, full, None)
        yield Trial(f"full disk, {size} KiB: merge", merge, full, None)
        if not small:
            yield Trial(
                f"full disk, {size} KiB: run, 2 workers",
                f"{RUN} {STORES}".replace("{workers}", "2"),
                full,
                None,
            )
            yield Trial(f"full disk, {size} KiB: merge and more", f"{merge} {beside}", full, None)
            yield Trial(
                f"full disk, {size} KiB: book", f"{BOOK} {ELSEWHERE} --output {{place}}/built", full
            )
    read_only = "mount -t tmpfs -o size=1m,ro tmpfs {place}"
    yield Trial("read-only folder: run", run, read_only)
    yield Trial("read-only folder: merge", merge, read_only)
    if not small:
        yield Trial(
            "read-only folder: book", f"{BOOK} {ELSEWHERE} --output {{place}}/built", read_only
        )
        yield Trial(
            "read-only folder: data",
            "data cifar10",
            f"{read_only}; export HOME={{place}}",
            unset=("NPMERGE_DATA",),
        )
        yield Trial(
            "read-only folder: models --publish", f"models same_data --publish {STORES}", read_only
        )
        yield Trial("a file in the folder's place: run", run, "rmdir {place}; touch {place}")
        yield Trial("a file in the folder's place: merge", merge, "rmdir {place}; touch {place}")
    homes = {
        "no home folder": "unset HOME",
        "a home folder that cannot be written": "export HOME=/proc/nobody",
    }
    for kind, before in homes.items():
        for name, words in {"run": run, "merge": merge, "status": f"status {STORES}"}.items():
            if not small or name == "merge":
                yield Trial(f"{kind}: {name}", words, before, works=True)
        if not small:
            yield Trial(f"{kind}: data", "data cifar10", before, unset=("NPMERGE_DATA",))
    home = "export HOME={place}"
    yield Trial("no network: data", "data cifar10", home, unset=("NPMERGE_DATA",))
    if not small:
        cifar = "run same_data --profile short --seeds 0 --device cpu --quiet"
        yield Trial(
            "no network: run with CIFAR", f"{cifar} {STORES}", home, unset=("NPMERGE_DATA",)
        )
        yield Trial("no network: run with digits", run, home, works=True)
        yield Trial(
            "no network: merge with CIFAR",
            merge.replace("mine:batches", "cifar10"),
            home,
            unset=("NPMERGE_DATA",),
        )
    for name in ("methods",) if small else ("methods", "status", "records --csv"):
        words = name if name == "methods" else f"{name} {ELSEWHERE.partition(' --zoo')[0]}"
        yield Trial(f"a full disk for the output: {name}", words, after="> /dev/full")
        yield Trial(f"nobody who reads: {name}", words, works=None, after="| true")


def places(folder: Path, *, small: bool) -> Iterator[Case]:
    """Try all, each in a folder of its own.

    Args:
        folder: where to work.
        small: fewer of each.
    """
    allowed = not subprocess.run([*ALONE, "true"], capture_output=True, check=False).returncode
    for name, seed in (("a", 0), ("b", 1)):
        torch.save(net(seed).state_dict(), folder / f"{name}.pt")
    shutil.copy(Path(__file__).with_name("mine.py"), folder)
    from torture.kills import project

    project(folder / "project")
    for trial in trials(small=small):
        if not allowed:
            yield Case(PART, trial.kind, "left out", "unshare is not allowed on this machine")
            continue
        yield _tried(trial, folder)


def _tried(trial: Trial, folder: Path) -> Case:
    place = folder / "place"
    shutil.rmtree(place, ignore_errors=True)
    place.unlink(missing_ok=True) if place.is_file() else None
    place.mkdir()
    given = {"place": str(place), "top": str(folder), "workers": "1"}
    kept = folder / "kept"
    shutil.rmtree(kept, ignore_errors=True)
    script = "\n".join(
        [
            trial.before.format(**given) or ":",
            f"{shlex.join([sys.executable, str(COMMAND)])} {trial.words.format(**given)} {trial.after}",
            "code=${PIPESTATUS[0]}",
            f"cp -r {place} {kept}",
            "exit $code",
        ]
    )
    env = {
        name: value
        for name, value in environment(PYTHONPATH=_path(folder)).items()
        if name not in trial.unset
    }
    try:
        done = subprocess.run(
            [*ALONE, "bash", "-c", script], capture_output=True, text=True, errors="replace", env=env,
            cwd=folder, timeout=300, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return Case(PART, trial.kind, "does not end")
    said, code = done.stderr.strip(), done.returncode
    said = said.replace(
        "npmerge: 1 cells failed, the others are done:\n  ", "npmerge: 1 cell failed: "
    )
    if half := next(_half_written(kept), None):
        return Case(PART, trial.kind, "half-written", half)
    if "Traceback" in said:
        return Case(PART, trial.kind, "traceback", said[-300:])
    if code == 0:
        return Case(
            PART,
            trial.kind,
            "works" if trial.works is not False else "works, and should not",
            said[-200:],
        )
    if code != 1 or not said.startswith("npmerge: ") or "\n" in said:
        return Case(PART, trial.kind, "more than a line", f"status {code}: {said[-300:]}")
    return Case(PART, trial.kind, "fails, and should not" if trial.works else "one line", said)


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
        if path.name.startswith("."):
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
