"""Guard rails: losses and gradients that are not finite, spikes, damaged tables, ranks that drift apart.

Every step adds its numbers on the device; they are looked at when the log is flushed, every
`train.log_every` steps and always before a checkpoint, so that no damage is ever saved.
"""

import json
import logging
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torchrec.distributed.types import ShardedTensor

from embeddings.tables import local_pieces
from llm_knowledge.errors import InputError
from trainer.checkpoint.state import live_state
from trainer.observe.metrics_log import Window
from trainer.run.session import Run

logger = logging.getLogger(__name__)

SETTLING_STEPS = 20  # before losses are compared with their mean
MEMORY = 0.95  # of the running mean, per step


@dataclass(frozen=True)
class Fault:
    """What was found.

    Attributes:
        text: What, in which step, on which rank.
        policy: What to do: stop, skip, rollback or report.
        steps: Steps that it belongs to, from 0; a rollback leaves them out.
        advice: What may help if training is stopped.
    """

    text: str
    policy: str
    steps: tuple[int, ...] = ()
    advice: str = (
        "lower train.learning_rate, train.meta_learning_rate or tables.learning_rate, or look at the "
        "batch; train.guard can skip it"
    )


@dataclass
class Guard:
    """Looks at every window of steps. All ranks see the same, so all decide the same."""

    run: Run
    norm: Tensor | None = None
    rollbacks: int = 0
    _mean: float = 0.0
    _seen: int = 0

    @property
    def may_roll_back(self) -> bool:
        """Whether a checkpoint is needed from the first step on."""
        options = self.run.config.train.guard
        return "rollback" in (options.non_finite, options.on_spike, options.damage)

    @property
    def skips(self) -> bool:
        """Whether updates by gradients that are not finite are left out."""
        return self.run.config.train.guard.non_finite == "skip"

    def before_update(self, optimizer: torch.optim.Optimizer, *_: object) -> None:
        """Notes the norm of the dense gradient; where it is not finite, and is to be skipped, zeros it."""
        groups = optimizer.param_groups
        gradients = [p.grad for group in groups for p in group["params"] if p.grad is not None]
        self.norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))
        if self.skips:
            fine = torch.isfinite(self.norm)
            for gradient in gradients:
                gradient.nan_to_num_(0.0, 0.0, 0.0).mul_(fine)

    def checksum(self) -> Tensor:
        """An exact sum over the bits of the dense parameters, which every rank has; below 2^52."""
        total = torch.zeros((), dtype=torch.int64, device=self.run.runtime.device)
        for parameter in self.run.model.module.dense.parameters():
            total += parameter.detach().float().view(torch.int32).sum(dtype=torch.int64)
        return total % 2**52

    def check(self, window: Window) -> Fault | None:
        """Finds the worst of a window; reports it, and what may go on goes on.

        Returns:
            A fault whose policy is rollback, or None.

        Raises:
            InputError: On all ranks, if the policy is to stop.
        """
        for fault in (self._not_finite(window), self._ranks_diverged(window), self._spike(window)):
            if fault is not None and self.handle(fault, window.last):
                return fault
        return None

    def handle(self, fault: Fault, step: int) -> bool:
        """Reports a fault, in `incidents.jsonl` too; returns whether to roll back.

        Raises:
            InputError: If the policy is to stop, or has been to roll back too often.
        """
        options, policy = self.run.config.train.guard, fault.policy
        if policy == "rollback" and self.rollbacks >= options.rollbacks:
            policy = "stop"
        self.rollbacks += policy == "rollback"
        if self.run.runtime.is_main:
            line = {"time": time.time(), "step": step, "found": fault.text, "policy": policy}
            with (self.run.folder / "incidents.jsonl").open("a") as file:
                file.write(json.dumps(line | {"steps": fault.steps}) + "\n")
            if policy != "stop":
                logger.warning("%s: %s", fault.text, policy)
        if policy == "stop":
            raise InputError(
                f"{self.run.folder}: {fault.text}; no checkpoint holds it: {fault.advice}",
                shared=True,
            )
        return policy == "rollback"

    def check_state(self, step: int) -> Fault | None:
        """Looks for values that are not finite in tables and optimizer state, before they are saved.

        Returns:
            A fault whose policy is rollback, or None.

        Raises:
            InputError: On all ranks, if the policy is to stop.
        """
        mine = []
        for name, value in live_state(self.run).items():
            if not isinstance(value, Tensor | ShardedTensor):
                continue
            for piece, _ in local_pieces(value):
                if not piece.is_floating_point():
                    continue
                if not torch.isfinite(piece.sum()):  # one pass, without a mask
                    rows = (~torch.isfinite(piece)).reshape(len(piece) if piece.dim() else 1, -1)
                    mine.append(f"{name} ({int(rows.any(1).sum())} rows)")
        everywhere: list[list[str]] = [[]] * self.run.runtime.world_size
        dist.all_gather_object(everywhere, mine)
        damaged = [
            f"rank {rank}: {', '.join(names)}" for rank, names in enumerate(everywhere) if names
        ]
        if not damaged:
            return None
        text = f"step {step}: not finite: {'; '.join(damaged)}"
        fault = Fault(text, self.run.config.train.guard.damage)
        return fault if self.handle(fault, step) else None

    # ------------------------------------------------------------ what may be wrong

    def _not_finite(self, window: Window) -> Fault | None:
        loss, gradient = window.steps["loss"], window.steps["gradient"]
        bad = ~np.isfinite(loss) | ~np.isfinite(gradient)
        if not bad.any():
            return None
        first = int(bad.any(0).argmax())
        ranks = np.flatnonzero(~np.isfinite(loss[:, first])).tolist()
        what = (
            f"loss is not finite in the batch of rank {', '.join(map(str, ranks))}"
            if ranks
            else "loss is finite on every rank, the gradient of the dense parameters is not"
        )
        policy = self.run.config.train.guard.non_finite
        # After the first one the others follow from it, unless its update was left out.
        hits = np.flatnonzero(bad.any(0)) if policy == "skip" else [first]
        steps = tuple(int(window.steps["number"][0, index]) for index in hits)
        return Fault(f"step {steps[0] + 1}: {what}", policy, steps)

    def _ranks_diverged(self, window: Window) -> Fault | None:
        sums = window.ranks["checksum"]
        values, counts = np.unique(sums, return_counts=True)
        if len(values) == 1:
            return None
        ranks = np.flatnonzero(sums != values[counts.argmax()]).tolist()
        return Fault(
            f"step {window.last}: dense parameters of rank {', '.join(map(str, ranks))} differ from those "
            "of the others",
            self.run.config.train.guard.damage,
            advice="go on with --resume; if it comes back, suspect that rank's machine",
        )

    def _spike(self, window: Window) -> Fault | None:
        options = self.run.config.train.guard
        losses = window.steps["loss"].sum(0) / np.maximum(window.steps["samples"].sum(0), 1)
        losses = np.abs(losses)  # labels outside of 0..1 send it far below zero
        spike = None
        for index, loss in enumerate(losses):
            if not np.isfinite(loss):
                continue
            high = options.spike_factor is not None and loss > options.spike_factor * self._mean
            if high and self._seen >= SETTLING_STEPS:
                of_ranks = window.steps["loss"][:, index] / np.maximum(
                    window.steps["samples"][:, index], 1
                )
                of_ranks = np.abs(of_ranks)
                step = int(window.steps["number"][0, index])
                text = (
                    f"step {step + 1}: loss {loss:.4g} is {loss / self._mean:.1f} times its "
                    f"running mean, most on rank {int(of_ranks.argmax())} ({of_ranks.max():.4g})"
                )
                spike = spike or Fault(text, options.on_spike, (step,))
                continue
            self._seen += 1
            share = max(1 - MEMORY, 1 / self._seen)
            self._mean += share * (float(loss) - self._mean)
        return spike


def keep_from_tables(module: torch.nn.Module, inputs: tuple[Any, ...]) -> None:
    """Zeros what this rank's batch sends back to the tables, if any of it is not finite.

    Tables are updated within the backward pass: afterwards there is nothing left to skip.
    """
    if not torch.is_grad_enabled():
        return
    pooled, sequences, _, _, weighted, further = inputs  # of DenseModel.forward
    looked_up = [pooled, *([] if weighted is None else [weighted])]
    looked_up += [steps for part in (sequences, *further) for steps in part.values()]
    for values in (vectors.values() for vectors in looked_up):
        if values.requires_grad:
            values.register_hook(
                lambda gradient: gradient.nan_to_num(0.0, 0.0, 0.0) * torch.isfinite(gradient).all()
            )


def incidents(run: Path) -> list[dict[str, Any]]:
    """Everything that was found in a run, oldest first."""
    file = run / "incidents.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
