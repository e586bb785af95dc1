"""Rank-aware stream of batches from Parquet: even shares, deterministic shuffle, keyed joins.

Every rank yields the same number of batches of the same size whatever its share, because the number
follows from the row counts in the Parquet footers, which all ranks read: nothing is negotiated while
training and nothing can hang at the end.
"""

import contextlib
import itertools
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import pyarrow as pa
import torch
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from embeddings.ids import IdMap, SortedKeys
from llm_knowledge.errors import InputError
from trainer.data.batch import Batch
from trainer.data.checks import find_problem
from trainer.data.parts import Parts
from trainer.data.prefetch import Feed, in_background

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
    """Point-in-time join: (key, event time) to the row of a vector, -1 where none is eligible.

    A vector is eligible for an event only if every event behind it lies strictly before. Of several
    stores, given oldest first, the newest eligible vector of the key is taken; rows count on from one
    store to the next.
    """

    def __init__(self, *stores: Joinable) -> None:
        # Newest first: row offset, keys, cut-offs, the oldest cut-off.
        self._stores: list[tuple[int, SortedKeys, np.ndarray, int]] = []
        offset = 0
        for store in stores:
            cutoffs = store.cutoffs()
            if len(cutoffs):
                keys = SortedKeys(pa.array(store.keys()))
                self._stores.insert(0, (offset, keys, cutoffs, int(cutoffs.min())))
            offset += len(cutoffs)

    def rows(self, keys: pa.ChunkedArray, timestamps: np.ndarray) -> np.ndarray:
        """Returns rows, int64, same length as `keys`."""
        found = np.full(len(keys), -1, dtype=np.int64)
        for offset, own, cutoffs, oldest in self._stores:
            # What no newer store has answered and this one may.
            asked = np.flatnonzero((found < 0) & (timestamps > oldest))
            if len(asked) == 0:
                continue
            rows = own.positions(keys if len(asked) == len(keys) else keys.take(pa.array(asked)))
            eligible = (rows >= 0) & (timestamps[asked] > cutoffs[rows])
            found[asked[eligible]] = offset + rows[eligible]
        return found


@dataclass(frozen=True)
class RowEncoder:
    """Turns columns of the log into table rows and store rows."""

    users: IdMap
    items: IdMap
    scenarios: SortedKeys
    scenario_order: np.ndarray  # sorted position to position in dataset.json
    history_length: int
    joins: dict[str, KnowledgeJoin]  # level to join; absent levels are never eligible
    extra_labels: tuple[str, ...] = ()  # columns label_NAME

    @property
    def columns(self) -> list[str]:
        """What `encode` reads."""
        return [*COLUMNS, *self.extra_labels]

    def encode(self, table: pa.Table, source: Path) -> Rows:
        """Encodes `columns` of one piece of a file.

        Raises:
            InputError: If a value is null, a label is not 0 or 1, or a scenario of the log is not one
                of the dataset's.
        """
        for column in self.columns:
            if table[column].null_count:
                raise self._problem(source, column, "has a null")
        timestamps = table["timestamp"].to_numpy()
        labels = np.empty((len(table), 1 + len(self.extra_labels)), dtype=np.float32)
        for place, column in enumerate(("label", *self.extra_labels)):
            labels[:, place] = table[column].to_numpy()
            if not np.isin(labels[:, place], (0, 1)).all():
                raise self._problem(source, column, "is not 0 or 1 everywhere")
        position = self.scenarios.positions(table["scenario_id"])
        if len(position) and position.min() < 0:
            value = table["scenario_id"][int(np.argmin(position))].as_py()
            raise self._problem(source, "scenario_id", f"{value!r} is not listed in dataset.json")
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
        if history.flatten().null_count:
            raise self._problem(source, "history", "has a null inside a list")
        lengths = history.value_lengths().to_numpy(zero_copy_only=False).astype(np.int64)
        flat = self.items.lookup(history.flatten())
        return {
            "user": self.users.lookup(table["user_id"]),
            "item": self.items.lookup(table["item_id"]),
            "scenario": self.scenario_order[position],
            "label": labels[:, 0],
            "extra_labels": labels[:, 1:],
            "history": _last_columns(flat, lengths, self.history_length),
            "history_length": np.minimum(lengths, self.history_length),
            **{f"{level}_knowledge": rows for level, rows in joined.items()},
        }

    def _problem(self, source: Path, column: str, text: str) -> InputError:
        """Names the first bad row of the file, or says `text` where the file has none any more."""
        found = find_problem(source, column, self.scenarios.keys.to_pylist())
        return found or InputError(f"{source}: column {column!r} {text}; prepare the data again")


