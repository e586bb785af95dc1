"""How tables are spread over ranks: planner, sharders, DistributedModelParallel, the printed plan."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from tabulate import tabulate
from torch import nn
from torchrec.distributed.embedding import EmbeddingCollectionSharder
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.planner import EmbeddingShardingPlanner, ParameterConstraints, Topology
from torchrec.distributed.planner.proposers import GreedyProposer, UniformProposer
from torchrec.distributed.planner.storage_reservations import FixedPercentageStorageReservation
from torchrec.distributed.planner.types import PlannerError, Proposer, Stats
from torchrec.distributed.types import (
    CacheParams,
    KeyValueParams,
    ModuleSharder,
    ShardingPlan,
    ShardingType,
)

from embeddings.placement import KERNELS, Placement, PlanError, wanted_placement
from embeddings.tables import SparseFeatures, Table


class PooledSharder(EmbeddingBagCollectionSharder):
    """The stock sharder with the row-wise kinds that it leaves out on CPU, where they work as well."""

    def sharding_types(self, compute_device_type: str) -> list[str]:
        """Returns every sharding type that both devices run."""
        row_wise = [ShardingType.ROW_WISE, ShardingType.TABLE_ROW_WISE, ShardingType.GRID_SHARD]
        stock = super().sharding_types(compute_device_type)
        return sorted({*stock, *(kind.value for kind in row_wise)})


class _NoStats(Stats):
    """Leaves out the library's own report: it is long, and partly about other machines."""

    def log(self, *_: object, **__: object) -> None:
        """Says nothing."""


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
        host_to_device: Bytes per second between a GPU and its host's memory.
        ssd: Bytes of SSD per host for key_value tables.
        ssd_bandwidth: Bytes per second of a host's SSD.
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
    host_to_device: float = 64e9
    ssd: int = 0
    ssd_bandwidth: float = 7e9

    @property
    def ranks(self) -> int:
        """Number of ranks of the job."""
        return self.hosts * self.ranks_per_host

    def group(self, size: int | None) -> "Hardware":
        """The part of the cluster that tables are sharded over: `size` neighbouring ranks, None: all.

        A group within a host has its share of the host's memory.
        """
        if size is None:
            return self
        per_host = min(size, self.ranks_per_host)
        share = per_host / self.ranks_per_host
        return replace(
            self,
            hosts=size // per_host,
            ranks_per_host=per_host,
            host_memory=int(self.host_memory * share),
            ssd=int(self.ssd * share),
        )

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
            hbm_to_ddr_mem_bw=self.host_to_device / 1e3,
            ssd_cap=self.ssd // self.ranks_per_host,
            ssd_mem_bw=self.ssd_bandwidth / self.ranks_per_host / 1e3,
        )


@dataclass(frozen=True)
class Piece:
    """A rectangle of a table on one rank: `rows` x `columns` from (`row`, `column`) on."""

    rank: int
    row: int
    column: int
    rows: int
    columns: int


@dataclass(frozen=True)
class TablePlan:
    """Where one table lies: sharding, compute kernel, pieces, and bytes of weights per rank.

    A data-parallel table has one whole piece per rank.
    """

    table: str
    sharding: str
    kernel: str
    rows: int
    dim: int
    bytes_per_rank: list[int]
    pieces: list[Piece]


def sharders(model: nn.Module) -> list[ModuleSharder[nn.Module]]:
    """Returns the sharders of a model's tables, one per kind of collection."""
    pooled, sequences = PooledSharder(), EmbeddingCollectionSharder()
    kinds: list[ModuleSharder[nn.Module]] = [pooled, sequences]  # type: ignore[list-item]
    if any(isinstance(part, SparseFeatures) and part.hash_zch for part in model.modules()):
        from embeddings.experimental.hash_zch import hash_zch_sharders

        kinds += hash_zch_sharders(pooled, sequences)
    return kinds


