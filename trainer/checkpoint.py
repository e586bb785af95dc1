"""Checkpoints: torch.distributed.checkpoint, whole or not there at all.

A checkpoint is a directory `step-000120` that appears by rename. It holds the trainable state (tables,
their optimizer state, dense parameters, Adam's moments) and `state.json` (position of the loop,
fingerprints of the knowledge stores). Frozen vectors are not in it: their store has them.
"""

import dataclasses
import json
import shutil
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.optim import Optimizer
from torchrec.distributed.model_parallel import DistributedModelParallel

from llm_knowledge.errors import InputError

FROZEN_PREFIX = "knowledge."


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
            state |= {f"table_optimizer.{name}.{key}": value for key, value in values.items()}
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
        dcp.save(_state(model, optimizer), checkpoint_id=partial)
    if is_main:
        (partial / "state.json").write_text(json.dumps(dataclasses.asdict(state), indent=1))
        shutil.rmtree(target, ignore_errors=True)
        partial.rename(target)
        for other in checkpoints(folder):
            if other.name not in (target.name, f"step-{state.best_step:08d}"):
                shutil.rmtree(other)
    dist.barrier()
    return target


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
    """Restores model and optimizers in place.

    Raises:
        InputError: If the checkpoint was trained with other knowledge stores.
    """
    state = read_state(checkpoint)
    if state.fingerprints != fingerprints:
        raise InputError(
            f"{checkpoint}: trained with knowledge {state.fingerprints or 'none'}, the configuration names "
            f"{fingerprints or 'none'}; point knowledge.* at the stores it was trained with, or start anew"
        )
    live = _state(model, optimizer)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.load(live, checkpoint_id=checkpoint)
    return state
