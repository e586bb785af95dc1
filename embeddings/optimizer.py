"""Optimizers of the tables: fused into the backward pass, so no gradient of a table is ever stored."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from fbgemm_gpu.split_table_batched_embeddings_ops_training import WeightDecayMode
from torch import nn
from torch.distributed.optim import _apply_optimizer_in_backward as apply_optimizer_in_backward
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.optim import LAMB, SGD, Adagrad, Adam, PartialRowWiseAdam, RowWiseAdagrad

TABLE_OPTIMIZERS: dict[str, type[torch.optim.Optimizer]] = {
    "sgd": SGD,
    "adagrad": Adagrad,
    "rowwise_adagrad": RowWiseAdagrad,
    "adam": Adam,
    "partial_rowwise_adam": PartialRowWiseAdam,
    "lamb": LAMB,
}
ON_EVERY_DEVICE = ("sgd", "adagrad", "rowwise_adagrad")
WITH_MOMENTS = ("adam", "partial_rowwise_adam", "lamb")
WITH_WEIGHT_DECAY = ("rowwise_adagrad", *WITH_MOMENTS)  # on CUDA; the other kernels have none


@dataclass(frozen=True)
class TableOptimizer:
    """The update rule of tables.

    Attributes:
        name: Key of `TABLE_OPTIMIZERS`.
        learning_rate: Step size, before any schedule.
        weight_decay: Decoupled weight decay of the rows that a step touches; CUDA only.
        betas: Decay of Adam's first and second moment; for `WITH_MOMENTS` only.
    """

    name: str
    learning_rate: float
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)

    def check(self, device: str) -> None:
        """Refuses what a device's kernels lack, or ignore without a word.

        Args:
            device: "cpu" or "cuda".

        Raises:
            ValueError: With what the device offers.
        """
        if device == "cpu" and self.name not in ON_EVERY_DEVICE:
            raise ValueError(
                f"tables.optimizer: {self.name} runs on CUDA only and this is a CPU run; choose "
                f"{', '.join(ON_EVERY_DEVICE[:-1])} or {ON_EVERY_DEVICE[-1]}"
            )
        if self.betas != TableOptimizer.betas and self.name not in WITH_MOMENTS:
            raise ValueError(
                f"tables.betas: {self.name} has no such moments and would ignore them; remove the field "
                f"or choose {', '.join(WITH_MOMENTS[:-1])} or {WITH_MOMENTS[-1]}"
            )
        if self.weight_decay and device == "cpu":
            raise ValueError(
                f"tables.weight_decay: {self.weight_decay:g} would be ignored, the tables' kernels on a "
                "CPU have none; set it to 0 (train.weight_decay, of dense parameters, works everywhere)"
            )
        if self.weight_decay and self.name not in WITH_WEIGHT_DECAY:
            raise ValueError(
                f"tables.weight_decay: {self.weight_decay:g} would be ignored by {self.name}; set it to 0 "
                f"or choose {', '.join(WITH_WEIGHT_DECAY[:-1])} or {WITH_WEIGHT_DECAY[-1]}"
            )

    @property
    def replicable(self) -> bool:
        """Whether `ReplicatedOptimizer` has this rule for data-parallel tables.

        The others would move rows that a batch does not touch once gradients are dense.
        """
        return self.name in ON_EVERY_DEVICE and not self.weight_decay

    def kernel_options(self) -> dict[str, Any]:
        """Options by the names that the kernels know; a fresh dict, because callees change it."""
        options: dict[str, Any] = {"lr": self.learning_rate}
        if self.name in WITH_MOMENTS:  # `betas` would not be understood
            options |= {"beta1": self.betas[0], "beta2": self.betas[1]}
        if self.weight_decay:
            options["weight_decay"] = self.weight_decay
            if self.name == "rowwise_adagrad":  # without a mode it decays nothing
                options["weight_decay_mode"] = WeightDecayMode.DECOUPLE
        return options


def fuse_optimizer(parameters: Iterable[nn.Parameter], optimizer: TableOptimizer) -> None:
    """Marks table parameters for an optimizer that runs inside their backward kernel.

    Call before sharding, and `TableOptimizer.check` before that.

    Args:
        parameters: Parameters of unsharded collections.
        optimizer: The update rule.
    """
    apply_optimizer_in_backward(
        TABLE_OPTIMIZERS[optimizer.name],
        [weight for weight in parameters if weight.is_floating_point()],  # a table of ids is none
        optimizer.kernel_options(),
    )


def set_table_learning_rate(model: DistributedModelParallel, learning_rate: float) -> None:
    """Hands a step size to every fused optimizer of a sharded model; the next backward uses it."""
    for group in model.fused_optimizer.param_groups:
        group["lr"] = learning_rate
    model.fused_optimizer.step()  # updates nothing: the kernels read their step size here


def update_count(model: DistributedModelParallel) -> int:
    """Updates that this rank's tables have counted: Adam's bias correction depends on it."""
    return max((int(kernel.iter) for kernel in _kernels(model.fused_optimizer)), default=0)


def set_update_count(model: DistributedModelParallel, count: int) -> None:
    """Restores what `update_count` gave; it stands in no state dict."""
    for kernel in _kernels(model.fused_optimizer):
        kernel.iter.fill_(count)
        kernel.iter_cpu.fill_(count)


def _kernels(optimizer: Any) -> Iterator[Any]:
    """The kernels under a tree of combined optimizers."""
    for _, part in getattr(optimizer, "_optims", []):
        yield from _kernels(part)
    kernel = getattr(optimizer, "_emb_module", None)
    if hasattr(kernel, "iter_cpu"):
        yield kernel
