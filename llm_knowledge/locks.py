"""One run at a time in a directory."""

from __future__ import annotations

import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from llm_knowledge.errors import InputError


@contextmanager
def directory_lock(path: Path) -> Iterator[None]:
    """Hold a directory for one run; the kernel drops the lock with its owner: none is ever stale.

    Raises:
        InputError: another run holds it, or the directory cannot be written.
    """
    file = path / ".lock"
    try:
        path.mkdir(parents=True, exist_ok=True)
        handle = os.open(file, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error}); choose another --out") from error
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # The owner before us removed the file between our open and our lock: it is not ours.
        if not file.exists() or os.fstat(handle).st_ino != file.stat().st_ino:
            raise BlockingIOError
    except BlockingIOError:
        owner = os.pread(handle, 200, 0).decode(errors="replace") or "unknown"
        os.close(handle)
        raise InputError(f"{path}: another run is writing here ({owner}); wait for it, or choose "
                         f"another --out") from None  # fmt: skip
    try:
        os.ftruncate(handle, 0)
        os.pwrite(handle, f"pid {os.getpid()} on {socket.gethostname()}".encode(), 0)
        yield
    finally:
        file.unlink(missing_ok=True)
        os.close(handle)
