"""Keys of a batch to rows of sharded zero-collision tables: routing between ranks, reports, checkpoints.

A rank owns some buckets of every table's row owners, on its host. It asks the ranks that own its keys,
each distinct key once, and gets rows back; tables can then be sharded in any way. All ranks must call
alike. The batch brings along the rows that were given away for it, so a batch may be remapped long
before it is computed.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed._shard.metadata import ShardMetadata
from torch.distributed._shard.sharded_tensor import Shard, ShardedTensor
from torch.distributed._shard.sharded_tensor.metadata import (
    ShardedTensorMetadata,
    TensorProperties,
)
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from embeddings.ids import UNKNOWN_ROW
from embeddings.zero_collision.key_index import distinct
from embeddings.zero_collision.policy import ADMISSIONS, EVICTIONS, RowOwners, ZeroCollision
from embeddings.zero_collision.row_reset import ReassignedRows, RowInitializer

KeyCounts = tuple[np.ndarray, np.ndarray]  # distinct keys of a table (uint64, sorted) and how often


@dataclass
class Assigned:
    """Rows that one rank's owners gave to new keys in a step: rows int64 [n], keys int64 [n]."""

    rows: np.ndarray
    keys: np.ndarray


class ZeroCollisionTables(nn.Module):
    """The row owners of all zero-collision tables, on all ranks.

    Args:
        options: Table to its options.
        features: Table to the features of a batch that read it.
        init_std: Deviation of an id's first vector.
        seed: Of first vectors.
    """

    def __init__(
        self,
        options: dict[str, ZeroCollision],
        features: dict[str, tuple[str, ...]],
        init_std: float,
        seed: int,
    ) -> None:
        super().__init__()
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self._features = features
        self._owners = {
            table: RowOwners(chosen, self.rank, self.world_size)
            for table, chosen in options.items()
        }
        self._step = torch.zeros(1, dtype=torch.int64)
        self._state = {"step": self._step} | {
            f"{table}.{name}": self._sharded(values)
            for table, owners in self._owners.items()
            for name, values in owners.state.items()
        }
        self._initializer = RowInitializer({t: o.rows for t, o in options.items()}, init_std, seed)
        self._held: dict[str, tuple[int, int]] = {}
        self._rows_stay = True  # every rank holds the rows of its own buckets
        # Per table: occurrences and those without a row, while training and while scoring.
        self._counts = np.zeros((len(options), 4), dtype=np.int64)

    def bind(self, model: DistributedModelParallel) -> None:
        """Finds the shards whose rows change owners; call on all ranks once the model is sharded.

        Raises:
            ValueError: If a table is sharded so that its rows cannot be started anew.
        """
        self._held = self._initializer.bind(model)
        local = all(
            self._held[table] == (owners.start, owners.start + len(owners.keys))
            for table, owners in self._owners.items()
        )
        answers: list[bool] = [False] * self.world_size
        dist.all_gather_object(answers, local)
        self._rows_stay = all(answers)

    def remap(
        self, ids: KeyedJaggedTensor, assign: bool
    ) -> tuple[KeyedJaggedTensor, ReassignedRows]:
        """Replaces keys by rows; collective.

        Args:
            ids: A batch's keys, on the host; features that read no table of these are left alone.
            assign: Count, admit and evict. Otherwise keys without a row get `UNKNOWN_ROW` and nothing
                changes.
        """
        values, offsets = ids.values().numpy(), ids.offset_per_key()
        slices = {name: slice(offsets[i], offsets[i + 1]) for i, name in enumerate(ids.keys())}
        asked: list[KeyCounts] = []
        inverses = []
        for table in self._owners:
            keys = np.concatenate([values[slices[feature]] for feature in self._features[table]])
            asked_keys, inverse, counts = distinct(keys.view(np.uint64))
            asked.append((asked_keys, counts))
            inverses.append(inverse)
        rows_of_keys, assigned = self._route(asked, assign)
        rows = values.copy()
        for number, table in enumerate(self._owners):
            unknown = rows_of_keys[number] == UNKNOWN_ROW
            counts = asked[number][1]
            first = 0 if assign else 2
            self._counts[number, first : first + 2] += counts.sum(), counts[unknown].sum()
            table_rows = rows_of_keys[number][inverses[number]]
            begin = 0
            for feature in self._features[table]:
                width = slices[feature].stop - slices[feature].start
                rows[slices[feature]] = table_rows[begin : begin + width]
                begin += width
        remapped = KeyedJaggedTensor(
            ids.keys(),
            torch.from_numpy(rows),
            lengths=ids.lengths(),
            length_per_key=ids.length_per_key(),
        )
        return remapped, self._reassigned_here(assigned) if assign else ReassignedRows()

    def forward(self, reassigned: ReassignedRows) -> None:
        """Starts the rows anew that were given away for this batch; call before its lookup."""
        self._initializer(reassigned.tables)

    def report(self, scored: bool) -> dict[str, float]:
        """Numbers of all tables since the last report of this kind; collective, on the host.

        Args:
            scored: Report the unknown rate of scoring instead of training.
        """
        totals = torch.zeros(len(self._owners), 4, dtype=torch.int64)
        window = slice(2, 4) if scored else slice(0, 2)
        for number, owners in enumerate(self._owners.values()):
            totals[number, :2] = torch.from_numpy(owners.tally[:, [ADMISSIONS, EVICTIONS]].sum(0))
        totals[:, 2:] = torch.from_numpy(self._counts[:, window])
        self._counts[:, window] = 0
        dist.all_reduce(totals)
        numbers: dict[str, float] = {}
        for (table, owners), numbers_of_table in zip(
            self._owners.items(), totals.tolist(), strict=True
        ):
            admissions, evictions, occurrences, unknown = numbers_of_table
            numbers[f"{table}_unknown_rate"] = unknown / max(occurrences, 1)
            if not scored:
                usable = owners.options.rows - 1
                numbers[f"{table}_occupancy"] = (admissions - evictions) / usable
                numbers[f"{table}_admissions"] = admissions
                numbers[f"{table}_evictions"] = evictions
        return numbers

    def rebuild(self) -> None:
        """Call after the state was changed from outside, as a checkpoint does."""
        for owners in self._owners.values():
            owners.rebuild()

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        """Puts the owners into `state_dict()`: sharded tensors that alias the live arrays."""
        for name, value in self._state.items():
            destination[prefix + name] = value

    def _route(
        self, asked: list[KeyCounts], assign: bool
    ) -> tuple[list[np.ndarray], dict[str, Assigned]]:
        """Sends every key to the rank that owns it; returns the rows of the keys, and those assigned here."""
        if self.world_size == 1:
            return self._lookup(asked, assign)
        world, tables = self.world_size, len(asked)
        sent = np.stack(
            [
                np.bincount(owners.owner(keys, world), minlength=world)
                for owners, (keys, _) in zip(self._owners.values(), asked, strict=True)
            ],
            axis=1,
        )  # [rank, table]; keys are sorted and owners grow with them
        received = _exchange(sent, np.full(world, 1), np.full(world, 1))
        pairs = [np.stack([keys.view(np.int64), counts], axis=1) for keys, counts in asked]
        questions = _exchange(_by_rank(pairs, sent), sent.sum(1), received.sum(1))
        per_table = _by_table(questions, received)
        merged, inverses = [], []
        for pairs_of_table in per_table:
            keys, inverse, _ = distinct(np.ascontiguousarray(pairs_of_table[:, 0]).view(np.uint64))
            counts = np.zeros(len(keys), dtype=np.int64)
            np.add.at(counts, inverse, pairs_of_table[:, 1])
            merged.append((keys, counts))
            inverses.append(inverse)
        rows_of_keys, assigned = self._lookup(merged, assign)
        replies = [rows_of_keys[table][inverses[table]] for table in range(tables)]
        back = _exchange(_by_rank(replies, received), received.sum(1), sent.sum(1))
        return _by_table(back, sent), assigned

    def _lookup(
        self, asked: list[KeyCounts], assign: bool
    ) -> tuple[list[np.ndarray], dict[str, Assigned]]:
        rows_of_keys, assigned = [], {}
        for (table, owners), (keys, counts) in zip(self._owners.items(), asked, strict=True):
            if assign:
                rows, new_rows, new_keys = owners.assign(keys, counts, int(self._step))
                assigned[table] = Assigned(new_rows, new_keys.view(np.int64))
            else:
                rows = owners.find(keys)
            rows_of_keys.append(rows)
        if assign:
            self._step += 1
        return rows_of_keys, assigned

    def _reassigned_here(self, assigned: dict[str, Assigned]) -> ReassignedRows:
        """The assigned rows that lie on this rank, whatever rank assigned them."""
        tables = {table: np.stack([new.rows, new.keys], axis=1) for table, new in assigned.items()}
        if not self._rows_stay:
            everybody: list[dict[str, np.ndarray]] = [{}] * self.world_size
            dist.all_gather_object(everybody, tables)
            for table, (start, stop) in self._held.items():
                rows = np.concatenate([part[table] for part in everybody])
                tables[table] = rows[(rows[:, 0] >= start) & (rows[:, 0] < stop)]
        return ReassignedRows({table: torch.from_numpy(rows) for table, rows in tables.items()})

    def _sharded(self, values: np.ndarray) -> ShardedTensor:
        """One rank's array as its part of a tensor over all ranks; shares the memory."""
        local = torch.from_numpy(values.view(np.int64) if values.dtype == np.uint64 else values)
        rest, count = list(local.shape[1:]), len(local)
        parts = [
            ShardMetadata([rank * count, *(0 for _ in rest)], [count, *rest], f"rank:{rank}/cpu")
            for rank in range(self.world_size)
        ]
        size = torch.Size([count * self.world_size, *rest])
        return ShardedTensor._init_from_local_shards_and_global_metadata(
            [Shard(local, parts[self.rank])],
            ShardedTensorMetadata(parts, size, TensorProperties(dtype=local.dtype)),
        )


def _exchange(values: np.ndarray, sent: np.ndarray, received: np.ndarray) -> np.ndarray:
    """All-to-all of int64 rows over the host's network: how many go to and come from each rank."""
    source = torch.from_numpy(np.ascontiguousarray(values))
    target = torch.empty(int(received.sum()), *source.shape[1:], dtype=torch.int64)
    dist.all_to_all_single(target, source, received.tolist(), sent.tolist())
    return target.numpy()


def _by_rank(tables: list[np.ndarray], counts: np.ndarray) -> np.ndarray:
    """Joins tables' values, each in order of ranks, so that ranks come first. counts: [rank, table]."""
    ends = counts.cumsum(0)
    return np.concatenate(
        [
            values[ends[rank, table] - counts[rank, table] : ends[rank, table]]
            for rank in range(len(counts))
            for table, values in enumerate(tables)
        ]
    )


def _by_table(values: np.ndarray, counts: np.ndarray) -> list[np.ndarray]:
    """The inverse of `_by_rank`."""
    pieces = np.split(values, counts.reshape(-1).cumsum()[:-1])
    tables = counts.shape[1]
    return [np.concatenate(pieces[table::tables]) for table in range(tables)]
