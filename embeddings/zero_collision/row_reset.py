"""Rows that were given to a new id start anew: first vector and optimizer state, wherever the row lies."""

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.streamable import Pipelineable

from embeddings.ids import UNKNOWN_ROW


@dataclass
class ReassignedRows(Pipelineable):
    """Rows of this rank's shards that have a new owner: table to int64 [n, 2] (row, the owner's key)."""

    tables: dict[str, Tensor] = field(default_factory=dict)

    def to(self, device: torch.device, non_blocking: bool = False) -> "ReassignedRows":
        """Copies to a device."""
        return ReassignedRows(
            {k: v.to(device, non_blocking=non_blocking) for k, v in self.tables.items()}
        )

    def record_stream(self, stream: torch.Stream) -> None:
        """Keeps memory alive while `stream` uses it."""
        for rows in self.tables.values():
            rows.record_stream(stream)

    def pin_memory(self) -> "ReassignedRows":
        """Copies to page-locked host memory."""
        return ReassignedRows({k: v.pin_memory() for k, v in self.tables.items()})


@dataclass
class _Piece:
    """A part of a table on this rank: rows from `row`, columns from `column`, and what lies in them."""

    row: int
    column: int
    weight: Tensor
    state: list[tuple[int, Tensor]]  # optimizer state and its first row


class RowInitializer(nn.Module):
    """Gives reassigned rows their first vector and empty optimizer state, before the lookup of their batch.

    It runs at the beginning of a batch's forward: the updates of all batches before are done by then, and
    no later batch has been looked up, so rows may be given away while earlier batches are in flight.

    An id's first vector is a function of seed, table and key alone: normal with mean 0 and the given
    deviation, the same on any number of ranks.
    """

    def __init__(self, rows: dict[str, int], init_std: float, seed: int) -> None:
        super().__init__()
        self._rows, self._std, self._seed = rows, init_std, seed
        self._pieces: dict[str, list[_Piece]] = {}

    def bind(self, model: DistributedModelParallel) -> dict[str, tuple[int, int]]:
        """Finds the local shards of the tables; they alias the kernels' storage.

        Returns:
            Table to the rows [start, stop) that this rank holds, (0, 0) for none.

        Raises:
            ValueError: If a table is not sharded, or this rank's parts of it differ in their rows.
        """
        weights = model.state_dict()
        states = model.fused_optimizer.state_dict()["state"]
        held = {}
        for table, rows in self._rows.items():
            ends = (f"embedding_bags.{table}.weight", f"embeddings.{table}.weight")
            (name,) = [name for name in weights if name.endswith(ends)]
            if not isinstance(weights[name], ShardedTensor):
                raise ValueError(
                    f"table {table} is kept whole on every rank; rows are given to ids in sharded ones only"
                )
            pieces = [
                _Piece(row, column, s.tensor.detach(), [])
                for s in weights[name].local_shards()
                for row, column in [s.metadata.shard_offsets]
            ]
            ranges = {(piece.row, piece.row + len(piece.weight)) for piece in pieces}
            if len(ranges) > 1:
                raise ValueError(f"table {table}: the parts on this rank differ in their rows")
            for value in states.get(name, {}).values():
                if isinstance(value, ShardedTensor):
                    # Cut by columns, an accumulator per row and column shard is laid out [columns * rows].
                    pieces[0].state.extend(
                        (s.metadata.shard_offsets[0] % rows, s.tensor.detach())
                        for s in value.local_shards()
                    )
            self._pieces[table] = pieces
            held[table] = ranges.pop() if ranges else (0, 0)
            if pieces and pieces[0].row == UNKNOWN_ROW:
                self({table: torch.zeros(1, 2, dtype=torch.int64, device=pieces[0].weight.device)})
        return held

    def forward(self, tables: dict[str, Tensor]) -> None:
        """Starts rows anew: table to int64 [n, 2] (row, key), rows being ones that this rank holds."""
        with torch.no_grad():
            for table, reassigned in tables.items():
                if not len(reassigned):
                    continue
                rows, keys = reassigned.unbind(1)
                salt = list(self._rows).index(table) + 1_000_003 * self._seed
                for piece in self._pieces[table]:
                    width = piece.weight.shape[1]
                    values = _normal(keys, piece.column, width, salt) * self._std
                    piece.weight.index_copy_(0, rows - piece.row, values.to(piece.weight.dtype))
                    for start, state in piece.state:
                        state.index_fill_(0, rows - start, 0)


def _normal(keys: Tensor, column: int, width: int, salt: int) -> Tensor:
    """Standard normal float32 [n, width] as a function of (key, column, salt).

    Mixes with SplitMix64's finaliser, then takes Box and Muller's transform of the two halves.
    """

    def wrap(value: int) -> int:
        return int(np.uint64(value % (1 << 64)).astype(np.int64))

    def shift(value: Tensor, by: int) -> Tensor:  # without the sign
        return (value >> by) & ((1 << (64 - by)) - 1)

    columns = torch.arange(column, column + width, device=keys.device)
    x = keys[:, None] + (columns + 1) * wrap(0x9E3779B97F4A7C15) + wrap(salt * 0xD1342543DE82EF95)
    x = (x ^ shift(x, 30)) * wrap(0xBF58476D1CE4E5B9)
    x = (x ^ shift(x, 27)) * wrap(0x94D049BB133111EB)
    x = x ^ shift(x, 31)
    radius = (-2 * ((shift(x, 32).double() + 0.5) / 2**32).log()).sqrt()
    return (radius * ((x & 0xFFFFFFFF).double() * (2 * np.pi / 2**32)).cos()).float()
