"""``npmerge`` with the profile ``tiny``, trainings that are saved after each epoch, and a journal of the cells.

Worker processes import this file too, and get the same.
"""

from __future__ import annotations

import json
import os
import sys
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import pytest
from tiny import tiny_profile

JOURNAL = os.environ.get("NPMERGE_JOURNAL")


def note(words: str) -> None:
    """Add a line to the journal, in one piece."""
    if JOURNAL:
        with Path(JOURNAL).open("ab", buffering=0) as file:
            file.write(f"{words}\n".encode())


def torture() -> None:
    """Change what a command imports."""
    from npmerge import training
    from npmerge.run import engine
    from npmerge.store import zoo
    from npmerge.store.records import Records

    def begun(cell: Any, bench: Any, do: Any = engine.do_cell) -> Any:
        note(f"begun {cell.label}")
        return do(cell, bench)

    def wrote(self: Records, cell: Any, *rest: Any, write: Any = Records.write) -> Path:
        path: Path = write(self, cell, *rest)
        note(f"wrote {cell.label}")
        return path

    engine.do_cell = begun
    Records.write = wrote  # type: ignore[method-assign]
    training.fit = zoo.fit = partial(training.fit, save_every=0)
    tiny_profile(pytest.MonkeyPatch())


def nursery(said: str) -> None:
    """Begin the commands whose words come in, one a line; tell the process of each, and how it ended."""
    import torch._inductor  # noqa: F401

    import npmerge.book
    import npmerge.run.engine  # noqa: F401 - all that commands import on their way
    from npmerge.data import load

    load("digits")
    torture()
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            os.setsid()
            opened = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            for number in (1, 2):
                os.dup2(opened, number)
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            sys.argv[1:] = json.loads(line)
            return
        print(pid, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
    sys.exit()


if __name__ == "__mp_main__":
    torture()

if __name__ == "__main__":
    from npmerge.cli import main

    if sys.argv[1] == "--nursery":
        nursery(sys.argv[2])
    elif sys.argv[1] == "run":
        torture()
    sys.exit(main(sys.argv[1:]))
