"""Data-parallel tables: every rank keeps all rows, gradients are averaged, a dense optimizer trains them."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.types import ShardingPlan, ShardingType
from torchrec.optim import RowWiseAdagrad
from torchrec.optim.keyed import KeyedOptimizer

from embeddings.optimizer import TableOptimizer

# The fused kernels' own constant, so that a table learns the same wherever it lies.
EPSILON = 1e-8


class ReplicatedOptimizer(KeyedOptimizer):
    """The rule of the fused optimizer for tables whose gradients are dense.

    Its state has the names and shapes of the fused one's (`<table>.momentum1`: [rows, dim] for
    Adagrad, [rows] for RowWiseAdagrad, none for SGD), so that checkpoints move between data-parallel
    and sharded tables.
    """

    def __init__(
        self, weights: dict[str, tuple[str, nn.Parameter]], optimizer: TableOptimizer
    ) -> None:
        """Makes the optimizer and its state.

        Args:
            weights: Name in the model's state to (table, parameter [rows, dim]).
            optimizer: The rule, which must be `replicable`.
        """
        if not optimizer.replicable:
            raise ValueError(f"data-parallel tables cannot be trained with {optimizer}")
        rule, learning_rate = optimizer.name, optimizer.learning_rate
        parameters = [parameter for _, parameter in weights.values()]
        if rule == "sgd":
            self._rule: Optimizer = torch.optim.SGD(parameters, lr=learning_rate)
        elif rule == "adagrad":
            self._rule = torch.optim.Adagrad(parameters, lr=learning_rate, eps=EPSILON)
        else:
            self._rule = RowWiseAdagrad(parameters, lr=learning_rate, eps=EPSILON)
        state: dict[Tensor, dict[str, Tensor]] = {}
        for table, parameter in weights.values():
            sums = self._rule.state[parameter].get("sum")
            if sums is not None:  # a view: what is loaded into it is what the rule goes on with
                shape = (-1,) if rule == "rowwise_adagrad" else sums.shape
                state[parameter] = {f"{table}.momentum1": sums.view(shape)}
        super().__init__(
            {name: parameter for name, (_, parameter) in weights.items()},
            state,
            self._rule.param_groups,
        )

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drops gradients."""
        self._rule.zero_grad(set_to_none)

    def step(self, closure: object = None) -> None:
        """Applies the averaged gradients and drops them: a second call before a backward does nothing."""
        self._rule.step()
        self._rule.zero_grad(set_to_none=True)


def replicated_tables(plan: ShardingPlan) -> Iterator[tuple[str, str]]:
    """Yields (path of the collection, table) of every data-parallel table."""
    for path, module in plan.plan.items():
        for table, parameter in module.items():  # type: ignore[attr-defined]
            if parameter.sharding_type == ShardingType.DATA_PARALLEL.value:
                yield path, table


def train_replicated_tables(
    model: DistributedModelParallel,
    plan: ShardingPlan,
    rule: TableOptimizer,
    dense: Optimizer,
    frozen: str,
) -> None:
    """Trains data-parallel tables together with the dense parameters; does nothing without such tables.

    The optimizer becomes one of `model.fused_optimizer`, so that checkpoints and schedules of the
    tables reach it, and steps whenever `dense` does.

    Args:
        model: The sharded model.
        plan: Its plan.
        rule: Of the tables.
        dense: The optimizer that the loop steps.
        frozen: Collections whose path begins so are not trained.
    """
    weights: dict[str, tuple[str, nn.Parameter]] = {}
    for path, table in replicated_tables(plan):
        if path.startswith(frozen):
            continue
        module = model.module.get_submodule(path)
        inner = "embedding_bags" if hasattr(module, "embedding_bags") else "embeddings"
        weight = getattr(module, inner)[table].weight
        weights[f"{path}.{inner}.{table}.weight"] = (table, weight)
    if not weights:
        return
    optimizer = ReplicatedOptimizer(weights, rule)
    model.fused_optimizer.optimizers.append(("", optimizer))
    dense.register_step_post_hook(lambda *_: optimizer.step())
