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
from typing import TYPE_CHECKING, Any

from pydantic import TypeAdapter, ValidationError

from llm_knowledge.errors import InputError
from llm_knowledge.json_files import read_json
from trainer.checkpoint.loop_state import LoopState

if TYPE_CHECKING:  # which imports this module
    pass


DESCRIPTION = "checkpoint.json"


FORMAT_VERSION = 2


def finish(partial: Path, target: Path, description: dict[str, Any]) -> None:
    """Describes what was written into `partial` and renames it to `target`, replacing what is there."""
    sizes = {path.name: path.stat().st_size for path in sorted(partial.iterdir())}
    with (partial / DESCRIPTION).open("w", encoding="utf-8") as file:
        json.dump(description | {"files": sizes}, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    if target.exists():
        # Aside rather than away: only a rename lies between the old one and the new one.
        replaced = target.with_suffix(".replaced.partial")
        shutil.rmtree(replaced, ignore_errors=True)
        target.rename(replaced)
    partial.rename(target)


def prune(folder: Path, keep_last: int, keep_best: int) -> None:
    """Removes leftovers of killed writers, and all but the newest and the best checkpoints."""
    for leftover in folder.glob("step-*.partial"):
        shutil.rmtree(leftover)
    found = checkpoints(folder)
    whole = {path: read_state(path) for path in found if problem_of(path) is None}
    newest = list(whole)[-keep_last:]
    measured = {path: state.auc for path, state in whole.items() if state.auc is not None}
    best = sorted(measured, key=lambda path: measured[path], reverse=True)[:keep_best]
    kept = {*newest, *best, *(best_of(folder, whole[path]) for path in newest)}
    for path in found:
        if path not in kept:
            shutil.rmtree(path)


def checkpoints(folder: Path) -> list[Path]:
    """Lists checkpoints, oldest first; partial ones, which have not got their name yet, are not there."""
    return sorted(path for path in folder.glob("step-*") if path.is_dir() and not path.suffix)


def best_of(folder: Path, state: LoopState) -> Path:
    """The checkpoint of the best evaluation."""
    return folder / f"step-{state.best_step:08d}"


def _read(checkpoint: Path) -> dict[str, Any] | None:
    try:
        description = read_json(
            checkpoint / DESCRIPTION, {"files": dict, "loop": dict}, "remove it"
        )
        _loop_state(description)
    except (InputError, ValidationError):
        return None
    return description


def problem_of(checkpoint: Path) -> str | None:
    """Says what is wrong with a checkpoint: None, or which file is missing or cut short."""
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


def read_description(checkpoint: Path) -> dict[str, Any]:
    """Reads `checkpoint.json`.

    Raises:
        InputError: If the checkpoint is not whole.
    """
    if problem := problem_of(checkpoint):
        raise InputError(
            f"{checkpoint}: the checkpoint is damaged: {problem}; remove it to go on from an older one"
        )
    return _read(checkpoint) or {}


def read_state(checkpoint: Path) -> LoopState:
    """Reads the loop's position from a checkpoint; fields of later versions are left aside.

    Raises:
        InputError: If the checkpoint is not whole.
    """
    return _loop_state(read_description(checkpoint))


def _loop_state(description: dict[str, Any]) -> LoopState:
    known = {field.name for field in fields(LoopState)}
    loop = {name: value for name, value in description["loop"].items() if name in known}
    return TypeAdapter(LoopState).validate_json(json.dumps(loop), strict=True)
