"""A command that is stopped from outside ends in order: no failed cell, no process left, and trainings go on later."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from processes import alive, children, needs_proc, until
from tiny import tiny_profile

from npmerge.experiments import cells
from npmerge.store.records import Records

PROGRAM = """
import sys
sys.path.insert(0, sys.argv[1])
import pytest
from tiny import tiny_profile
from npmerge.cli import main
from npmerge.store import zoo
from npmerge.training import fit

def long(*args, **options):
    told = lambda epoch, loss: print("epoch", epoch, flush=True)
    return fit(*args, **options | {"epochs": 1000, "save_every": 0, "on_epoch": told})

zoo.fit = long
tiny_profile(pytest.MonkeyPatch())
sys.exit(main(sys.argv[2:]))
"""

pytestmark = needs_proc


def start(folder: Path, *, workers: int) -> subprocess.Popen[str]:
    """Run cells whose base models never end, in a process group of its own."""
    words = ["run", "same_data", "--profile", "tiny", "--seeds", "0", "--device", "cpu", "--quiet"]
    words += ["--results", str(folder / "results"), "--zoo", str(folder / "zoo")]
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(Path(__file__).parent), *words, "--workers", str(workers)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip


def told_epoch(process: subprocess.Popen[str]) -> int:
    """The next epoch that a training has come to the end of."""
    assert process.stdout is not None
    return int(process.stdout.readline().split()[1])


def failed(folder: Path) -> list[str]:
    """The cells that a run has given up."""
    with pytest.MonkeyPatch.context() as patch:
        tiny_profile(patch)
        records = Records(folder / "results")
        todo = cells("same_data", "tiny", [0])
        return [cell.label for cell in todo if records.state(cell) == "failed"]


def test_a_stopped_training_goes_on_from_its_last_epoch(tmp_path: Path) -> None:
    def stop(process: subprocess.Popen[str]) -> None:
        process.terminate()
        _, said = process.communicate(timeout=60)
        words = "stopped; finished cells are kept, the same command goes on from there"
        assert (process.returncode, said) == (130, f"npmerge: {words}\n")

    with start(tmp_path, workers=1) as process:
        while told_epoch(process) < 3:
            pass
        stop(process)
    (left,) = (path for path in (tmp_path / "zoo").iterdir() if path.name != ".locks")
    assert left.suffix == ".training"
    with start(tmp_path, workers=1) as process:
        assert told_epoch(process) >= 3  # the second epoch was saved
        stop(process)
    assert failed(tmp_path) == []


def test_sigterm_to_a_command_and_its_workers_ends_them_and_fails_no_cell(tmp_path: Path) -> None:
    with start(tmp_path, workers=2) as process:
        until(lambda: len(list((tmp_path / "zoo" / ".locks").glob("*"))) == 2)
        workers = children(process.pid)
        assert len(workers) >= 2
        os.killpg(process.pid, signal.SIGTERM)
        _, said = process.communicate(timeout=60)
        assert process.returncode == 130, said
    until(lambda: not any(map(alive, workers)), seconds=10)
    assert failed(tmp_path) == []
