"""What a plan sends over the wire: bytes per step between ranks, by formulas that are ours and tested.

Every function returns a float64 matrix [ranks, ranks]: entry [i, j] is what rank i sends to rank j in
one step; the diagonal, which never leaves a rank, is zero. Ids are taken to fall evenly on the rows of a
table. Reduce-scatter, all-gather and all-reduce are counted as if every chunk went straight to the rank
that needs it; a ring sends as many bytes in total, over other links. Not counted: the exchange of
split sizes, `SPLITS_BYTES` per pair of ranks, collection and kind of sharding.

`tests/embeddings/planning` compares them with what collectives are really given on four gloo ranks.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from embeddings.sharding import Piece, TablePlan
from embeddings.tables import Table

ID_BYTES = 8  # int64
WEIGHT_BYTES = 4  # float32, of an id of a weighted table
LENGTH_BYTES = 8  # int64, one per feature and sample
VALUE_BYTES = 4  # lookups give float32, whatever the table's precision
SPLITS_BYTES = 8 * 3  # per pair of ranks and exchange of ids: sizes of lengths and ids, batch size

BY_HOST = ("table_row_wise", "grid_shard")


@dataclass(frozen=True)
class Traffic:
    """Bytes per step of one table, [ranks, ranks] each.

    Attributes:
        input: Ids and lengths, on their way to the rows.
        output: Looked-up vectors, on their way back.
        backward: Gradients of the vectors; zero for a frozen table.
        gradients: Gradients of data-parallel rows.
    """

    input: np.ndarray
    output: np.ndarray
    backward: np.ndarray
    gradients: np.ndarray

    @property
    def total(self) -> np.ndarray:
        """All of it."""
        return self.input + self.output + self.backward + self.gradients

    def __add__(self, other: "Traffic") -> "Traffic":
        """Sums two tables."""
        return Traffic(
            self.input + other.input,
            self.output + other.output,
            self.backward + other.backward,
            self.gradients + other.gradients,
        )


def no_traffic(ranks: int) -> Traffic:
    """Nothing, which sums start from."""
    zero = np.zeros((ranks, ranks))
    return Traffic(zero, zero, zero, zero)


def table_traffic(table: Table, plan: TablePlan, batch: int, hosts: int) -> Traffic:
    """Bytes of one table and step.

    Args:
        table: Its features and how many ids they have.
        plan: Where its pieces lie.
        batch: Samples per rank.
        hosts: Number of hosts, all with equally many ranks; ranks are numbered host by host.
    """
    ranks = len(plan.bytes_per_rank)
    if plan.sharding == "data_parallel":
        size = 0.0 if table.frozen else table.rows * table.dim * VALUE_BYTES
        zero = np.zeros((ranks, ranks))
        return Traffic(zero, zero, zero, all_reduce(size, ranks))
    sent = _without_diagonal(input_bytes(table, plan, batch, ranks))
    if plan.sharding in BY_HOST:
        output = host_output_bytes(table, plan, batch, ranks, hosts)
    else:
        output = output_bytes(table, plan, batch, ranks)
    output = _without_diagonal(output)
    # Every vector's gradient takes the vector's way in the other direction.
    backward = np.zeros_like(output) if table.frozen else output.T
    return Traffic(sent, output, backward, np.zeros_like(output))


def input_bytes(table: Table, plan: TablePlan, batch: int, ranks: int) -> np.ndarray:
    """Ids and lengths: an all-to-all.

    Every rank sends to every piece, per feature, a length per sample and the ids that fall on the
    piece's rows: `batch * (LENGTH_BYTES + ids_per_sample * ID_BYTES * piece.rows / table.rows)`. A rank
    with two pieces (of different columns) gets them twice. A weight goes with each id of a weighted table.
    """
    sent = np.zeros((ranks, ranks))
    for piece in plan.pieces:
        share = piece.rows / table.rows
        for ids in _ids(table):
            sent[:, piece.rank] += batch * (LENGTH_BYTES + ids * id_bytes(table) * share)
    return sent


def output_bytes(table: Table, plan: TablePlan, batch: int, ranks: int) -> np.ndarray:
    """Vectors of table-, column- and row-wise tables.

    Pooled: a piece sends, per feature and sample, one vector of its width (an all-to-all; for row-wise
    tables, whose vectors are partial sums, a reduce-scatter of the same size):
    `batch * features * piece.columns * VALUE_BYTES`. Sequences: one vector per id, and only for ids that
    fall on the piece (an all-to-all): `batch * ids_per_sample * share * piece.columns * VALUE_BYTES`.
    """
    sent = np.zeros((ranks, ranks))
    for piece in plan.pieces:
        sent[piece.rank, :] += batch * _vectors(table, piece) * piece.columns * VALUE_BYTES
    return sent


def host_output_bytes(
    table: Table, plan: TablePlan, batch: int, ranks: int, hosts: int
) -> np.ndarray:
    """Pooled vectors of tables whose rows are spread over the ranks of a host.

    First a reduce-scatter within the host: each of its L ranks has partial sums for all samples and
    sends every other one an L-th of them, `batch * hosts * features * columns * VALUE_BYTES`. Then an
    all-to-all between ranks of the same position on different hosts: each sends the other's samples,
    `batch * features * columns * VALUE_BYTES`. A grid does so for every column piece.
    """
    local = ranks // hosts
    sent = np.zeros((ranks, ranks))
    for piece in plan.pieces:
        host, position = divmod(piece.rank, local)
        size = batch * len(table.features) * piece.columns * VALUE_BYTES
        sent[piece.rank, host * local : (host + 1) * local] += size * hosts
        others = [other * local + position for other in range(hosts) if other != host]
        sent[piece.rank, others] += size
    return sent


def all_reduce(size: float, ranks: int) -> np.ndarray:
    """Averaging `size` bytes over ranks: a reduce-scatter and an all-gather of an n-th each, per pair."""
    return _without_diagonal(np.full((ranks, ranks), 2 * size / ranks))


def plan_traffic(
    tables: Iterable[Table], plans: Iterable[TablePlan], batch: int, ranks: int, hosts: int
) -> Traffic:
    """Sums all tables."""
    known = {table.name: table for table in tables}
    total = no_traffic(ranks)
    for plan in plans:
        total = total + table_traffic(known[plan.table], plan, batch, hosts)
    return total


def by_link(matrix: np.ndarray, hosts: int) -> tuple[float, float]:
    """Splits bytes between all ranks into (within hosts, between hosts)."""
    local = len(matrix) // hosts
    host = np.arange(len(matrix)) // local
    inside = host[:, None] == host[None, :]
    return float(matrix[inside].sum()), float(matrix[~inside].sum())


def id_bytes(table: Table) -> int:
    """Bytes of an id on the wire, its weight included where it has one."""
    return ID_BYTES + WEIGHT_BYTES if table.weighted else ID_BYTES


def _ids(table: Table) -> tuple[float, ...]:
    return table.ids_per_sample or (1.0,) * len(table.features)


def _vectors(table: Table, piece: Piece) -> float:
    """Vectors per sample that a piece looks up and sends."""
    if table.sequence:
        return sum(_ids(table)) * piece.rows / table.rows
    return float(len(table.features))


def _without_diagonal(matrix: np.ndarray) -> np.ndarray:
    return matrix * (1 - np.eye(len(matrix)))
