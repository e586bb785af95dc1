"""2-D parallelism: tables are sharded over a group of ranks, and every group holds a copy.

Lookups then exchange within a group, which may be a host; after every step the copies are averaged over
the groups. CUDA only (torchrec's `DMPCollection` refuses anything else). Not measured, not run: written
from torchrec's source.
"""

from typing import Any

import torch
import torch.distributed as dist
from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
    SplitTableBatchedEmbeddingBagsCodegen,
)
from torch import nn
from torch.optim import Optimizer
from torchrec.distributed.model_parallel import DMPCollection
from torchrec.distributed.types import ModuleSharder, ShardingPlan


class ReplicaGroups(DMPCollection):
    """Groups of neighbouring ranks, each with a copy of the tables; frozen tables are never averaged."""

    def __init__(
        self,
        model: nn.Module,
        plan: ShardingPlan,
        device: torch.device,
        size: int,
        ranks_per_host: int,
        frozen: str,
        sharders: list[ModuleSharder[nn.Module]],
    ) -> None:
        """Wraps a model.

        Args:
            model: The model.
            plan: For one group; it is renumbered for the group of this rank.
            device: Of this rank.
            size: Ranks of a group.
            ranks_per_host: Of a host.
            frozen: Collections whose path begins so are equal in all groups and stay so. An average of
                equal float16 values is not always that value.
            sharders: One per kind of collection, `embeddings.sharding.sharders()`.
        """
        self._frozen = frozen
        super().__init__(
            module=model,
            device=device,
            plan=plan,
            world_size=dist.get_world_size(),
            sharding_group_size=size,
            global_pg=dist.group.WORLD,
            node_group_size=min(size, ranks_per_host),
            sharders=sharders,
            # Neighbours share a group, so that ids and vectors stay on a host where a group fits on it.
            use_inter_host_allreduce=True,
        )
        self.sync()  # every rank has drawn its own rows: now copies are equal

    def _group_sharded_modules(self, contexts: list[Any]) -> None:
        super()._group_sharded_modules(contexts)
        still = {
            id(kernel)
            for path, module in self.module.named_modules()
            if path.startswith(self._frozen)
            for lookup in getattr(module, "_lookups", [])
            for kernel in lookup.modules()
            if isinstance(kernel, SplitTableBatchedEmbeddingBagsCodegen)
        }
        for context in contexts:
            context.modules_to_sync = [
                pair for pair in context.modules_to_sync if id(pair[0]) not in still
            ]

    def average_after(self, dense: Optimizer) -> None:
        """Averages the copies, optimizer state included, whenever `dense` has stepped."""
        dense.register_step_post_hook(lambda *_: self.sync())
