"""Files that are written whole or not at all, made by one process at a time, and known by a hash."""

from __future__ import annotations

import contextlib
import errno
import glob
import hashlib
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from filelock import BaseFileLock

log = logging.getLogger(__name__)

LOCKS = ".locks"
"""The folder of lock files, beside what they are of."""

PATIENCE = 0.2
"""Seconds to try for a lock without waiting: longer than others hold it to ask whether it is held."""


class DamagedError(ValueError):
    """A stored file is not what was written, or not what it is taken for; the message names it and the reason."""


def canonical(content: object) -> bytes:
    """The one text of a JSON-serialisable value, whatever the order of its keys.

    Args:
        content: the value.

    Raises:
        ValueError: a number in it is not finite.
    """
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return text.encode()


def config_hash(config: object) -> str:
    """Twelve hexadecimal digits that stand for a JSON-serialisable configuration."""
    return sha256([canonical(config)])[:12]


def sha256(parts: Iterable[bytes | memoryview]) -> str:
    """The SHA-256 of bytes, in hexadecimal digits.

    Args:
        parts: the bytes, one piece after the other.
    """
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file so that another process sees either nothing, the old one or the whole new one.

    Args:
        path: the file; its folder is made.
        write: writes to the path it is given, a temporary one in the same folder.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    os.close(handle)
    part = Path(name)
    try:
        write(part)
        part.chmod(0o644)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


@contextlib.contextmanager
def locked(path: Path, *, wait: bool = True) -> Iterator[bool]:
    """Be the only one, of all processes and threads, who makes a file. A process that is killed is out of the way.

    What one that was killed while it wrote has left of the file is removed.

    Args:
        path: the file; it need not exist. Its folder is made.
        wait: for whoever is at it now.

    Yields:
        Whether this process is the one; always so after waiting.

    Raises:
        OSError: the folder cannot be written.
    """
    lock = _lock(_lock_file(path))
    Path(lock.lock_file).parent.mkdir(parents=True, exist_ok=True)
    got = _acquired(lock, PATIENCE)
    if wait and not got:
        log.info("waiting for another process, which makes %s", path)
        lock.acquire(poll_interval=PATIENCE)
        got = True
    try:
        if got:
            killed = f".{glob.escape(path.name)}.{'?' * 8}"  # as mkstemp names them
            for part in path.parent.glob(killed):
                part.unlink(missing_ok=True)
        yield got
    finally:
        lock.release()


def is_locked(path: Path) -> bool:
    """Whether a process is making a file now; not known, and ``False``, where this user may not write.

    Args:
        path: the file.
    """
    file = _lock_file(path)
    if not file.exists():
        return False
    lock = _lock(file)
    try:
        return not _acquired(lock, 0)
    except OSError:
        return False
    finally:
        lock.release()


def probe(path: Path, *, size: int = 0) -> None:
    """Find out before the work whether a file can be written; nothing is left behind.

    Args:
        path: the file; it, and folders above it, need not exist.
        size: bytes it will have, as far as known.

    Raises:
        OSError: it cannot; the message names the place and the reason.
    """
    folder = path.absolute().parent
    try:
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        while not folder.exists():
            folder = folder.parent
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(4096))
            file.flush()
        if shutil.disk_usage(folder).free < size:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    except OSError as error:
        reason = error.strerror or error
        raise type(error)(
            f"{path} cannot be written ({reason}, in {folder}): give another place, or make room there"
        ) from error


def _lock_file(path: Path) -> Path:
    return path.parent / LOCKS / f"{path.name}.lock"


def _lock(file: Path) -> BaseFileLock:
    from filelock import FileLock  # only who locks waits for it

    return FileLock(file)


def _acquired(lock: BaseFileLock, seconds: float) -> bool:
    from filelock import Timeout

    try:
        lock.acquire(timeout=seconds, poll_interval=PATIENCE / 10)
    except Timeout:
        return False
    return True
