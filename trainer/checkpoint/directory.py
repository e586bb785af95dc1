"""Checkpoints on disk: what is there, what of it is whole, what it says of itself, which are kept.

A checkpoint is a directory `step-00000120` that appears by rename: torch.distributed.checkpoint's files
and `checkpoint.json`, which can be read without torch. It holds the trainable state (tables, their
optimizer state, dense parameters, Adam's moments); frozen vectors are not in it, their store has them.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import fields
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from llm_knowledge.errors import InputError
from llm_knowledge.json_files import read_json
from llm_knowledge.store.manifest import file_checksum, fingerprint_of
from trainer.checkpoint.loop_state import LoopState

DESCRIPTION = "checkpoint.json"
FORMAT_VERSION = 2
FIELDS: dict[str, Any] = {"files": dict, "loop": dict, "fingerprints": dict, "config": dict}
SET_ASIDE = ".replaced.partial"  # suffix of a checkpoint whose step is being saved again


def finish(
    partial: Path, target: Path, description: dict[str, Any], checksums: dict[str, str]
) -> None:
    """Describes what was written into `partial` and renames it to `target`, replacing what is there.

    Args:
        partial: The folder that all ranks have written into.
        target: Its name once it is whole.
        description: What `checkpoint.json` says besides files and checksums.
        checksums: Of files that other ranks have written, by name; the other files are read here.
    """
    files = sorted(partial.iterdir())
    sums = {file.name: checksums.get(file.name) or file_checksum(file) for file in files}
    sizes = {file.name: file.stat().st_size for file in files}
    content = description | {"files": sizes, "checksums": sums}
    with (partial / DESCRIPTION).open("w", encoding="utf-8") as file:
        json.dump(content | {"checksum": fingerprint_of(content)}, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    if target.exists():
        # Aside rather than away: only a rename lies between the old one and the new one, and
        # `recover` undoes it where the second rename never came.
        replaced = target.with_suffix(SET_ASIDE)
        shutil.rmtree(replaced, ignore_errors=True)
        target.rename(replaced)
    partial.rename(target)


def recover(folder: Path) -> None:
    """Gives checkpoints their names back that were set aside by a writer that died before it was done.

    For the owner of the run alone: to a writer that lives it would come in between.
    """
    for replaced in folder.glob(f"step-*{SET_ASIDE}"):
        target = replaced.with_name(replaced.name.removesuffix(SET_ASIDE))
        if not target.exists():
            replaced.rename(target)


def prune(folder: Path, keep_last: int, keep_best: int) -> None:
    """Removes leftovers of killed writers, and all but the newest and the best checkpoints."""
    recover(folder)
    for leftover in folder.glob("step-*.partial"):
        shutil.rmtree(leftover)
    saved = checkpoints(folder)
    whole = {path: read_state(path) for path in saved if problem_of(path) is None}
    newest = list(whole)[-keep_last:]
    measured = {path: state.score for path, state in whole.items() if state.score is not None}
    best = sorted(measured, key=lambda path: measured[path], reverse=True)[:keep_best]
    kept = {*newest, *best, *(best_of(folder, whole[path]) for path in newest)}
    for path in saved:
        if path not in kept:
            shutil.rmtree(path)


def checkpoints(folder: Path) -> list[Path]:
    """Lists checkpoints, oldest first; partial ones, which have not got their name yet, are not there."""
    return sorted(path for path in folder.glob("step-*") if path.is_dir() and not path.suffix)


def best_of(folder: Path, state: LoopState) -> Path:
    """The checkpoint of the best evaluation; this state's own before the first one."""
    return folder / f"step-{state.best_step or state.step:08d}"


def _read(checkpoint: Path) -> dict[str, Any] | None:
    try:
        description = read_json(checkpoint / DESCRIPTION, FIELDS, "remove it")
        _loop_state(description)
    except (InputError, ValidationError):
        return None
    if not all(isinstance(description["config"].get(name), dict) for name in ("data", "tables")):
        return None
    content = {name: value for name, value in description.items() if name != "checksum"}
    if "checksums" not in content and "checksum" not in description:  # of version 0.1
        return description
    return description if description.get("checksum") == fingerprint_of(content) else None


def problem_of(checkpoint: Path) -> str | None:
    """Says what is wrong with a checkpoint: None, or which file is missing or cut short.

    Contents are not read, see `problem_within`.
    """
    if not checkpoint.is_dir():
        return "there is no such checkpoint"
    description = _read(checkpoint)
    if description is None:
        return f"{DESCRIPTION} is missing or damaged"
    if description.get("format_version") != FORMAT_VERSION:
        return (
            f"{DESCRIPTION} has format_version {description.get('format_version')}, this program reads "
            f"{FORMAT_VERSION}"
        )
    for name, size in description["files"].items():
        path = checkpoint / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes instead of {size}"
    return None


def problem_within(checkpoint: Path, share: slice = slice(None)) -> str | None:
    """Says what is wrong with a checkpoint, its contents read and compared with their checksums.

    Args:
        checkpoint: The checkpoint; those of version 0.1 have no checksums.
        share: Which of its files to read: ranks divide them.
    """
    if problem := problem_of(checkpoint):
        return problem
    for name, checksum in list(read_description(checkpoint).get("checksums", {}).items())[share]:
        try:
            if file_checksum(checkpoint / name) != checksum:
                return f"{name} has another checksum than when it was written"
        except InputError as error:
            return str(error)
    return None


def read_description(checkpoint: Path) -> dict[str, Any]:
    """Reads `checkpoint.json`.

    Raises:
        InputError: If the checkpoint is not whole.
    """
    if problem := problem_of(checkpoint):
        raise damaged(checkpoint, problem)
    return _read(checkpoint) or {}


def damaged(checkpoint: Path, problem: str) -> InputError:
    """The error about a checkpoint that is not whole."""
    return InputError(
        f"{checkpoint}: the checkpoint is damaged: {problem}; remove it to go on from an older one"
    )


def read_state(checkpoint: Path) -> LoopState:
    """Reads the loop's position from a checkpoint; fields of later versions are left aside.

    Raises:
        InputError: If the checkpoint is not whole.
    """
    return _loop_state(read_description(checkpoint))


def _loop_state(description: dict[str, Any]) -> LoopState:
    known = {field.name for field in fields(LoopState)}
    loop = {name: value for name, value in description["loop"].items() if name in known}
    if "score" not in loop:  # version 0.1 knew the AUC only
        best = loop.get("best_auc")
        loop |= {"score": loop.get("auc"), "best_score": best, "best_by": best and "auc"}
    return TypeAdapter(LoopState).validate_json(json.dumps(loop), strict=True)
