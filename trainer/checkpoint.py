"""Checkpoints: torch.distributed.checkpoint, whole or not there at all.

A checkpoint is a directory `step-000120` that appears by rename. It holds the trainable state (tables,
their optimizer state, dense parameters, Adam's moments) and `state.json` (position of the loop,
fingerprints of the knowledge stores). Frozen vectors are not in it: their store has them.
"""

import dataclasses
import errno
import json
import shutil
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import CheckpointException, FileSystemReader
from torch.optim import Optimizer
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.types import ShardedTensor

from llm_knowledge.errors import InputError

FROZEN_PREFIX = "knowledge."
ACCUMULATOR_PREFIX = "table_optimizer."


@dataclass
class LoopState:
    """Where the loop stands; everything else is derived from the configuration."""

    step: int = 0
    best_auc: float | None = None
    best_step: int = 0
    evaluations_without_gain: int = 0
    finished: bool = False
    fingerprints: dict[str, str] = field(default_factory=dict)


def _state(model: DistributedModelParallel, optimizer: Optimizer) -> dict[str, Any]:
    """Flat name to tensor; the tensors alias the live ones, so loading into them is enough.

    Flat, because a nested dict fails on ranks that own no part of a table.
    """
    state = {
        f"model.{name}": value
        for name, value in model.state_dict().items()
        if not name.startswith(FROZEN_PREFIX)
    }
    for name, values in model.fused_optimizer.state_dict()["state"].items():
        if not name.startswith(FROZEN_PREFIX):
            state |= {f"{ACCUMULATOR_PREFIX}{name}.{key}": value for key, value in values.items()}
    names = {id(parameter): name for name, parameter in model.module.dense.named_parameters()}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            moments = optimizer.state[parameter]
            if (
                not moments
            ):  # Adam makes its state at the first step; a fresh process has none to fill
                moments["step"] = torch.zeros(())
                moments["exp_avg"] = torch.zeros_like(parameter)
                moments["exp_avg_sq"] = torch.zeros_like(parameter)
            for key, value in moments.items():
                state[f"dense_optimizer.{names[id(parameter)]}.{key}"] = value
    return state


def save_checkpoint(
    folder: Path,
    model: DistributedModelParallel,
    optimizer: Optimizer,
    state: LoopState,
    is_main: bool,
) -> Path:
    """Writes `folder/step-N` on all ranks together; removes all others but the best."""
    target = folder / f"step-{state.step:08d}"
    partial = folder / f"{target.name}.partial"
    if is_main:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    dist.barrier()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            dcp.save(_state(model, optimizer), checkpoint_id=partial)
        except (CheckpointException, OSError) as error:  # the former on every rank, with all causes
            raise _explain_failure(folder, error) from error
    if is_main:
        (partial / "state.json").write_text(json.dumps(dataclasses.asdict(state), indent=1))
        shutil.rmtree(target, ignore_errors=True)
        partial.rename(target)
        for other in checkpoints(folder):
            if other.name not in (target.name, f"step-{state.best_step:08d}"):
                shutil.rmtree(other)
    dist.barrier()
    return target


def _explain_failure(folder: Path, error: BaseException) -> BaseException:
    causes = [error]
    if isinstance(error, CheckpointException):
        causes = [cause for cause, _ in error.failures.values()]
    full = [c for c in causes if isinstance(c, OSError) and c.errno in (errno.ENOSPC, errno.EDQUOT)]
    # Writers wrap what the file system said; its words survive in theirs.
    if not full and not any("No space left" in str(cause) for cause in causes):
        return error
    return InputError(
        f"{folder}: no space left for a checkpoint; the ones before it are whole: free some space and "
        "run again with --resume",
        shared=True,
    )


def checkpoints(folder: Path) -> list[Path]:
    """Lists complete checkpoints, oldest first; partial ones are not there."""
    return sorted(
        path for path in folder.glob("step-*") if (path / "state.json").exists() and not path.suffix
    )


