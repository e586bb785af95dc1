"""How tables are spread over ranks: planner, sharders, DistributedModelParallel, the printed plan."""

import logging
import warnings
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn
from torchrec.distributed.embedding import EmbeddingCollectionSharder
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.planner import EmbeddingShardingPlanner, ParameterConstraints, Topology
from torchrec.distributed.planner.storage_reservations import FixedPercentageStorageReservation
from torchrec.distributed.types import ModuleSharder, ShardingPlan, ShardingType

for _noisy in ("torchrec", "torch.fx._symbolic_trace"):
    logging.getLogger(_noisy).setLevel(logging.ERROR)
warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed|torchrec")


class PooledSharder(EmbeddingBagCollectionSharder):
    """The stock sharder with the row-wise kinds that it leaves out on CPU, where they work as well."""

    def sharding_types(self, compute_device_type: str) -> list[str]:
        """Returns every sharding type that both devices run."""
        row_wise = [ShardingType.ROW_WISE, ShardingType.TABLE_ROW_WISE, ShardingType.GRID_SHARD]
        stock = super().sharding_types(compute_device_type)
        return sorted({*stock, *(kind.value for kind in row_wise)})


@dataclass(frozen=True)
class TablePlan:
    """Where one table lies: sharding type, compute kernel and bytes of weights per rank."""

    table: str
    sharding: str
    kernel: str
    rows: int
    dim: int
    bytes_per_rank: list[int]


def sharders() -> list[ModuleSharder[nn.Module]]:
    """Returns the sharders of this project, one per collection kind."""
    return [PooledSharder(), EmbeddingCollectionSharder()]  # type: ignore[list-item]


def plan_sharding(
    model: nn.Module, table_names: list[str], batch_size: int, device: torch.device
) -> ShardingPlan:
    """Plans row-wise sharding of every table, the same on every rank.

    Args:
        model: Holds the collections, on the meta device.
        table_names: Every table that must be placed.
        batch_size: Samples per rank and step; the planner's own default (512) is never used.
        device: Where this rank computes.

    Raises:
        RuntimeError: If the plan leaves out a table.
    """
    world = dist.get_world_size()
    topology = Topology(world_size=world, compute_device=device.type, local_world_size=world)
    constraint = ParameterConstraints(
        sharding_types=[ShardingType.ROW_WISE.value], compute_kernels=["fused"]
    )
    planner = EmbeddingShardingPlanner(
        topology=topology,
        batch_size=batch_size,
        constraints={name: constraint for name in table_names},
        storage_reservation=FixedPercentageStorageReservation(0.1),
    )
    plan = planner.collective_plan(model, sharders(), dist.group.WORLD)
    placed = [name for module in plan.plan.values() for name in module]  # type: ignore[attr-defined]
    if sorted(placed) != sorted(table_names):
        raise RuntimeError(
            f"the planner placed tables {sorted(placed)}, expected {sorted(table_names)}"
        )
    return plan


def shard(model: nn.Module, plan: ShardingPlan, device: torch.device) -> DistributedModelParallel:
    """Wraps a model: tables are sharded by the plan, everything else is data-parallel.

    Sharded tables are initialised afresh: load weights after this call, not before.
    """
    return DistributedModelParallel(model, device=device, plan=plan, sharders=sharders())


def describe_plan(plan: ShardingPlan, world_size: int) -> list[TablePlan]:
    """Lists where every table lies."""
    tables = []
    for module in plan.plan.values():
        for name, parameter in module.items():  # type: ignore[attr-defined]
            bytes_per_rank = [0] * world_size
            rows = dim = 0
            for piece in parameter.sharding_spec.shards:
                (row, column), (count, width) = piece.shard_offsets, piece.shard_sizes
                rows, dim = max(rows, row + count), max(dim, column + width)
                bytes_per_rank[piece.placement.rank()] += count * width * 4
            tables.append(
                TablePlan(
                    name,
                    parameter.sharding_type,
                    parameter.compute_kernel,
                    rows,
                    dim,
                    bytes_per_rank,
                )
            )
    return tables


def format_plan(tables: list[TablePlan]) -> str:
    """Renders the plan as a text table."""
    lines = [f"{'table':<18}{'sharding':<12}{'kernel':<8}{'rows':>12}{'dim':>6}  MiB per rank"]
    for table in tables:
        sizes = " ".join(f"{size / 2**20:.2f}" for size in table.bytes_per_rank)
        lines.append(
            f"{table.table:<18}{table.sharding:<12}{table.kernel:<8}{table.rows:>12,}{table.dim:>6}  {sizes}"
        )
    return "\n".join(lines)
