"""Kills at random moments of ``npmerge run``, of its workers and of ``npmerge book``, and what is there afterwards."""

from __future__ import annotations

import os
import random
import shutil
import signal
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from torture.common import PERMUTE, Case, Folders, Nursery, tiny_cells

PART = "kills"
SIGNALS = (signal.SIGKILL, signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
"""Mostly the one that nothing can be done about."""
RIGHT = "resumed to the same records"


def kills(folder: Path, *, runs: int, workers: int, books: int, seed: int = 0) -> Iterator[Case]:
    """Kill commands so often, and resume them.

    Args:
        folder: where to work.
        runs: kills of a command that works alone.
        workers: kills of commands with two workers: half of them of a worker.
        books: kills of a command that makes a book.
        seed: of the moments.
    """
    draw = random.Random(seed)
    peace = Folders(folder / "peace")
    for name, count, each in (("run", runs, 1), ("workers", workers, 2)):
        if count:
            yield from _Runs(folder / name, peace, draw, workers=each).kill(count)
    if books:
        yield from _books(folder / "book", draw, books)


class _Runs:
    """Runs of the same cells, each from nothing, killed until it has come to its end.

    The first one is undisturbed, and what the others are held against.
    """

    def __init__(self, folder: Path, peace: Folders, draw: random.Random, *, workers: int) -> None:
        self._folder, self._peace, self._draw, self._workers = folder, peace, draw, workers
        self._todo = tiny_cells(PERMUTE)

    def kill(self, count: int) -> Iterator[Case]:
        """So many kills; what came of each is known once its run has come to its end."""
        self._folder.mkdir()
        here = self._again = Folders(self._folder / "run")
        with Nursery(self._folder / "said", NPMERGE_JOURNAL=str(here.journal)) as self._nursery:
            here.top.mkdir()
            self._begin()
            self._alive()
            start = time.monotonic()
            if not self._nursery.ended(300) or self._nursery.returncode:
                raise RuntimeError(self._nursery.said.read_text(errors="replace"))
            seconds = time.monotonic() - start
            if self._peace.top.exists():
                shutil.rmtree(here.top)
            else:
                here.top.rename(self._peace.top)
            while count:
                here.top.mkdir()
                cases = []
                while len(cases) < count and (case := self._killed(seconds)):
                    cases.append(case)
                self._begin()
                wrong = self._resumed(len(cases))
                for kind, problem in cases:
                    note = problem or wrong
                    yield Case(PART, kind, "wrong" if note else RIGHT, note)
                count -= len(cases)

    def _begin(self) -> None:
        self._nursery.begin(self._again.run_words(PERMUTE, self._workers))

    def _alive(self) -> None:
        """Wait until it has begun a model or a cell, or is over."""
        locks, before = self._again.zoo / ".locks", self._lines()
        while not self._nursery.ended(0.01) and not (self._lines() > before or _held(locks)):
            pass

    def _lines(self) -> int:
        journal = self._again.journal
        return journal.read_bytes().count(b"\n") if journal.exists() else 0

    def _killed(self, seconds: float) -> tuple[str, str] | None:
        """Begin the command, kill it, and say how and what was wrong then; ``None`` if it was done before."""
        before = self._again.done(self._todo)
        self._begin()
        if self._draw.random() < 0.9:  # the others before it has begun anything
            self._alive()
        if self._nursery.ended(self._draw.uniform(0, seconds)):
            return None
        number = self._draw.choice(SIGNALS)
        victims = [pid for pid in self._nursery.left() if pid != self._nursery.pid]
        if victims and self._draw.random() < 0.5:
            kind = "a worker of run, SIGKILL"
            with suppress(ProcessLookupError):
                os.kill(self._draw.choice(victims), signal.SIGKILL)
            if not self._nursery.ended(300):
                return kind, "the command does not end"
        else:
            kind = f"run{' with 2 workers' * (self._workers > 1)}, {signal.Signals(number).name}"
            self._nursery.signal(number)
        left = self._nursery.gone()
        after = self._again.done(self._todo)
        lost = [str(path) for path, content in before.items() if after.get(path) != content]
        if left:
            return kind, f"{len(left)} processes were left"
        return kind, f"{lost[0]} was lost or made again" if lost else ""

    def _resumed(self, killed: int) -> str:
        """Come to the end, and say what is wrong then."""
        here = self._again
        if not self._nursery.ended(300) or self._nursery.returncode:
            return self._nursery.said.read_text(errors="replace").strip()[-300:]
        if self._nursery.gone():
            return "processes were left"
        for path in (here.records.path(cell).relative_to(here.top) for cell in self._todo):
            if here.content(path) != self._peace.content(path):
                return f"{path} differs"
        if extra := here.files() - self._peace.files():
            return f"{min(extra)} was left over"
        lines = here.journal.read_text().splitlines()
        if max(Counter(line for line in lines if line.startswith("wrote")).values()) > 1:
            return "a cell was finished twice"
        again = sum(line.startswith("begun") for line in lines) - len(self._todo)
        if again > killed * self._workers:
            return f"{again} cells were begun again"
        shutil.rmtree(here.top)
        return ""


def _held(locks: Path) -> bool:
    """Whether a process holds one of these locks, as Linux shows it."""
    held = {
        line.split()[5].rpartition(":")[2] for line in Path("/proc/locks").read_text().splitlines()
    }
    try:
        return any(str(path.stat().st_ino) in held for path in locks.iterdir())
    except OSError:
        return False


NOTEBOOK = (
    """profile = "digits"
seeds = [0]
device = "auto"
recompute = False
results = "results"
zoo = "zoo"
models = "models\"""",
    """from npmerge.run.engine import run_experiments
places = {"results": results, "zoo": zoo, "models": models}
len(run_experiments("comparison", profile=profile, seeds=seeds, **places))""",
)


def project(root: Path) -> None:
    """A project with the smallest book that there can be: a chapter that runs an experiment."""
    import nbformat

    ours = Path(__file__).parents[2]
    for name in ("notebooks", "results"):
        (root / name).mkdir(parents=True)
    shutil.copytree(ours / "book" / "_static", root / "book" / "_static")
    shutil.copy(ours / "book" / "references.bib", root / "book")
    shutil.copy(ours / "_config.yml", root)
    for page in (ours / "book").glob("*.md"):
        (root / "book" / page.name).write_text(f"# {page.stem}\n")
    (root / "_toc.yml").write_text(
        "format: jb-book\nroot: book/index\nchapters:\n  - file: notebooks/chapter\n"
    )
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    found = nbformat.v4.new_notebook(metadata={"kernelspec": kernel})
    found.cells = [
        nbformat.v4.new_markdown_cell("# Chapter"),
        *map(nbformat.v4.new_code_cell, NOTEBOOK),
    ]
    found.cells[1].metadata["tags"] = ["parameters"]
    nbformat.write(found, root / "notebooks" / "chapter.ipynb")


def _books(folder: Path, draw: random.Random, count: int) -> Iterator[Case]:
    """Kill the command that makes a book, and make it then."""
    root = folder / "project"
    project(root)
    folders = Folders(folder / "peace")

    names = ("JUPYTER_RUNTIME_DIR", "IPYTHONDIR")

    def words() -> list[str]:
        found = ["book", "--root", str(root), "--output", str(folders.top / "built"), "--quiet"]
        return [*found, "--seeds", "0", "--device", "cpu", *folders.words()]

    with Nursery(folder / "said", **{name: str(folder / name) for name in names}) as nursery:
        start = time.monotonic()
        nursery.begin(words())
        if not nursery.ended(500) or nursery.returncode:
            raise RuntimeError(nursery.said.read_text(errors="replace")[-2000:])
        seconds = time.monotonic() - start
        peace, made = folders, _all_files(folders)
        folders = Folders(folder / "killed")
        shutil.copytree(peace.zoo, folders.zoo)  # trainings are killed by the other kinds
        shutil.copytree(peace.results, folders.results)
        cases: list[tuple[str, str]] = []
        while len(cases) < count:
            for path in sorted(folders.results.rglob("permute-*.json"))[:1]:
                path.unlink()  # something is left to be run
            nursery.begin(words())
            if nursery.ended(draw.uniform(0, seconds)):
                continue
            number = draw.choice(SIGNALS)
            nursery.signal(number)
            left = nursery.gone()
            problem = f"{len(left)} processes were left" if left else ""
            cases.append((signal.Signals(number).name, problem))
        nursery.begin(words())
        wrong = ""
        if not nursery.ended(500) or nursery.returncode:
            wrong = nursery.said.read_text(errors="replace").strip()[-300:]
        elif nursery.gone():
            wrong = "processes were left"
        elif differ := _all_files(folders) ^ made:
            wrong = f"{min(differ)} is left over or missing"
        else:
            for path in sorted(peace.results.rglob("[!.]*.json")):
                here = path.relative_to(peace.top)
                if folders.content(here) != peace.content(here):
                    wrong = f"{here} differs"
    for name, problem in cases:
        note = problem or wrong
        yield Case(PART, f"book, {name}", "wrong" if note else RIGHT, note)


def _all_files(folders: Folders) -> set[Path]:
    """All that a book's command has made, but for locks."""
    every = (
        path for path in folders.top.rglob("*") if path.is_file() and path.parent.name != ".locks"
    )
    return {path.relative_to(folders.top) for path in every}
