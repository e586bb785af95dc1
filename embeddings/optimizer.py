"""Optimizers of the tables: fused into the backward pass, so no gradient of a table is ever stored."""

from collections.abc import Iterable

import torch
from torch import nn
from torch.distributed.optim import _apply_optimizer_in_backward as apply_optimizer_in_backward
from torchrec.optim import RowWiseAdagrad

TABLE_OPTIMIZERS: dict[str, type[torch.optim.Optimizer]] = {
    "sgd": torch.optim.SGD,
    "adagrad": torch.optim.Adagrad,
    "rowwise_adagrad": RowWiseAdagrad,
}


def fuse_optimizer(parameters: Iterable[nn.Parameter], name: str, learning_rate: float) -> None:
    """Marks table parameters for an optimizer that runs inside their backward kernel.

    Call before sharding. Only optimizers that every device runs are offered; weight decay is not,
    because the CPU kernels ignore it without a word.

    Args:
        parameters: Parameters of unsharded collections.
        name: Key of `TABLE_OPTIMIZERS`.
        learning_rate: Step size.
    """
    # The options are mutated by the callee, hence a fresh dict here.
    apply_optimizer_in_backward(TABLE_OPTIMIZERS[name], parameters, {"lr": learning_rate})
