"""Where tasks are done: in this process, or in processes of their own that end with it."""

from __future__ import annotations

import multiprocessing
import os
import select
import signal
import threading
from collections.abc import Callable
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import Connection
from typing import Any, TypeVar

T = TypeVar("T")


class Here(Executor):
    """Does a job in this process, when it is handed in."""

    slots = 1

    def submit(self, job: Callable[..., T], /, *args: Any, **options: Any) -> Future[T]:
        """Do a job."""
        done: Future[T] = Future()
        try:
            done.set_result(job(*args, **options))
        except Exception as error:  # noqa: BLE001 - as an executor hands over whatever was raised
            done.set_exception(error)
        return done


class Processes(Executor):
    """Does jobs in processes, one at a time each: one that is killed costs the job that it was at, and no other.

    They end with this process, however it ends.

    Args:
        count: how many processes; there must never be more jobs at a time.

    Attributes:
        slots: how many.
    """

    def __init__(self, count: int) -> None:
        self.slots = count
        self._idle = [_Process() for _ in range(count)]
        self._busy: dict[Future[Any], _Process] = {}

    def submit(self, job: Callable[..., T], /, *args: Any, **options: Any) -> Future[T]:
        """Begin a job; its future has a ``BrokenProcessPool`` if the process is killed."""
        for future in [future for future in self._busy if future.done()]:
            process = self._busy.pop(future)
            if isinstance(future.exception(), BrokenProcessPool):
                process.end()
                process = _Process()
            self._idle.append(process)
        process = self._idle.pop()
        if not process.is_alive():  # killed while it had nothing to do; its pool may not know yet
            process.end()
            process = _Process()
        begun = process.pool.submit(job, *args, **options)
        self._busy[begun] = process
        return begun

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """End the processes; what they are at is given up if ``cancel_futures``."""
        for process in [*self._idle, *self._busy.values()]:
            if cancel_futures:
                process.end(wait=wait)
            else:
                process.pool.shutdown(wait=wait)


def executor(workers: int) -> Here | Processes:
    """Does so many tasks side by side.

    Args:
        workers: one works in this process.
    """
    return Here() if workers == 1 else Processes(workers)


class _Process:
    """A process, which lives while this end of a pipe is open: until it is closed, or its owner is gone."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        theirs, self._ours = context.Pipe(duplex=False)
        self.pool = ProcessPoolExecutor(
            1, mp_context=context, initializer=_watch, initargs=(theirs,)
        )
        self.pool.submit(os.getpid)  # begins the process, which has its own end now
        theirs.close()

    def is_alive(self) -> bool:
        """Whether it runs, or is about to: the system closes its end of the pipe, however it ends."""
        errors = select.poll()
        errors.register(self._ours, 0)
        return not errors.poll(0)

    def end(self, *, wait: bool = False) -> None:
        """End it now, whatever it is at."""
        self._ours.close()
        self.pool.shutdown(wait=wait)


def _watch(owner: Connection) -> None:
    """End this process when the other end of a pipe is closed, and leave it to the owner to be stopped.

    A signal that goes to the whole group of processes, as that of Ctrl-C does, must not look like a cell that failed.
    """
    for one in (signal.SIGINT, signal.SIGTERM):
        signal.signal(one, signal.SIG_IGN)

    def leave() -> None:
        owner.poll(None)
        os._exit(1)

    threading.Thread(target=leave, daemon=True).start()
