"""What makes two datasets the same, and what one has that another had not."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING

from llm_knowledge.errors import InputError
from trainer.data.dataset import (
    SPLITS,
    DatasetInfo,
    split_files,
)

if TYPE_CHECKING:
    pass


def fingerprint(path: Path | str) -> str:
    """Identifies a dataset's content, wherever it lies: its description, its parts and their sizes."""
    found = hashlib.sha256((Path(path) / "dataset.json").read_bytes())
    for split in SPLITS:
        for file in split_files(path, split):
            found.update(f"\0{split}/{file.name} {file.stat().st_size}".encode())
    return found.hexdigest()[:32]


def new_training_rows(info: DatasetInfo, path: Path, trained_on: str) -> tuple[int, int]:
    """Where the train split's parts begin that a run on an earlier dataset has not trained on.

    Args:
        info: description of the later dataset.
        path: the later dataset, for messages.
        trained_on: fingerprint of the earlier dataset.

    Returns:
        number of parts of the train split to leave out, and their rows.

    Raises:
        InputError: the later dataset was not made by appending to the earlier one.
    """
    for parent in info.parents:
        if parent.fingerprint == trained_on:
            return parent.train_parts, parent.train_rows
    raise InputError(
        f"{path}: was not made by appending to the data of the run to continue from; "
        "`llm4msr prepare parquet --append-to` that run's dataset, or train a new run"
    )