def read_state(checkpoint: Path) -> LoopState:
    """Reads the loop's position from a checkpoint."""
    return LoopState(**json.loads((checkpoint / "state.json").read_text()))


def load_checkpoint(
    checkpoint: Path,
    model: DistributedModelParallel,
    optimizer: Optimizer,
    fingerprints: dict[str, str],
) -> LoopState:
    """Restores model and optimizers in place, whatever ranks and shardings they were saved from.

    Raises:
        InputError: If the checkpoint is damaged, of another model, or of other knowledge stores.
    """
    state = read_state(checkpoint)
    if state.fingerprints != fingerprints:
        raise InputError(
            f"{checkpoint}: trained with knowledge {state.fingerprints or 'none'}, the configuration names "
            f"{fingerprints or 'none'}; point knowledge.* at the stores it was trained with, or start anew"
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # every look at a sharded tensor warns of its successor
        live = _state(model, optimizer)
        saved = _saved_sizes(checkpoint)
        if missing := sorted(live.keys() - saved.keys()):
            raise InputError(
                f"{checkpoint}: holds nothing for {missing[0]} and {len(missing) - 1} more; it belongs to "
                "another model"
            )
        same, accumulators = {}, {}
        for name, value in live.items():
            if saved[name] == value.size():
                same[name] = value
            elif name.startswith(ACCUMULATOR_PREFIX) and len(saved[name]) == value.dim() == 1:
                accumulators[name] = value
            else:
                raise InputError(
                    f"{checkpoint}: {name} is {tuple(saved[name])}, the model needs {tuple(value.size())}"
                )
        whole = {name: torch.empty(saved[name]) for name in accumulators}
        dcp.load(same, checkpoint_id=checkpoint)
        if whole:
            # Not collective: a rank that owns no part of these tables has nothing to read.
            dcp.load(whole, checkpoint_id=checkpoint, no_dist=True)
        for name, value in accumulators.items():
            table = name.removeprefix(ACCUMULATOR_PREFIX).rsplit(".", 2)[0]
            _spread_accumulators(whole[name], value, rows=live[f"model.{table}"].size()[0])
    return state


def _saved_sizes(checkpoint: Path) -> dict[str, torch.Size]:
    """Name to size of everything in a checkpoint.

    Raises:
        InputError: If its metadata is missing or damaged.
    """
    try:
        entries = FileSystemReader(checkpoint).read_metadata().state_dict_metadata
    except Exception as error:  # whatever unpickling a damaged file raises
        raise InputError(
            f"{checkpoint}: the checkpoint is damaged ({error}); remove it to go on from an older one"
        ) from error
    return {name: entry.size for name, entry in entries.items() if hasattr(entry, "size")}


def _spread_accumulators(saved: Tensor, live: ShardedTensor | Tensor, rows: int) -> None:
    """Moves RowWiseAdagrad's accumulators between tables cut into different numbers of columns.

    A table cut into n columns keeps n accumulators per row, the k-th for the mean square of the
    gradient's k-th part, laid out [n, rows]. Parts being of equal width, fewer columns get the means of
    theirs exactly; more columns each get the one that covered them, which is the best guess.
    """
    before, after = saved.numel() // rows, live.size()[0] // rows
    parts = saved.view(before, rows)
    if before % after == 0:
        parts = parts.view(after, before // after, rows).mean(1)
    elif after % before == 0:
        parts = parts.repeat_interleave(after // before, dim=0)
    else:
        parts = parts.mean(0, keepdim=True).expand(after, rows)
    flat = parts.reshape(-1)
    if not isinstance(live, ShardedTensor):  # data-parallel: every rank has all of it
        live.copy_(flat)
        return
    for shard in live.local_shards():
        (start,), (count,) = shard.metadata.shard_offsets, shard.metadata.shard_sizes
        shard.tensor.copy_(flat[start : start + count].view(shard.tensor.shape))
