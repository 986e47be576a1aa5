"""Workers: one that is killed costs its job and no other, and none outlives its owner."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import pytest
from processes import alive, children, needs_proc, until

from npmerge.run.workers import Here, Processes, executor

pytestmark = needs_proc
OWNER = """
import time
from npmerge.run.workers import Processes

pool = Processes(2)
for _ in range(2):
    pool.submit(time.sleep, 600)
time.sleep(600)
"""


@pytest.fixture
def two() -> Iterator[Processes]:
    pool = Processes(2)
    yield pool
    pool.shutdown(cancel_futures=True)


def test_one_worker_is_this_process_and_hands_over_what_was_raised() -> None:
    pool = executor(1)
    assert pool.submit(os.getpid).result() == os.getpid()
    assert isinstance(pool.submit(int, "x").exception(), ValueError)
    pool.shutdown()


def test_an_interrupt_in_this_process_is_no_failure_of_the_job() -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Here().submit(interrupt)


def test_a_killed_process_costs_its_job_and_no_other(two: Processes) -> None:
    long, killed = two.submit(time.sleep, 1), two.submit(signal.raise_signal, signal.SIGKILL)
    assert isinstance(killed.exception(), BrokenProcessPool)
    assert two.submit(os.getpid).result() != os.getpid()
    assert long.exception() is None


def test_a_process_that_was_killed_while_idle_costs_nothing(two: Processes) -> None:
    pids = []
    for _ in range(2):
        pids.append(two.submit(os.getpid).result())
        os.kill(pids[-1], signal.SIGKILL)
        until(lambda: not alive(pids[-1]))
    assert two.submit(os.getpid).result() not in pids


def test_a_job_that_fails_leaves_its_process_as_it_is(two: Processes) -> None:
    pids = {two.submit(os.getpid).result() for _ in range(4)}
    assert isinstance(two.submit(int, "x").exception(), ValueError)
    assert two.submit(os.getpid).result() in pids
    assert len(pids) <= 2


def test_the_keyboard_does_not_interrupt_a_worker(two: Processes) -> None:
    pid = two.submit(os.getpid).result()
    os.kill(pid, signal.SIGINT)
    assert alive(pid)
    assert pid in [two.submit(os.getpid).result() for _ in range(2)]


def test_processes_that_are_given_up_end_at_once_whatever_they_are_at() -> None:
    pool = Processes(2)
    pid = pool.submit(os.getpid).result()
    for _ in range(2):
        pool.submit(time.sleep, 600)
    start = time.monotonic()
    pool.shutdown(wait=True, cancel_futures=True)
    assert time.monotonic() - start < 60
    assert not alive(pid)


def test_processes_that_are_shut_down_end_what_they_are_at() -> None:
    pool = Processes(2)
    job = pool.submit(time.sleep, 0.2)
    pool.shutdown()
    assert job.done()
    assert job.exception() is None


def test_processes_end_when_their_owner_is_killed() -> None:
    def workers() -> list[int]:
        return [pid for pid in children(owner.pid) if b"spawn_main" in commands(pid)]

    def commands(pid: int) -> bytes:
        return Path(f"/proc/{pid}/cmdline").read_bytes()

    with subprocess.Popen([sys.executable, "-c", OWNER]) as owner:
        until(lambda: len(workers()) == 2)
        found = workers()
        owner.kill()
    until(lambda: not any(map(alive, found)), seconds=10)
