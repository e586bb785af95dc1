"""Rank-aware stream of batches from Parquet: even shares, deterministic shuffle.

Every rank yields the same number of batches of the same size whatever its share, because the number
follows from the row counts in the Parquet footers, which all ranks read: nothing is negotiated while
training and nothing can hang at the end.
"""

import contextlib
import itertools
import math
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch

from llm_knowledge.errors import InputError
from trainer.data.loading.batch import Batch
from trainer.data.loading.prefetch import BatchFeed, in_background
from trainer.data.loading.row_encoder import RowEncoder, Rows
from trainer.data.loading.row_groups import RowGroups
from trainer.features.ragged import Ragged

KEPT_BYTES = 64 * 2**20  # of encoded rows: splits that are smaller are read and encoded once


@dataclass(frozen=True)
class StreamRange:
    """One stream: rows start..stop of the epoch's order."""

    start: int
    stop: int
    position: float  # of the stream among all, in (0, 1]

    def chunks(self, size: int, piece: int) -> list[int]:
        """Bounds of the chunks that are shuffled as one; all but the last fill whole pieces.

        A stream that needs several begins with a part of one, other streams with other parts: they
        are not all in need of rows at the same step.
        """
        if self.stop - self.start <= size:
            return [self.start, self.stop]
        first = max(int(size * self.position) // piece, 1) * piece
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
        streams_here = streams // world_size
        self._buffer = max(shuffle_buffer // self._piece, 1) * self._piece
        self._groups = RowGroups(files)
        self.total_rows = self._groups.total_rows
        self._kept: dict[int, Rows] = {}  # by row group
        bounds = [self.total_rows * stream // streams for stream in range(streams + 1)]
        self._streams = [
            StreamRange(bounds[number], bounds[number + 1], (number + 1) / streams)
            for number in range(rank * streams_here, (rank + 1) * streams_here)
        ]
        self.start, self.stop = self._streams[0].start, self._streams[-1].stop
        largest = max(high - low for low, high in itertools.pairwise(bounds))
        self.steps = -(-largest // self._piece)
        self._nothing = self._encode_nothing()
        row_bytes = sum(
            values.itemsize * math.prod(values.shape[1:])
            for values in self._nothing.values()
            if isinstance(values, np.ndarray)
        )
        self._keeps = self.total_rows * row_bytes <= KEPT_BYTES
        self._ragged_bytes = 0  # of the rows that are kept; known only once they are encoded

    def tables(self, columns: list[str]) -> Iterator[tuple[pa.Table, Path]]:
        """Reads this rank's rows piece by piece, in the order of the files."""
        for group, low, high in self._groups.pieces(
            np.arange(len(self._groups)), self.start, self.stop
        ):
            table, file = self._groups.read(columns, group)
            yield table.slice(low, high - low), file

    def batches(self, epoch: int = 0, skip: int = 0) -> Generator[Batch, None, None]:
        """Yields exactly `steps - skip` batches of one epoch; see `feed`."""
        return self._ahead(epoch * self.steps + skip, (epoch + 1) * self.steps)

    def feed(self, start: int, stop: int) -> BatchFeed[Batch]:
        """Batches of steps start..stop, counted over all epochs.

        The number of the step is the whole position: it says which rows were trained on, whatever the
        number of ranks, threads and batches made ahead. To begin in the middle costs next to nothing.
        The epoch chooses the shuffle.
        """
        return BatchFeed(self._ahead(start, stop), stop - start, self._empty)

    def _ahead(self, start: int, stop: int) -> Generator[Batch, None, None]:
        batches = self._collated(start, stop)
        return in_background(batches, self._prefetch) if self._workers else batches

    def _collated(self, start: int, stop: int) -> Generator[Batch, None, None]:
        if self._pin is not None and self._workers:
            torch.cuda.set_device(self._pin)  # a thread begins on the first GPU of the host
        streams = [self._pieces(stream, start, stop) for stream in self._streams]
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
            for rows_of_streams in zip(*dealt, strict=True):
                pieces = [
                    rows_of_streams[n % len(rows_of_streams)][n // len(rows_of_streams)]
                    for n in range(len(streams))
                ]
                batch = self._encoder.collate(_concatenate(pieces), self.batch_size)
                yield batch if self._pin is None else batch.pin_memory()

    def _empty(self) -> Batch:
        return self._encoder.collate(self._nothing, self.batch_size)

    def _pieces(self, stream: StreamRange, start: int, stop: int) -> Iterator[Rows]:
        """Yields one stream's rows of each step; none where the stream has ended before the others."""
        for epoch in range(start // self.steps, -(-stop // self.steps)):
            first, last = start - epoch * self.steps, min(stop - epoch * self.steps, self.steps)
            made = max(first, 0)
            for piece in itertools.islice(self._epoch(stream, epoch, made), last - made):
                made += 1
                yield piece
            yield from itertools.repeat(self._nothing, last - made)

    def _epoch(self, stream: StreamRange, epoch: int, skip: int) -> Iterator[Rows]:
        """Yields one stream's pieces of an epoch but the first `skip` ones; their chunks are not read."""
        generator = np.random.default_rng([self._seed, epoch, stream.start])
        bounds = stream.chunks(self._buffer, self._piece)
        chunks: Iterator[Rows] | None = None
        made = 0
        for number, (low, high) in enumerate(itertools.pairwise(bounds)):
            chosen = generator.permutation(high - low) if self._shuffle else np.arange(high - low)
            pieces = -(-len(chosen) // self._piece)
            if made + pieces > skip:
                chunks = chunks or self._chunks(epoch, bounds[number:])
                rows = next(chunks)
                for piece in range(max(skip - made, 0), pieces):
                    rows_here = chosen[piece * self._piece : (piece + 1) * self._piece]
                    yield {name: values[rows_here] for name, values in rows.items()}
                del rows  # not held while the next chunk is made
            made += pieces

    def _chunks(self, epoch: int, bounds: list[int]) -> Iterator[Rows]:
        """Yields the encoded rows between every two neighbours of `bounds`, in the epoch's order."""
        order = np.arange(len(self._groups))
        if self._shuffle:
            order = np.random.default_rng([self._seed, epoch]).permutation(order)
        source = self._groups.pieces(order, bounds[0], bounds[-1])
        pending: list[Rows] = []
        held = 0
        for low, high in itertools.pairwise(bounds):
            size = high - low
            while held < size:
                pending.append(self._encoded(*next(source)))
                held += len(pending[-1]["label"])
            joined = _concatenate(pending)
            held -= size
            rest = {name: values[size:] for name, values in joined.items()}
            if held < size:  # a view would keep the whole chunk
                rest = {name: values.copy() for name, values in rest.items()}
            pending, joined = [rest], {name: values[:size] for name, values in joined.items()}
            yield joined

    def _encoded(self, group: int, low: int, high: int) -> Rows:
        """Rows low..high of a row group, encoded.

        Where all rows of the split fit into `KEPT_BYTES`, the whole group is kept for the next epoch or
        the next evaluation: to read and encode it again would cost a tenth of a small model's step.
        """
        whole = self._kept.get(group)
        if whole is not None:
            self._groups.check(group)  # a file that was changed is refused all the same
        else:
            table, file = self._groups.read(self._encoder.columns, group)
            if not self._keeps:
                return self._encoder.encode(table.slice(low, high - low), file)
            whole = self._kept[group] = self._encoder.encode(table, file)
            ragged = [values for values in whole.values() if isinstance(values, Ragged)]
            self._ragged_bytes += sum(values.nbytes for values in ragged)
            if self._ragged_bytes > KEPT_BYTES:
                self._keeps, self._kept = False, {}
        return {name: values[low:high] for name, values in whole.items()}

    def _encode_nothing(self) -> Rows:
        schema = self._groups.schema
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
    return {name: _join([piece[name] for piece in pieces]) for name in pieces[0]}


def _join(pieces: list[np.ndarray | Ragged]) -> np.ndarray | Ragged:
    ragged = [piece for piece in pieces if isinstance(piece, Ragged)]
    if ragged:
        return Ragged.concatenate(ragged)
    return np.concatenate([piece for piece in pieces if isinstance(piece, np.ndarray)])