def _constraint(table: Table, placement: Placement, hardware: Hardware) -> ParameterConstraints:
    kind, kernel = placement.sharding, KERNELS[placement.kernel]
    columns = max(table.dim // hardware.ranks // MINIMUM_COLUMNS, 1) * MINIMUM_COLUMNS
    dense = placement.replicable and not (table.sequence and hardware.device == "cpu")
    return ParameterConstraints(
        sharding_types=None if kind == "planner" else [kind],
        # Data-parallel tables have a kernel of their own.
        compute_kernels=["dense"]
        if kind == "data_parallel"
        else [kernel, *["dense"] * (dense and kernel == "fused")],
        min_partition=columns if kind in ("column_wise", "grid_shard") else None,
        pooling_factors=list(table.ids_per_sample) or [1.0] * len(table.features),
        # Rows are brought into the cache while the batch before trains (`PrefetchTrainPipelineSparseDist`).
        cache_params=CacheParams(load_factor=placement.cache_load_factor, prefetch_pipeline=True)
        if placement.kernel == "uvm_caching"
        else None,
        key_value_params=KeyValueParams(ssd_storage_directory=placement.directory)
        if placement.kernel == "key_value"
        else None,
    )


def make_planner(
    tables: list[Table],
    placements: Mapping[str, Placement],
    batch_size: int,
    hardware: Hardware,
    search_seconds: int | None = None,
) -> EmbeddingShardingPlanner:
    """Makes a planner with a constraint per table and the true hardware.

    Args:
        tables: All tables of the model.
        placements: Table name to what is wanted of it; tables that are not named are row-wise, or
            table-wise if they have fewer rows than there are ranks.
        batch_size: Samples per rank and step; the planner's own default (512) is never used.
        hardware: Of the cluster.
        search_seconds: Stop the search after so long. What spreads all tables alike is tried first, so
            there is a plan by then if there is one at all.
    """
    quick: list[Proposer] = [UniformProposer(), GreedyProposer()]
    return EmbeddingShardingPlanner(
        proposer=quick if search_seconds else None,
        timeout_seconds=search_seconds,
        stats=_NoStats(),
        topology=hardware.topology(),
        batch_size=batch_size,
        constraints={
            table.name: _constraint(
                table, wanted_placement(table, placements, hardware.ranks), hardware
            )
            for table in tables
        },
        storage_reservation=FixedPercentageStorageReservation(hardware.reserved),
    )


def plan_sharding(
    model: nn.Module,
    tables: list[Table],
    placements: Mapping[str, Placement],
    batch_size: int,
    hardware: Hardware,
) -> ShardingPlan:
    """Plans all tables on rank 0, for every rank; see `make_planner` for the arguments.

    Raises:
        PlanError: On every rank, if a placement names no table, or if the tables do not fit: with what
            is short.
        RuntimeError: If the plan leaves out a table.
    """
    names = [table.name for table in tables]
    if unknown := sorted(set(placements) - set(names)):
        raise PlanError(f"there is no table {unknown[0]}; known: {', '.join(names)}")
    outcome: list[ShardingPlan | str | None] = [None]
    if dist.get_rank() == 0:
        try:
            planner = make_planner(tables, placements, batch_size, hardware)
            outcome[0] = planner.plan(model, sharders(model))
        except (PlannerError, PlanError) as error:
            # Told to all: a rank that raises alone leaves the others waiting.
            outcome[0] = str(error)
    dist.broadcast_object_list(outcome)
    plan = outcome[0]
    if not isinstance(plan, ShardingPlan):
        raise PlanError(f"the tables cannot be placed on {hardware.ranks} ranks: {plan}")
    check_plan(plan, tables)
    return plan


def check_plan(plan: ShardingPlan, tables: Iterable[Table]) -> None:
    """Checks that every value of every table is placed exactly once: planners have dropped tables silently.

    Raises:
        RuntimeError: If not.
    """
    known = {table.name: table for table in tables}
    placed = [name for module in plan.plan.values() for name in module]  # type: ignore[attr-defined]
    if sorted(placed) != sorted(known):
        raise RuntimeError(f"the planner placed tables {sorted(placed)}, expected {sorted(known)}")
    for module in plan.plan.values():
        for name, parameter in module.items():  # type: ignore[attr-defined]
            if parameter.sharding_spec is None:  # data-parallel: whole by definition
                continue
            table, pieces = known[name], parameter.sharding_spec.shards
            values = sum(piece.shard_sizes[0] * piece.shard_sizes[1] for piece in pieces)
            corners = {tuple(piece.shard_offsets) for piece in pieces if piece.shard_sizes[0]}
            whole = len(corners) == sum(piece.shard_sizes[0] > 0 for piece in pieces)
            if values != table.rows * table.dim or not whole:
                raise RuntimeError(
                    f"the planner placed {values} values of table {name}, which has "
                    f"{table.rows} x {table.dim}"
                )


def shard(
    model: nn.Module, plan: ShardingPlan, device: torch.device, shortcuts: bool = True
) -> DistributedModelParallel:
    """Wraps a model: tables are sharded by the plan, everything else is data-parallel.

    Sharded tables are initialised afresh: load weights after this call, not before.

    Args:
        model: The model.
        plan: Where its tables lie.
        device: Of this rank.
        shortcuts: Whether `embeddings.cpu` may patch the library where that makes no difference but time.
    """
    sharded = DistributedModelParallel(model, device=device, plan=plan, sharders=sharders(model))
    if shortcuts:
        from embeddings.cpu import take_shortcuts

        take_shortcuts(sharded, device)
    return sharded


def describe_plan(plan: ShardingPlan, tables: Iterable[Table], ranks: int) -> list[TablePlan]:
    """Lists where every table lies."""
    known = {table.name: table for table in tables}
    plans = []
    for module in plan.plan.values():
        for name, parameter in module.items():  # type: ignore[attr-defined]
            table = known[name]
            if parameter.sharding_spec is None:  # data-parallel
                pieces = [Piece(rank, 0, 0, table.rows, table.dim) for rank in range(ranks)]
            else:
                pieces = [
                    Piece(shard.placement.rank(), *shard.shard_offsets, *shard.shard_sizes)
                    for shard in parameter.sharding_spec.shards
                ]
            sizes = [0] * ranks
            for piece in pieces:
                sizes[piece.rank] += piece.rows * piece.columns * table.bytes_per_value
            kind, kernel = parameter.sharding_type, parameter.compute_kernel
            plans.append(TablePlan(name, kind, kernel, table.rows, table.dim, sizes, pieces))
    return plans


def format_plan(tables: list[TablePlan]) -> str:
    """Renders the plan as a text table."""
    rows = [
        [
            table.table,
            table.sharding,
            table.kernel,
            f"{table.rows:,}",
            table.dim,
            " ".join(f"{size / 2**20:.2f}" for size in table.bytes_per_rank),
        ]
        for table in tables
    ]
    return tabulate(
        rows,
        ["table", "sharding", "kernel", "rows", "dim", "MiB per rank"],
        tablefmt="plain",
        disable_numparse=True,
        colalign=("left", "left", "left", "right", "right", "left"),
    )
