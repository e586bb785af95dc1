"""One run at a time in a directory."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from llm_knowledge.errors import InputError

logger = logging.getLogger(__name__)

LOCK = ".lock"
NO_LOCKS = {errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS}


def hold_directory(path: Path, wait_seconds: float = 0.0) -> int | None:
    """Takes a directory for one command; made where it is missing.

    The kernel drops the lock of a process that dies, so a dead owner holds nothing.

    Args:
        path: The directory.
        wait_seconds: How long another owner may still take.

    Returns:
        What `release_lock` needs; None, with a warning, where the file system has no locks.

    Raises:
        InputError: Another command holds it (the message says which process on which host since when), or
            it cannot be written.
    """
    end = time.monotonic() + wait_seconds
    try:
        path.mkdir(parents=True, exist_ok=True)
        while (handle := take_lock(path)) is None and time.monotonic() < end:
            time.sleep(0.1)
    except OSError as error:
        if error.errno in NO_LOCKS:
            logger.warning("%s: its file system has no locks: start no second command there", path)
            return None
        raise InputError(
            f"{path}: cannot be written or locked ({error.strerror}); choose another directory"
        ) from error
    if handle is None:
        raise InputError(
            f"{path}: another run is writing here ({lock_owner(path)}); wait for it, or choose another "
            "directory"
        )
    return handle


@contextmanager
def directory_lock(path: Path, wait_seconds: float = 0.0) -> Iterator[None]:
    """`hold_directory` for a block."""
    handle = hold_directory(path, wait_seconds)
    try:
        yield
    finally:
        if handle is not None:
            release_lock(path, handle)


def take_lock(path: Path) -> int | None:
    """Locks an existing directory; returns what `release_lock` needs, or None if it is held already.

    Raises:
        OSError: The directory cannot be written, or its file system has no locks.
    """
    file = path / LOCK
    # A directory may come from somebody else: what a link in it leads to is not ours to write.
    handle = os.open(file, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o644)
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
