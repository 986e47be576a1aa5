"""Files of the store: written whole, made by one process at a time, and refused before the work if they cannot be."""

from __future__ import annotations

import math
import signal
import subprocess
import sys
import time
from pathlib import Path
from threading import Thread

import pytest

from npmerge.store.files import config_hash, is_locked, locked, probe, sha256, write_atomically

HOLD = """
import sys, time
from pathlib import Path
from npmerge.store.files import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def held_elsewhere(path: Path) -> subprocess.Popen[str]:
    """Another process that makes the file."""
    command = [sys.executable, "-c", HOLD, str(path)]
    other = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert other.stdout is not None
    assert other.stdout.readline() == "held\n"
    return other


def listing(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def test_a_configuration_s_hash_does_not_depend_on_the_order_of_its_keys() -> None:
    assert config_hash({"a": 1, "b": [2]}) == config_hash({"b": [2], "a": 1})
    assert config_hash({"a": 1}) != config_hash({"a": 2})
    assert len(config_hash({})) == 12


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_configuration_has_finite_numbers(value: float) -> None:
    with pytest.raises(ValueError, match="JSON compliant"):
        config_hash({"lr": value})


def test_bytes_have_one_hash_however_they_come() -> None:
    assert sha256([b"ab", b"c"]) == sha256([b"abc"]) != sha256([b"acb"])


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "file"
    write_atomically(path, lambda part: part.write_text("old"))

    def fail(part: Path) -> None:
        part.write_text("half of the n")
        assert path.read_text() == "old"  # nobody sees the new one before it is whole
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_atomically(path, fail)
    assert path.read_text() == "old"
    assert list(path.parent.iterdir()) == [path]


def test_a_file_is_made_by_one_process_and_a_killed_one_is_out_of_the_way(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "file"
    assert not is_locked(path)
    assert listing(tmp_path) == []  # asking leaves nothing behind
    with held_elsewhere(path) as other:
        assert is_locked(path)
        with locked(path, wait=False) as got:
            assert not got
        with locked(path.with_name("another"), wait=False) as got:
            assert got
        other.send_signal(signal.SIGKILL)
    assert not is_locked(path)
    with locked(path, wait=False) as got:
        assert got
        assert is_locked(path)
    assert not is_locked(path)
    assert [name for name in listing(tmp_path / "folder") if not name.startswith(".")] == []


def test_whoever_waits_gets_the_lock_when_the_other_is_done(tmp_path: Path) -> None:
    path, order = tmp_path / "file", []

    def wait() -> None:
        with locked(path) as got:
            order.append(f"second {got}")

    with locked(path) as got:
        thread = Thread(target=wait)
        thread.start()
        time.sleep(0.5)
        order.append(f"first {got}")
    thread.join()
    assert order == ["first True", "second True"]


def test_asking_who_is_at_work_keeps_nobody_from_it(tmp_path: Path) -> None:
    path, stop = tmp_path / "file", False
    with locked(path):
        pass

    def ask() -> None:
        while not stop:
            is_locked(path)

    thread = Thread(target=ask)
    thread.start()
    for _ in range(30):
        with locked(path, wait=False) as got:
            assert got
    stop = True
    thread.join()


def test_a_place_that_can_be_written_is_left_as_it_was(tmp_path: Path) -> None:
    probe(tmp_path / "new" / "folder" / "file", size=100)
    assert listing(tmp_path) == []
    (tmp_path / "file").write_text("old")
    probe(tmp_path / "file")
    assert (tmp_path / "file").read_text() == "old"


def test_a_place_that_cannot_be_written_is_named_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(
        NotADirectoryError, match=r"file/model cannot be written \(Not a dir.*/file"
    ):
        probe(tmp_path / "file" / "model")
    with pytest.raises(IsADirectoryError, match=r"cannot be written \(Is a directory"):
        probe(tmp_path)
    with pytest.raises(OSError, match=r"model cannot be written \(No space left"):
        probe(tmp_path / "model", size=2**60)

    def read_only(**_: object) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr("tempfile.TemporaryFile", read_only)
    with pytest.raises(OSError, match=r"x/y cannot be written \(Read-only file system, in .*give"):
        probe(tmp_path / "x" / "y")
