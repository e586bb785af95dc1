"""Rank-aware stream of batches from Parquet: even shares, deterministic shuffle, keyed joins.

Every rank yields the same number of batches of the same size whatever its share, because the number
follows from the row counts in the Parquet footers, which all ranks read: nothing is negotiated while
training and nothing can hang at the end.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from embeddings.ids import IdMap, SortedKeys
from llm_knowledge.errors import InputError
from trainer.data.batch import Batch

COLUMNS = ["user_id", "item_id", "scenario_id", "timestamp", "label", "history"]
Rows = dict[str, np.ndarray]  # column name to an array whose first dimension is the row


class Joinable(Protocol):
    """What the join needs to know of a knowledge store."""

    def keys(self) -> np.ndarray:
        """Sorted keys."""
        ...

    def cutoffs(self) -> np.ndarray:
        """Newest event behind each vector, seconds."""
        ...


class KnowledgeJoin:
    """Point-in-time join: (key, event time) to the store's row, -1 where none is eligible.

    A vector is eligible for an event only if every event behind it lies strictly before.
    """

    def __init__(self, store: Joinable) -> None:
        self._keys = SortedKeys(pa.array(store.keys()))
        self._cutoffs = store.cutoffs()

    def rows(self, keys: pa.ChunkedArray, timestamps: np.ndarray) -> np.ndarray:
        """Returns store rows, int64, same length as `keys`."""
        rows = self._keys.positions(keys)
        if len(self._cutoffs) == 0:
            return rows
        return np.where((rows >= 0) & (timestamps > self._cutoffs[rows]), rows, -1)


@dataclass(frozen=True)
class RowEncoder:
    """Turns columns of the log into table rows and store rows."""

    users: IdMap
    items: IdMap
    scenarios: SortedKeys
    scenario_order: np.ndarray  # sorted position to position in dataset.json
    history_length: int
    joins: dict[str, KnowledgeJoin]  # level to join; absent levels are never eligible

    def encode(self, table: pa.Table, source: Path) -> Rows:
        """Encodes columns `COLUMNS` of one piece of a file.

        Raises:
            InputError: If a scenario of the log is not one of the dataset's.
        """
        timestamps = table["timestamp"].to_numpy()
        position = self.scenarios.positions(table["scenario_id"])
        if len(position) and position.min() < 0:
            value = table["scenario_id"][int(np.argmin(position))].as_py()
            raise InputError(
                f"{source}: column scenario_id: {value!r} is not listed in dataset.json"
            )
        keys = {"user": "user_id", "item": "item_id", "scenario": "scenario_id"}
        joined = {
            level: self.joins[level].rows(table[column], timestamps)
            if level in self.joins
            else np.full(len(table), -1, dtype=np.int64)
            for level, column in keys.items()
        }
        history = table["history"].combine_chunks()
        if isinstance(history, pa.ChunkedArray):  # an empty column combines to a chunked array
            history = pa.array([], type=history.type)
        lengths = history.value_lengths().to_numpy(zero_copy_only=False).astype(np.int64)
        flat = self.items.lookup(history.flatten())
        return {
            "user": self.users.lookup(table["user_id"]),
            "item": self.items.lookup(table["item_id"]),
            "scenario": self.scenario_order[position],
            "label": table["label"].to_numpy().astype(np.float32),
            "history": _last_columns(flat, lengths, self.history_length),
            "history_length": np.minimum(lengths, self.history_length),
            **{f"{level}_knowledge": rows for level, rows in joined.items()},
        }


def _last_columns(flat: np.ndarray, lengths: np.ndarray, width: int) -> np.ndarray:
    """Lays out ragged rows as [n, width]: the last `width` values of each, left-aligned, 0 beyond."""
    ends = np.cumsum(lengths)
    kept = np.minimum(lengths, width)
    at = (ends - kept)[:, None] + np.arange(width)
    inside = np.arange(width) < kept[:, None]
    if len(flat) == 0:
        return np.zeros((len(lengths), width), dtype=np.int64)
    return np.where(inside, flat[np.minimum(at, len(flat) - 1)], 0)


class EventStream:
    """The events of some splits, as one rank's share of batches.

    Args:
        files: Parquet files of the splits.
        encoder: Maps columns to rows.
        batch_size: Samples per rank and step.
        rank: This rank.
        world_size: Number of ranks.
        shuffle_buffer: Rows to shuffle within; 0 keeps the order of the files.
        seed: Of the shuffle.
    """

    def __init__(
        self,
        files: list[Path],
        encoder: RowEncoder,
        batch_size: int,
        rank: int,
        world_size: int,
        shuffle_buffer: int = 0,
        seed: int = 0,
    ) -> None:
        self._encoder, self._buffer, self._seed = encoder, shuffle_buffer, seed
        self.batch_size = batch_size
        self._groups = [
            (file, group, metadata.row_group(group).num_rows)
            for file in files
            for metadata in [pq.read_metadata(file)]
            for group in range(metadata.num_row_groups)
        ]
        self.total_rows = sum(rows for _, _, rows in self._groups)
        bounds = [self.total_rows * r // world_size for r in range(world_size + 1)]
        self.start, self.stop = bounds[rank], bounds[rank + 1]
        largest = max(high - low for low, high in itertools.pairwise(bounds))
        self.steps = -(-largest // batch_size)

    def tables(
        self, columns: list[str], epoch: int | None = None
    ) -> Iterator[tuple[pa.Table, Path]]:
        """Reads this rank's rows piece by piece, row groups in the order of the epoch."""
        order = np.arange(len(self._groups))
        if epoch is not None and self._buffer:
            order = np.random.default_rng([self._seed, epoch]).permutation(order)
        position = 0
        for index in order:
            file, group, rows = self._groups[index]
            low, high = max(self.start - position, 0), min(self.stop - position, rows)
            position += rows
            if low < high:
                with pq.ParquetFile(file) as parquet:
                    table = parquet.read_row_group(group, columns=columns)
                yield table.slice(low, high - low), file

    def batches(self, epoch: int = 0, skip: int = 0) -> Iterator[Batch]:
        """Yields exactly `steps - skip` batches.

        Args:
            epoch: Chooses the shuffle.
            skip: Batches already trained on, when resuming inside an epoch.
        """
        generator = np.random.default_rng([self._seed, epoch, self.start])
        made = 0
        for rows in self._chunks(epoch):
            count = len(rows["label"])
            order = generator.permutation(count) if self._buffer else np.arange(count)
            for at in range(0, count, self.batch_size):
                made += 1
                if made > skip:
                    chosen = order[at : at + self.batch_size]
                    yield collate({k: v[chosen] for k, v in rows.items()}, self.batch_size)
        nothing = {k: v[:0] for k, v in self._encode_nothing().items()}
        for _ in range(max(made, skip), self.steps):
            yield collate(nothing, self.batch_size)

    def _chunks(self, epoch: int) -> Iterator[Rows]:
        """Yields encoded rows in chunks that hold whole batches, but for the last one."""
        size = max(self._buffer // self.batch_size, 1) * self.batch_size
        pending: list[Rows] = []
        held = 0
        for table, file in self.tables(COLUMNS, epoch):
            pending.append(self._encoder.encode(table, file))
            held += len(table)
            while held >= size:
                joined = _concatenate(pending)
                yield {k: v[:size] for k, v in joined.items()}
                pending = [{k: v[size:] for k, v in joined.items()}]
                held -= size
        if held:
            yield _concatenate(pending)

    def _encode_nothing(self) -> Rows:
        file = self._groups[0][0]
        with pq.ParquetFile(file) as parquet:
            schema = parquet.schema_arrow
        return self._encoder.encode(
            pa.table({name: pa.array([], type=schema.field(name).type) for name in COLUMNS}), file
        )


def _concatenate(pieces: list[Rows]) -> Rows:
    if len(pieces) == 1:
        return pieces[0]
    return {name: np.concatenate([piece[name] for piece in pieces]) for name in pieces[0]}


def collate(rows: Rows, batch_size: int) -> Batch:
    """Builds a batch of exactly `batch_size` samples, padding with samples of weight 0 and no ids."""
    count = len(rows["label"])
    present = np.zeros(batch_size, dtype=np.int64)
    present[:count] = 1

    def padded(values: np.ndarray, fill: int = 0) -> torch.Tensor:
        full = np.full(batch_size, fill, dtype=values.dtype)
        full[:count] = values
        return torch.from_numpy(full)

    lengths = rows["history_length"]
    inside = np.arange(rows["history"].shape[1]) < lengths[:, None]
    ids = _keyed(
        {
            "user": (rows["user"], present),
            "item": (rows["item"], present),
            "history": (rows["history"][inside], padded(lengths).numpy()),
        }
    )
    knowledge = _keyed(
        {
            level: (found[found >= 0], padded((found >= 0).astype(np.int64)).numpy())
            for level in ("user", "item")
            for found in [rows[f"{level}_knowledge"]]
        }
    )
    return Batch(
        ids=ids,
        knowledge=knowledge,
        scenario=padded(rows["scenario"]),
        scenario_knowledge=padded(rows["scenario_knowledge"], fill=-1),
        label=padded(rows["label"]),
        weight=torch.from_numpy(present.astype(np.float32)),
    )


def _keyed(features: dict[str, tuple[np.ndarray, np.ndarray]]) -> KeyedJaggedTensor:
    return KeyedJaggedTensor(
        keys=list(features),
        values=torch.from_numpy(np.concatenate([values for values, _ in features.values()])),
        lengths=torch.from_numpy(np.concatenate([lengths for _, lengths in features.values()])),
    )