def _last_columns(flat: np.ndarray, lengths: np.ndarray, width: int) -> np.ndarray:
    """Lays out ragged rows as [n, width]: the last `width` values of each, left-aligned, 0 beyond."""
    ends = np.cumsum(lengths)
    kept = np.minimum(lengths, width)
    at = (ends - kept)[:, None] + np.arange(width)
    inside = np.arange(width) < kept[:, None]
    if len(flat) == 0:
        return np.zeros((len(lengths), width), dtype=np.int64)
    return np.where(inside, flat[np.minimum(at, len(flat) - 1)], 0)


@dataclass(frozen=True)
class Share:
    """One stream: rows start..stop of the epoch's order."""

    start: int
    stop: int
    place: float  # of the stream among all, in (0, 1]

    def chunks(self, size: int, piece: int) -> list[int]:
        """Bounds of the chunks that are shuffled as one; all but the last fill whole pieces.

        A stream that needs several begins with a part of one, other streams with other parts: they
        are not all in need of rows at the same step.
        """
        if self.stop - self.start <= size:
            return [self.start, self.stop]
        first = max(int(size * self.place) // piece, 1) * piece
        return [self.start, *range(self.start + first, self.stop, size), self.stop]


class EventStream:
    """The events of some splits, dealt to ranks as batches.

    An epoch's order is cut into `streams` contiguous streams of even length. A global batch takes as
    many rows from each stream, and a rank serves streams / ranks of them: what a global batch holds
    does not depend on the number of ranks, so a run continued on another number of ranks trains every
    row exactly once, and one rank sees the losses of many. Nor does it depend on the threads.

    Args:
        files: Parquet files of the splits.
        encoder: Maps columns to rows.
        global_batch_size: Samples per step over all ranks; a multiple of `streams`.
        rank: This rank.
        world_size: Number of ranks.
        streams: A multiple of the number of ranks; None for one each.
        shuffle_buffer: Rows of a stream that are shuffled together; 0 keeps the order of the files.
        seed: Of the shuffle.
        workers: Threads that read and encode, each for its share of the streams; 0 reads where the
            batches are used.
        prefetch: Batches that are made ahead by the threads.
        device: Where batches go; for CUDA they are put into page-locked memory.

    Raises:
        InputError: If batch size, streams and ranks do not divide each other, or a file is unreadable.
    """

    def __init__(
        self,
        files: list[Path],
        encoder: RowEncoder,
        global_batch_size: int,
        rank: int,
        world_size: int,
        streams: int | None = None,
        shuffle_buffer: int = 0,
        seed: int = 0,
        workers: int = 0,
        prefetch: int = 1,
        device: torch.device | None = None,
    ) -> None:
        streams = streams or world_size
        check_shares(global_batch_size, streams, world_size)
        self._encoder, self._seed, self._shuffle = encoder, seed, shuffle_buffer > 0
        self._workers, self._prefetch = workers, prefetch
        self._pin = device if device is not None and device.type == "cuda" else None
        self.batch_size, self._piece = global_batch_size // world_size, global_batch_size // streams
        own = streams // world_size
        self._buffer = max(shuffle_buffer // self._piece, 1) * self._piece
        self._parts = Parts(files)
        self.total_rows = self._parts.total_rows
        bounds = [self.total_rows * stream // streams for stream in range(streams + 1)]
        self._streams = [
            Share(bounds[number], bounds[number + 1], (number + 1) / streams)
            for number in range(rank * own, (rank + 1) * own)
        ]
        self.start, self.stop = self._streams[0].start, self._streams[-1].stop
        largest = max(high - low for low, high in itertools.pairwise(bounds))
        self.steps = -(-largest // self._piece)
        self._nothing = self._encode_nothing()

    def tables(self, columns: list[str]) -> Iterator[tuple[pa.Table, Path]]:
        """Reads this rank's rows piece by piece, in the order of the files."""
        return self._parts.read(columns, np.arange(len(self._parts)), self.start, self.stop)

    def batches(self, epoch: int = 0, skip: int = 0) -> Generator[Batch, None, None]:
        """Yields exactly `steps - skip` batches of one epoch; see `feed`."""
        return self._ahead(epoch * self.steps + skip, (epoch + 1) * self.steps)

    def feed(self, start: int, stop: int) -> Feed[Batch]:
        """Batches of steps start..stop, counted over all epochs.

        The number of the step is the whole position: it says which rows were trained on, whatever the
        number of ranks, threads and batches made ahead. To begin in the middle costs next to nothing.
        The epoch chooses the shuffle.
        """
        return Feed(self._ahead(start, stop), stop - start, self._empty)

    def _ahead(self, start: int, stop: int) -> Generator[Batch, None, None]:
        batches = self._collated(start, stop)
        return in_background(batches, self._prefetch) if self._workers else batches

    def _collated(self, start: int, stop: int) -> Generator[Batch, None, None]:
        if self._pin is not None and self._workers:
            torch.cuda.set_device(self._pin)  # a thread begins on the first GPU of the host
        streams = [self._pieces(share, start, stop) for share in self._streams]
        with contextlib.ExitStack() as threads:
            dealt: list[Iterator[tuple[Rows, ...]]] = [zip(*streams, strict=True)]
            if count := min(self._workers, len(streams)) if self._workers > 1 else 0:
                dealt = [
                    threads.enter_context(
                        contextlib.closing(
                            in_background(zip(*streams[n::count], strict=True), self._prefetch)
                        )
                    )
                    for n in range(count)
                ]
            for found in zip(*dealt, strict=True):
                pieces = [found[n % len(found)][n // len(found)] for n in range(len(streams))]
                batch = collate(_concatenate(pieces), self.batch_size)
                yield batch if self._pin is None else batch.pin_memory()

    def _empty(self) -> Batch:
        return collate(self._nothing, self.batch_size)

    def _pieces(self, share: Share, start: int, stop: int) -> Iterator[Rows]:
        """Yields one stream's rows of each step; none where the stream has ended before the others."""
        for epoch in range(start // self.steps, -(-stop // self.steps)):
            first, last = start - epoch * self.steps, min(stop - epoch * self.steps, self.steps)
            made = max(first, 0)
            for piece in itertools.islice(self._epoch(share, epoch, made), last - made):
                made += 1
                yield piece
            yield from itertools.repeat(self._nothing, last - made)

    def _epoch(self, share: Share, epoch: int, skip: int) -> Iterator[Rows]:
        """Yields one stream's pieces of an epoch but the first `skip` ones; their chunks are not read."""
        generator = np.random.default_rng([self._seed, epoch, share.start])
        bounds = share.chunks(self._buffer, self._piece)
        chunks: Iterator[Rows] | None = None
        made = 0
        for number, (low, high) in enumerate(itertools.pairwise(bounds)):
            chosen = generator.permutation(high - low) if self._shuffle else np.arange(high - low)
            pieces = -(-len(chosen) // self._piece)
            if made + pieces > skip:
                chunks = chunks or self._chunks(epoch, bounds[number:])
                rows = next(chunks)
                for at in range(max(skip - made, 0), pieces):
                    own = chosen[at * self._piece : (at + 1) * self._piece]
                    yield {name: values[own] for name, values in rows.items()}
                del rows  # not held while the next chunk is made
            made += pieces

    def _chunks(self, epoch: int, bounds: list[int]) -> Iterator[Rows]:
        """Yields the encoded rows between every two neighbours of `bounds`, in the epoch's order."""
        order = np.arange(len(self._parts))
        if self._shuffle:
            order = np.random.default_rng([self._seed, epoch]).permutation(order)
        source = self._parts.read(self._encoder.columns, order, bounds[0], bounds[-1])
        pending: list[Rows] = []
        held = 0
        for low, high in itertools.pairwise(bounds):
            size = high - low
            while held < size:
                table, file = next(source)
                pending.append(self._encoder.encode(table, file))
                held += len(table)
            joined = _concatenate(pending)
            held -= size
            rest = {name: values[size:] for name, values in joined.items()}
            if held < size:  # a view would keep the whole chunk
                rest = {name: values.copy() for name, values in rest.items()}
            pending, joined = [rest], {name: values[:size] for name, values in joined.items()}
            yield joined

    def _encode_nothing(self) -> Rows:
        schema = self._parts.schema
        columns = {
            name: pa.array([], type=schema.field(name).type) for name in self._encoder.columns
        }
        return self._encoder.encode(pa.table(columns), Path())


def check_shares(global_batch_size: int, streams: int, world_size: int) -> None:
    """Checks that ranks, streams and the global batch divide each other.

    Raises:
        InputError: If not.
    """
    if streams % world_size:
        raise InputError(
            f"data.streams: {streams} streams cannot be served by {world_size} ranks; use a number of "
            "ranks that divides it, or set data.streams to a multiple for a new run"
        )
    if global_batch_size % streams:
        raise InputError(
            f"train.global_batch_size: {global_batch_size} cannot be split over {streams} streams "
            f"(data.streams); choose a multiple of {streams}"
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
        full = np.full((batch_size, *values.shape[1:]), fill, dtype=values.dtype)
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
        extra_labels=padded(rows["extra_labels"]),
    )


def _keyed(features: dict[str, tuple[np.ndarray, np.ndarray]]) -> KeyedJaggedTensor:
    return KeyedJaggedTensor(
        keys=list(features),
        values=torch.from_numpy(np.concatenate([values for values, _ in features.values()])),
        lengths=torch.from_numpy(np.concatenate([lengths for _, lengths in features.values()])),
    )
