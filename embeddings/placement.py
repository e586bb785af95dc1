"""What the user wants of each table, and what cannot be had."""

from collections.abc import Mapping
from dataclasses import dataclass

from torchrec.distributed.types import ShardingType

from embeddings.optimizer import ON_EVERY_DEVICE
from embeddings.tables import Table


class PlanError(ValueError):
    """Tables cannot be placed as wanted; the message says which, why, and what to do."""


KERNELS = {
    "fused": "fused",
    "uvm": "fused_uvm",
    "uvm_caching": "fused_uvm_caching",
    "key_value": "key_value",
}


@dataclass(frozen=True)
class Placement:
    """What the user wants of one table.

    Attributes:
        sharding: torchrec's name of a sharding type, or "planner" to let the planner choose.
        kernel: Key of `KERNELS`: rows in the device's memory, in the host's (uvm), in the host's with
            a cache on the device (uvm_caching), on SSD with a cache on the device (key_value).
        cache_load_factor: uvm_caching: the share of the rows that the device's cache holds.
        directory: key_value: where the rows are kept.
        replicable: Whether the table may be data-parallel, see `TableOptimizer.replicable`.
    """

    sharding: str = "row_wise"
    kernel: str = "fused"
    cache_load_factor: float | None = None
    directory: str | None = None
    replicable: bool = True


def check_placement(table: str, sequence: bool, placement: Placement, device: str) -> None:
    """Refuses what the device or the kind of table cannot do.

    Args:
        table: Its name.
        sequence: Whether it gives one vector per id.
        placement: What the user wants.
        device: "cuda" or "cpu".

    Raises:
        PlanError: If it is impossible, with what to do.
    """
    kind, kernel = placement.sharding, placement.kernel
    data_parallel = kind == ShardingType.DATA_PARALLEL.value
    if kernel != "fused" and device == "cpu":
        raise PlanError(
            f"kernel {kernel} of table {table} needs a GPU; on a CPU there is only fused: remove it"
        )
    if kernel != "fused" and data_parallel:
        raise PlanError(
            f"kernel {kernel} of table {table}: a data_parallel table lies in the device's memory; "
            "use fused"
        )
    if data_parallel and not placement.replicable:
        raise PlanError(
            f"sharding of {table}: data_parallel tables are trained by sgd, adagrad or rowwise_adagrad "
            "without weight decay; choose one of these, or another sharding"
        )
    if sequence and kind in _POOLED_ONLY:
        raise PlanError(
            f"sharding of {table}: {kind} is not possible for a table of sequences; use row_wise, "
            "table_wise, column_wise or planner"
        )
    if sequence and data_parallel and device == "cpu":
        raise PlanError(
            f"sharding of {table}: a data_parallel table of sequences needs a GPU (torchrec's CPU kernel "
            "sums its ids up); use row_wise, table_wise, column_wise or planner"
        )


_POOLED_ONLY = (ShardingType.TABLE_ROW_WISE.value, ShardingType.GRID_SHARD.value)


def wanted_placement(table: Table, placements: Mapping[str, Placement], ranks: int) -> Placement:
    """What is wanted of a table; a small one, whose rows do not reach all ranks, is not cut by rows.

    Rows are cut into parts of one size, rounded up: 9 rows on 4 ranks are 3, 3, 3 and none.

    Raises:
        PlanError: If that is wanted all the same: the kernels fail on a rank without rows.
    """
    placement = placements.get(table.name)
    if placement is None:
        reaches_all = (ranks - 1) * -(-table.rows // ranks) < table.rows
        return Placement() if reaches_all else Placement(sharding="table_wise")
    if table.rows >= ranks:
        return placement
    if placement.sharding in ("row_wise", "table_row_wise", "grid_shard"):
        raise PlanError(
            f"table {table.name} has {table.rows} rows, fewer than {ranks} ranks: {placement.sharding} would "
            "leave a rank without rows; use table_wise"
        )
    return placement


def check_groups(
    size: int, ranks: int, ranks_per_host: int, device: str, optimizer: str, kernels: set[str]
) -> None:
    """Refuses groups that cannot be.

    Args:
        size: Ranks of a group.
        ranks: Of the job.
        ranks_per_host: Of a host.
        device: "cuda" or "cpu".
        optimizer: Of the tables.
        kernels: Of the tables.

    Raises:
        PlanError: With what to do.
    """
    where = f"hardware.sharding_group_size: {size}"
    if device == "cpu":
        raise PlanError(f"{where}: groups with copies need GPUs; remove the field on a CPU")
    if size >= ranks or ranks % size:
        raise PlanError(f"{where}: must divide the {ranks} ranks into two groups or more")
    if size % ranks_per_host and ranks_per_host % size:
        raise PlanError(
            f"{where}: a group is whole hosts or an even part of one; {ranks_per_host} ranks are on a host"
        )
    if optimizer not in ON_EVERY_DEVICE:
        raise PlanError(
            f"{where}: copies of {optimizer}'s state cannot be averaged; choose "
            f"{', '.join(ON_EVERY_DEVICE[:-1])} or {ON_EVERY_DEVICE[-1]}"
        )
    if "key_value" in kernels:
        raise PlanError(f"{where}: copies of key_value tables are not averaged; use uvm_caching")
