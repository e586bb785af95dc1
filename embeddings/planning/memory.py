"""What a plan needs of every rank's memory, by formulas that are ours."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields

import numpy as np

from embeddings.placement import Placement
from embeddings.planning.traffic import LENGTH_BYTES, VALUE_BYTES, id_bytes
from embeddings.sharding import Hardware, TablePlan
from embeddings.tables import Table

# Bytes of optimizer state: per value of a table, and per row of a piece.
STATE_BYTES = {
    "sgd": (0, 0),
    "adagrad": (4, 0),
    "rowwise_adagrad": (0, 4),
    "adam": (8, 0),
    "partial_rowwise_adam": (4, 4),
    "lamb": (8, 0),
}
BATCHES_IN_FLIGHT = 2  # the pipeline exchanges the next batch's ids during this one's step


@dataclass(frozen=True)
class Memory:
    """Bytes per rank, float64 [ranks] each.

    Attributes:
        tables: Trained rows in the device's memory, caches of rows elsewhere included.
        optimizer: State of the tables' optimizer, and gradients of data-parallel tables.
        frozen: Knowledge rows in the device's memory.
        activations: Ids and vectors that the embedding layer holds at the same time.
        host: Rows and state in the host's memory (uvm).
        ssd: Rows on SSD (key_value).
    """

    tables: np.ndarray
    optimizer: np.ndarray
    frozen: np.ndarray
    activations: np.ndarray
    host: np.ndarray
    ssd: np.ndarray

    @property
    def device(self) -> np.ndarray:
        """All that lies in the device's memory."""
        return self.tables + self.optimizer + self.frozen + self.activations

    def __add__(self, other: "Memory") -> "Memory":
        """Sums two tables."""
        names = [field.name for field in fields(self)]
        return Memory(*(getattr(self, name) + getattr(other, name) for name in names))


def table_memory(
    table: Table, plan: TablePlan, placement: Placement, optimizer: str, batch: int
) -> Memory:
    """Bytes of one table.

    Weights are `rows * columns * bytes_per_value` per piece, the optimizer's state as in `STATE_BYTES`.
    Activations are the received ids and lengths of the batches in flight, the looked-up vectors before
    and after they are exchanged, and as much again for their gradients unless the table is frozen.

    Args:
        table: The table.
        plan: Where it lies.
        placement: Its cache, if it has one.
        optimizer: Key of `STATE_BYTES`.
        batch: Samples per rank.
    """
    ranks = len(plan.bytes_per_rank)
    weights, state, activations = np.zeros(ranks), np.zeros(ranks), np.zeros(ranks)
    per_value, per_row = (0, 0) if table.frozen else STATE_BYTES[optimizer]
    ids = table.ids_per_sample or (1.0,) * len(table.features)
    passes = 1 if table.frozen else 2
    replicated = plan.sharding == "data_parallel"
    received = batch if replicated else batch * ranks
    for piece in plan.pieces:
        values = piece.rows * piece.columns
        weights[piece.rank] += values * table.bytes_per_value
        state[piece.rank] += values * per_value + piece.rows * per_row
        if replicated and not table.frozen:
            state[piece.rank] += values * VALUE_BYTES
        share = piece.rows / table.rows
        vectors = sum(ids) * share if table.sequence else len(ids)
        inputs = received * (len(ids) * LENGTH_BYTES + sum(ids) * share * id_bytes(table))
        outputs = received * vectors * piece.columns * VALUE_BYTES * passes
        activations[piece.rank] += inputs * BATCHES_IN_FLIGHT + outputs
    vectors = sum(ids) if table.sequence else len(ids)
    activations += batch * vectors * table.dim * VALUE_BYTES * passes
    zero = np.zeros(ranks)
    host, ssd = zero, zero
    if placement.kernel in ("uvm", "uvm_caching"):
        cached = placement.cache_load_factor or 0.0 if placement.kernel == "uvm_caching" else 0.0
        host, weights, state = weights + state, weights * cached, zero
    elif placement.kernel == "key_value":
        ssd, weights = weights, weights * KEY_VALUE_CACHE
    if table.frozen:
        return Memory(zero, state, weights, activations, host, ssd)
    return Memory(weights, state, zero, activations, host, ssd)


KEY_VALUE_CACHE = 0.2  # torchrec's share of an SSD table's rows that the device caches


def plan_memory(
    tables: Iterable[Table],
    plans: Iterable[TablePlan],
    placements: Mapping[str, Placement],
    optimizer: str,
    batch: int,
    ranks: int,
) -> Memory:
    """Sums all tables."""
    known = {table.name: table for table in tables}
    total = Memory(*(np.zeros(ranks) for _ in fields(Memory)))
    for plan in plans:
        placement = placements.get(plan.table, Placement())
        total = total + table_memory(known[plan.table], plan, placement, optimizer, batch)
    return total


def moved_bytes(table: Table, plan: TablePlan, optimizer: str, batch: int) -> np.ndarray:
    """Least bytes that every rank's memory moves for one sharded table in one step, float64 [ranks].

    Ids and lengths are read where they come from and written where they go, and read by the lookup and
    by the update; a row is read per id; vectors are written, read when they are sent and written where
    they arrive, and their gradients as well; every row that was looked up is read and written with its
    optimizer state, each id counted as a row of its own.

    Args:
        table: Its features and how many ids they have.
        plan: Where its pieces lie, on two ranks or more.
        optimizer: Key of `STATE_BYTES`.
        batch: Samples per rank.

    Raises:
        ValueError: The table is data-parallel, which updates all of its rows instead.
    """
    if plan.sharding == "data_parallel":
        raise ValueError(f"{table.name} is data-parallel: its rows do not travel")
    ranks = len(plan.bytes_per_rank)
    ids = table.ids_per_sample or (1.0,) * len(table.features)
    per_value, per_row = STATE_BYTES[optimizer]
    delivered = batch * (sum(ids) if table.sequence else len(ids)) * table.dim * VALUE_BYTES
    given = batch * (len(ids) * LENGTH_BYTES + sum(ids) * id_bytes(table))
    moved = np.full(ranks, given + delivered * (1 if table.frozen else 2))
    for piece in plan.pieces:
        looked_up = ranks * batch * sum(ids) * piece.rows / table.rows
        received = ranks * batch * len(ids) * LENGTH_BYTES + looked_up * id_bytes(table)
        vectors = looked_up if table.sequence else ranks * batch * len(ids)
        produced = vectors * piece.columns * VALUE_BYTES
        row = piece.columns * table.bytes_per_value
        moved[piece.rank] += 2 * received + looked_up * row + 2 * produced
        if not table.frozen:
            state = piece.columns * per_value + per_row
            moved[piece.rank] += received + produced + 2 * looked_up * (row + state)
    return moved


def limits(hardware: Hardware) -> tuple[float, float]:
    """Bytes that tables may take per rank: (of the device's memory, of its share of the host's).

    On a CPU both are the host's memory.
    """
    host = hardware.host_memory / hardware.ranks_per_host * (1 - hardware.reserved)
    device = hardware.device_memory * (1 - hardware.reserved)
    return (device, host) if hardware.device == "cuda" else (host, host)


def deficit(memory: Memory, hardware: Hardware) -> float:
    """Bytes that the worst rank lacks; 0 or less: everything fits."""
    device, host = limits(hardware)
    ssd = hardware.ssd / hardware.ranks_per_host
    return max(
        float((memory.device - device).max()),
        float((memory.host - host).max()),
        float((memory.ssd - ssd).max()),
    )
