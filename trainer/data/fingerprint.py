"""What makes two datasets the same, and what one has that another had not.

There are three identities, because three questions are asked:

    `llm_knowledge.dataset_files.dataset_fingerprint`
                             does a position in the rows mean the same rows? (resuming, appending)
    description_fingerprint  are two runs measured on the same users, items, splits and scenarios?
    `llm_knowledge.profiles.dataset.Dataset.fingerprint`
                             would prompts of a level be made of the same bytes?

Their values stand in run directories and stores, so what enters them stays as it is.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llm_knowledge.errors import InputError

if TYPE_CHECKING:
    from trainer.data.dataset import DatasetInfo


def description_fingerprint(description: dict[str, Any]) -> str:
    """Identifies what dataset.json says about rows, split and scenarios, not versions or sources.

    Args:
        description: Content of dataset.json as `read_description` gives it: a field that an older file
            lacks must not enter as a default.
    """
    kept = ("name", "scenarios", "history_length", "split", "rows", "users", "items", "negatives")
    text = json.dumps({key: description.get(key) for key in kept}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


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
