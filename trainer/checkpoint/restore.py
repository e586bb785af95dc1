"""From a checkpoint back into a run: the newest one that is whole, on any number of ranks."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING

import torch.distributed as dist

from embeddings.optimizer import set_update_count
from llm_knowledge.errors import InputError
from trainer.checkpoint.state import load_state
from trainer.config.run import differences

if TYPE_CHECKING:  # which imports this module
    from trainer.run.session import Run
from trainer.checkpoint.directory import (
    best_of,
    checkpoints,
    damaged,
    problem_within,
    read_description,
    read_state,
    recover,
)
from trainer.checkpoint.loop_state import LoopState

logger = logging.getLogger(__name__)


def load_checkpoint(checkpoint: Path, run: Run) -> LoopState:
    """Restores model and optimizers in place, whatever ranks and shardings they were saved from.

    Raises:
        InputError: If the checkpoint is damaged, of another model, or of other knowledge stores.
    """
    if problem := _problem(checkpoint):
        raise damaged(checkpoint, problem)
    description = read_description(checkpoint)
    if description["fingerprints"] != run.fingerprints:
        raise InputError(
            f"{checkpoint}: trained with knowledge {description['fingerprints'] or 'none'}, the "
            f"configuration names {run.fingerprints or 'none'}; point knowledge.* at the stores it was "
            "trained with, or start anew"
        )
    if description.get("means") != run.means_fingerprint:
        raise InputError(
            f"{checkpoint}: was trained with other means of its stores than those in {run.folder}/"
            "knowledge_means.safetensors: vectors would mean something else; put the run's own file back"
        )
    if description.get("features") != run.features_fingerprint:
        raise InputError(
            f"{checkpoint}: was trained with another encoder of features than {run.folder}/features.json "
            f"(fingerprint {description.get('features')}, here {run.features_fingerprint}): ids and numbers "
            "would mean something else; put the run's own features.json and ids back"
        )
    try:
        load_state(checkpoint, run)
    except InputError as error:
        changed = differences(description["config"], run.config.model_dump(), ("model", "tables"))
        words = f"; its configuration differs: {', '.join(changed)}" if changed else ""
        raise InputError(f"{error}{words}") from error
    state = read_state(checkpoint)
    set_update_count(run.model, state.table_updates)
    if run.model.module.row_owners is not None:
        run.model.module.row_owners.rebuild()
    return state


def _problem(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint, the same on all ranks; each reads its share of the files."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    problems: list[str | None] = [None] * ranks
    dist.all_gather_object(problems, problem_within(checkpoint, slice(rank, None, ranks)))
    return next((problem for problem in problems if problem), None)


def restore_newest(run: Run, folder: Path) -> LoopState | None:
    """Restores the newest checkpoint that is whole; says which ones were passed over.

    Returns:
        Its state, or None if there is no checkpoint at all.

    Raises:
        InputError: If there are checkpoints and none is whole, or the newest one does not fit.
    """
    listed: list[list[Path]] = [[]]
    if run.runtime.is_main:  # one rank looks, so that all take the same
        recover(folder)
        listed[0] = list(reversed(checkpoints(folder)))
    dist.broadcast_object_list(listed)
    if not listed[0]:
        return None
    skipped = []
    for path in listed[0]:
        problem = _problem(path)
        if problem is None:
            break
        skipped.append(f"{path}: {problem}")
    else:
        raise InputError(
            "\n".join([*skipped, "no checkpoint is whole: remove the run to start anew"]),
            shared=True,
        )
    state = load_checkpoint(path, run)
    best = best_of(folder, state)
    if state.best_step and best != path and (problem := _problem(best)):
        state.forget_best()
        instead = "this one" if state.finished else "the next evaluation"
        skipped.append(
            f"{best}: the best checkpoint is not whole: {problem}; {instead} is the best"
        )
    if run.runtime.is_main:
        for line in [*(f"skipped {line}" for line in skipped), f"resumed from {path}"]:
            logger.info(line)
    return state
