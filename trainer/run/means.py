"""The mean of every knowledge store, taken once when a run begins and kept with it.

Vectors are read less this mean: what all of them share tells nobody from anybody, and hides what does.
It stays when a store is refreshed, since the layers have learned what a vector less this mean says. A
run of version 0.1 has no means and reads vectors as they are.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from llm_knowledge.errors import InputError
from llm_knowledge.files import new_file
from llm_knowledge.levels import LEVELS
from llm_knowledge.store.dated import DatedStores
from llm_knowledge.store.spread import mean_vector
from trainer.config.run import load_config

FILE = "knowledge_means.safetensors"
Means = dict[str, np.ndarray]  # level to float32 [dim]


def prepare_means(
    folder: Path, stores: dict[str, DatedStores], centre: bool, begins_with: Path | None
) -> None:
    """Writes a new run's means; a run that is there keeps what it has.

    Args:
        folder: The run directory.
        stores: Knowledge by level; of dated stores the oldest has the mean.
        centre: Whether vectors are centred at all (`knowledge.centre`).
        begins_with: The run whose weights this one begins with. Levels that it joined keep its means, or
            stay as they are; what its layers have learned would mean something else otherwise.

    Raises:
        InputError: The other run's file is damaged, or this one's cannot be written.
    """
    if not centre or not stores or (folder / "config.yaml").exists():
        return
    earlier, joined = ({}, set()) if begins_with is None else _earlier(begins_with)
    means = {level: earlier[level] for level in stores if level in earlier}
    for level, dated in stores.items():
        if level not in joined:
            means[level] = mean_vector(dated.stores[0])
    if means:
        with new_file(folder / FILE) as file:
            save_file(means, file)


def _earlier(run: Path) -> tuple[Means, set[str]]:
    """Means of another run, and the levels that it joined."""
    knowledge = load_config(run / "config.yaml").knowledge
    return read_means(run), {level for level in LEVELS if getattr(knowledge, level) is not None}


def read_means(folder: Path) -> Means:
    """Means of a run by level; those that it has not are 0.

    Raises:
        InputError: The file is damaged.
    """
    file = folder / FILE
    if not file.exists():
        return {}
    try:
        return dict(load_file(file))
    except (SafetensorError, OSError) as error:
        raise InputError(
            f"{file}: cannot be read ({error}); put it back from a copy of the run, or train a new one"
        ) from error


def run_means(folder: Path, stores: dict[str, DatedStores]) -> Means:
    """A run's means of the stores that it joins.

    Raises:
        InputError: The file is damaged, or a mean is of another width than the store's vectors.
    """
    means = {level: mean for level, mean in read_means(folder).items() if level in stores}
    for level, mean in means.items():
        if mean.shape != (stores[level].dim,):
            raise InputError(
                f"{folder / FILE}: the mean of {level} has {mean.size} numbers, the store's vectors "
                f"{stores[level].dim}; put the run's own file back"
            )
    return means


def means_fingerprint(means: Means) -> str | None:
    """Identifies means; None without any."""
    digest = hashlib.sha256()
    for level in sorted(means):
        digest.update(f"\0{level}\0".encode() + means[level].tobytes())
    return digest.hexdigest()[:32] if means else None


def run_of(source: Path) -> Path:
    """The run directory that a path to a run or to one of its checkpoints means."""
    return source if (source / "checkpoints").is_dir() else source.parent.parent
