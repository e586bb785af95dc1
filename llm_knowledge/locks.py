"""One run at a time in a directory."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from llm_knowledge.errors import InputError

LOCK = ".lock"


@contextmanager
def directory_lock(path: Path) -> Iterator[None]:
    """Holds a directory for one run; the kernel drops the lock with its owner, so none is ever stale.

    Raises:
        InputError: Another run holds it (the message says which: process, host, since when), the
            directory cannot be written, or its file system has no locks.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        handle = take_lock(path)
    except OSError as error:
        raise InputError(
            f"{path}: cannot be written or locked ({error}); choose another directory"
        ) from error
    if handle is None:
        raise InputError(
            f"{path}: another run is writing here ({lock_owner(path)}); wait for it, or choose another "
            "directory"
        )
    try:
        yield
    finally:
        release_lock(path, handle)


def take_lock(path: Path) -> int | None:
    """Locks an existing directory; returns what `release_lock` needs, or None if it is held already.

    Raises:
        OSError: The directory cannot be written, or its file system has no locks.
    """
    file = path / LOCK
    handle = os.open(file, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # The owner before us may have removed the file between our open and our lock.
        if os.fstat(handle).st_ino != file.stat().st_ino:
            raise FileNotFoundError
    except OSError as error:
        os.close(handle)
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES) or isinstance(error, FileNotFoundError):
            return None
        raise
    since = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())
    os.ftruncate(handle, 0)
    os.pwrite(handle, f"process {os.getpid()} on {socket.gethostname()} since {since}".encode(), 0)
    return handle


def release_lock(path: Path, handle: int) -> None:
    """Gives a directory free that `take_lock` locked, also where it has been moved or removed."""
    (path / LOCK).unlink(missing_ok=True)
    os.close(handle)


def lock_owner(path: Path) -> str:
    """Who holds a directory: process, host, since when; "unknown" if the owner has not said so yet."""
    try:
        return (path / LOCK).read_text(errors="replace")[:200] or "unknown"
    except OSError:
        return "unknown"
