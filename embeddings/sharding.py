"""How tables are spread over ranks: planner, sharders, DistributedModelParallel, the printed plan."""

import logging
import warnings
from collections.abc import Iterable
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

from embeddings.tables import Table

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


MINIMUM_COLUMNS = 4  # the kernels' vector width: a column shard is a multiple of it


@dataclass(frozen=True)
class Hardware:
    """What the planner believes of a cluster.

    Attributes:
        hosts: Number of hosts.
        ranks_per_host: Processes (devices) on each.
        device: "cuda" or "cpu".
        device_memory: Bytes of a GPU's memory; 0 on a CPU.
        host_memory: Bytes of a host's memory.
        device_bandwidth: Bytes per second of a GPU's memory.
        host_bandwidth: Bytes per second of a host's memory.
        intra_host: Bytes per second between ranks of a host, one direction, per rank.
        inter_host: Bytes per second between hosts, one direction, per rank.
        reserved: Share of the memory that tables must leave free.
    """

    hosts: int
    ranks_per_host: int
    device: str
    device_memory: int
    host_memory: int
    device_bandwidth: float
    host_bandwidth: float
    intra_host: float
    inter_host: float
    reserved: float

    @property
    def ranks(self) -> int:
        """Number of ranks of the job."""
        return self.hosts * self.ranks_per_host

    def topology(self) -> Topology:
        """The same for torchrec's planner, whose bandwidths are bytes per millisecond."""
        return Topology(
            world_size=self.ranks,
            local_world_size=self.ranks_per_host,
            compute_device=self.device,
            hbm_cap=self.device_memory,
            ddr_cap=self.host_memory // self.ranks_per_host,
            hbm_mem_bw=self.device_bandwidth / 1e3,
            ddr_mem_bw=self.host_bandwidth / 1e3,
            intra_host_bw=self.intra_host / 1e3,
            inter_host_bw=self.inter_host / 1e3,
        )


@dataclass(frozen=True)
class TablePlan:
    """Where one table lies: sharding, compute kernel, and bytes of weights per rank."""

    table: str
    sharding: str
    kernel: str
    rows: int
    dim: int
    bytes_per_rank: list[int]


def sharders() -> list[ModuleSharder[nn.Module]]:
    """Returns the sharders of this project, one per collection kind."""
    return [PooledSharder(), EmbeddingCollectionSharder()]  # type: ignore[list-item]


def make_planner(
    tables: list[Table], choices: dict[str, str], batch_size: int, hardware: Hardware
) -> EmbeddingShardingPlanner:
    """Makes a planner with a constraint per table and the true hardware.

    Args:
        tables: All tables of the model.
        choices: Table name to torchrec's name of a sharding type, or "planner" to let the planner
            choose; tables that are not named are row-wise.
        batch_size: Samples per rank and step; the planner's own default (512) is never used.
        hardware: Of the cluster.
    """
    constraints = {}
    for table in tables:
        kind = choices.get(table.name, "row_wise")
        columns = max(table.dim // hardware.ranks // MINIMUM_COLUMNS, 1) * MINIMUM_COLUMNS
        constraints[table.name] = ParameterConstraints(
            sharding_types=None if kind == "planner" else [kind],
            compute_kernels=["fused"],
            min_partition=columns if kind in ("column_wise", "grid_shard") else None,
        )
    return EmbeddingShardingPlanner(
        topology=hardware.topology(),
        batch_size=batch_size,
        constraints=constraints,
        storage_reservation=FixedPercentageStorageReservation(hardware.reserved),
    )


def plan_sharding(
    model: nn.Module,
    tables: list[Table],
    choices: dict[str, str],
    batch_size: int,
    hardware: Hardware,
) -> ShardingPlan:
    """Plans all tables, the same on every rank; see `make_planner` for the arguments.

    Raises:
        PlannerError: If the tables do not fit, with what is short.
        RuntimeError: If the plan leaves out a table.
    """
    planner = make_planner(tables, choices, batch_size, hardware)
    plan = planner.collective_plan(model, sharders(), dist.group.WORLD)
    check_plan(plan, [table.name for table in tables])
    return plan


def check_plan(plan: ShardingPlan, tables: Iterable[str]) -> None:
    """Checks that every table is placed exactly once: planners have dropped tables silently.

    Raises:
        RuntimeError: If not.
    """
    placed = [name for module in plan.plan.values() for name in module]  # type: ignore[attr-defined]
    if sorted(placed) != sorted(tables):
        raise RuntimeError(f"the planner placed tables {sorted(placed)}, expected {sorted(tables)}")


def shard(model: nn.Module, plan: ShardingPlan, device: torch.device) -> DistributedModelParallel:
    """Wraps a model: tables are sharded by the plan, everything else is data-parallel.

    Sharded tables are initialised afresh: load weights after this call, not before.
    """
    return DistributedModelParallel(model, device=device, plan=plan, sharders=sharders())


def describe_plan(plan: ShardingPlan, tables: Iterable[Table], ranks: int) -> list[TablePlan]:
    """Lists where every table lies."""
    sizes = {table.name: table.bytes_per_value for table in tables}
    found = []
    for module in plan.plan.values():
        for name, parameter in module.items():  # type: ignore[attr-defined]
            bytes_per_rank = [0] * ranks
            rows = dim = 0
            for piece in parameter.sharding_spec.shards:
                (row, column), (count, width) = piece.shard_offsets, piece.shard_sizes
                rows, dim = max(rows, row + count), max(dim, column + width)
                bytes_per_rank[piece.placement.rank()] += count * width * sizes[name]
            kind, kernel = parameter.sharding_type, parameter.compute_kernel
            found.append(TablePlan(name, kind, kernel, rows, dim, bytes_per_rank))
    return found


def format_plan(tables: list[TablePlan]) -> str:
    """Renders the plan as a text table."""
    lines = [f"{'table':<18}{'sharding':<16}{'kernel':<8}{'rows':>12}{'dim':>6}  MiB per rank"]
    for table in tables:
        sizes = " ".join(f"{size / 2**20:.2f}" for size in table.bytes_per_rank)
        lines.append(
            f"{table.table:<18}{table.sharding:<16}{table.kernel:<8}{table.rows:>12,}{table.dim:>6}  {sizes}"
        )
    return "\n".join(lines)
