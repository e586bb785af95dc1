"""Files and directories appear whole or not at all, and the next run cleans what a killed one left.

All is written in a *workspace*: a directory `.NAME.RANDOM.llm4msr-tmp` beside the target, so on the same
file system, that its process holds locked. What is done goes to the disk and takes its name by one
rename. The kernel drops the lock of a process that dies, so an unlocked workspace is abandoned: it may
hold prompts, vectors or ids of people, and `remove_abandoned` takes it away.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from llm_knowledge.errors import InputError
from llm_knowledge.locks import release_lock, take_lock

WORKSPACE_SUFFIX = ".llm4msr-tmp"
REPLACED_SUFFIX = ".llm4msr-replaced"


@contextmanager
def workspace(path: str | Path) -> Iterator[Path]:
    """Makes an empty directory beside `path` that is gone after the block, however the block ends.

    It serves for temporary files as well: `workspace(Path(tempfile.gettempdir()) / "metrics")`. After a
    kill it goes with the next `workspace` or `new_directory` in the same folder.

    Raises:
        OSError: It cannot be made.
    """
    path = Path(os.path.abspath(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_abandoned(path.parent)
    with _locked_workspace(path) as folder:
        yield folder


@contextmanager
def _locked_workspace(path: Path) -> Iterator[Path]:
    folder, handle = _make_workspace(path)
    try:
        yield folder
    finally:
        # Unlocked first: some network file systems keep a file that is open.
        if handle is not None:
            release_lock(folder, handle)
        shutil.rmtree(folder, ignore_errors=True)


def _make_workspace(path: Path) -> tuple[Path, int | None]:
    while True:
        folder = path.with_name(f".{path.name[:200]}.{secrets.token_hex(4)}{WORKSPACE_SUFFIX}")
        folder.mkdir(mode=0o700)
        try:
            handle = take_lock(folder)
        except FileNotFoundError:  # another run has cleaned it before it was locked
            continue
        except OSError:  # a file system without locks: the workspace lives, and nobody cleans it
            return folder, None
        if handle is not None:
            return folder, handle


def remove_abandoned(folder: str | Path) -> list[Path]:
    """Removes what killed runs left in a folder; live workspaces and those of other users stay.

    Whoever owns a directory for long (a run, an extraction) calls this once, after locking it.

    Returns:
        The workspaces that are gone now.
    """
    removed = []
    for leftover in Path(folder).glob(f".*{WORKSPACE_SUFFIX}"):
        try:
            handle = take_lock(leftover)
        except OSError:  # gone already, of another user, or on a file system without locks
            continue
        if handle is not None:
            release_lock(leftover, handle)
            shutil.rmtree(leftover, ignore_errors=True)
            removed.append(leftover)
    return removed


@contextmanager
def new_file(path: str | Path, durable: bool = True) -> Iterator[Path]:
    """Gives the name of a file to write, which becomes `path` by one rename when the block succeeds.

    Args:
        path: The file; an older one is replaced. Its folder is made.
        durable: Whether the bytes are on the disk before the rename, so that not even a machine that
            loses power leaves an empty file. False for what is written again every second.

    Raises:
        InputError: It cannot be written.
    """
    path = Path(os.path.abspath(path))
    with writing_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with _locked_workspace(path) as folder:
            temporary = folder / path.name
            yield temporary
            if durable:
                _sync(temporary)
            os.replace(temporary, path)
        if durable:
            _sync(path.parent)


def write_bytes(path: str | Path, data: bytes, durable: bool = True) -> Path:
    """Writes a file by `new_file`; returns its path."""
    with new_file(path, durable) as temporary:
        temporary.write_bytes(data)
    return Path(path)


def write_text(path: str | Path, text: str, durable: bool = True) -> Path:
    """Writes UTF-8 text by `new_file`; unpaired surrogates become question marks. Returns the path."""
    return write_bytes(path, text.encode("utf-8", "replace"), durable)


def write_json(path: str | Path, value: Any, durable: bool = True) -> Path:
    """Writes JSON (NaN and infinity are an error) by `new_file`; returns the path."""
    text = json.dumps(value, indent=2, allow_nan=False, ensure_ascii=False)
    return write_text(path, text + "\n", durable)


@contextmanager
def new_directory(path: str | Path) -> Iterator[Path]:
    """Gives a new directory that becomes `path` by one rename when the block succeeds.

    Nothing of it is left when the block fails. Its parent is a workspace, which the block may use for
    temporary files of its own.

    Raises:
        InputError: `path` is a file or not empty, or cannot be written.
    """
    path = Path(os.path.abspath(path))
    with writing_errors(path):
        check_new_directory(path)
        with workspace(path) as folder:
            directory = folder / path.name
            directory.mkdir()
            yield directory
            publish_directory(directory, path)


def check_new_directory(path: Path) -> None:
    """Checks that a directory can be written as a new one.

    Raises:
        InputError: It is a file or not empty.
    """
    if path.exists() and not path.is_dir():
        raise InputError(f"{path}: is a file; choose a new directory")
    if path.exists() and any(path.iterdir()):
        raise InputError(
            f"{path}: is not empty; nothing was changed; remove it or choose a new directory"
        )


def publish_directory(directory: Path, path: Path) -> None:
    """Brings a directory and its files to the disk, then renames it to `path`, absent or empty."""
    for folder, _, files in os.walk(directory, topdown=False):
        for name in files:
            _sync(Path(folder, name))
        _sync(Path(folder))
    os.replace(directory, path)  # a rename also replaces an empty directory
    _sync(path.parent)


def replace_directory(directory: Path, path: Path) -> None:
    """Renames a directory to `path`, in place of one that may be there with content.

    A directory with content cannot be replaced by one rename: the old one is set aside first, and
    `recover_replaced` brings it back should a crash fall between both renames.
    """
    if not path.exists():
        publish_directory(directory, path)
        return
    aside = path.with_name(f".{path.name}{REPLACED_SUFFIX}")
    shutil.rmtree(aside, ignore_errors=True)
    os.rename(path, aside)
    publish_directory(directory, path)
    shutil.rmtree(aside, ignore_errors=True)


def recover_replaced(folder: str | Path) -> list[Path]:
    """Brings back directories that a crash inside `replace_directory` left set aside in a folder.

    Returns:
        The directories that have their names again.
    """
    recovered = []
    for aside in Path(folder).glob(f".*{REPLACED_SUFFIX}"):
        path = aside.with_name(aside.name[1 : -len(REPLACED_SUFFIX)])
        if path.exists():
            shutil.rmtree(aside, ignore_errors=True)
        else:
            os.rename(aside, path)
            recovered.append(path)
    return recovered


@contextmanager
def writing_errors(path: Path) -> Iterator[None]:
    """Turns a fault of the file system inside the block into one message about `path`.

    Raises:
        InputError: In place of an OSError.
    """
    try:
        yield
    except OSError as error:
        raise InputError(
            f"{path}: cannot be written ({error}); nothing was changed; check space and rights, or choose "
            "another place"
        ) from error


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
