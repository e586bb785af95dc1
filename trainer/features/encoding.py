"""How one feature's raw values become rows of a table, or numbers; no torch."""

import hashlib
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from embeddings.ids import HashedIds, IdMap, Vocabulary, hash_ids
from trainer.features.ragged import Ragged
from trainer.features.resolve import Feature

MISSING = -1  # in the place of a table's row: the sample has no id
OPTIONS = ("ids", "rows", "min_count", "transform", "scale", "buckets")


class UnusableError(ValueError):
    """Values of a column that no encoder takes; its argument is the column."""


@dataclass(frozen=True)
class Encoding:
    """One feature and everything that its values are transformed with.

    Attributes:
        name: Of the feature.
        kind: id, ids, number, cross or sequence.
        columns: Columns of the events that it is made of.
        weights: Column of a list's weights, or None.
        options: What was configured, see `OPTIONS`.
        rows: Rows of the table, 0 for a number without buckets.
        ids_per_sample: Mean number of ids of a sample of the training splits.
        mean: Of a number after its transform, over the training splits: what a missing one counts as.
        deviation: By which a number is divided; 1 without `scale`.
        boundaries: Of buckets, ascending.
        mean_weights: Whether the weights of a sample are divided by the sum of their absolute values.
        vocabulary: Ids of a vocabulary, or None.
        fields: Of a sequence: what each of its columns says.
    """

    name: str
    kind: str
    columns: tuple[str, ...]
    weights: str | None = None
    options: dict[str, Any] = field(default_factory=dict)
    rows: int = 0
    ids_per_sample: float = 1.0
    mean: float = 0.0
    deviation: float = 1.0
    boundaries: tuple[float, ...] = ()
    mean_weights: bool = False
    vocabulary: Vocabulary | None = None
    fields: tuple[str, ...] = ()

    @property
    def table_name(self) -> str:
        """Name of the table, and of the ids in a batch."""
        return f"feature_{self.name}"

    @property
    def is_number(self) -> bool:
        """Whether it enters as a number."""
        return self.kind == "number" and self.rows == 0

    @property
    def has_table(self) -> bool:
        """Whether it has a table of its own; the fields of a sequence read those of items and features."""
        return self.rows > 0

    @property
    def ids(self) -> IdMap:
        """What maps ids to rows."""
        return self.vocabulary or HashedIds(self.rows, salt_of(self.table_name))

    def single(self, table: pa.Table) -> np.ndarray:
        """Rows of the table, int64 [n], `MISSING` where there is no value: kinds id, cross, buckets.

        Raises:
            UnusableError: A number is not finite.
        """
        rows = np.full(len(table), MISSING, dtype=np.int64)
        if self.kind == "number":
            values, missing = read_numbers(table, self.columns[0])
            buckets = np.searchsorted(np.array(self.boundaries), values, side="right") + 1
            return np.where(missing, MISSING, buckets)
        columns = [combined(table, column) for column in self.columns]
        present = ~np.any([column.is_null() for column in columns], axis=0)
        if not present.all():
            columns = [column.filter(pa.array(present)) for column in columns]
        keys = combine_ids(columns) if self.kind == "cross" else columns[0]
        rows[present] = self.ids.lookup(keys)
        return rows

    def ragged(self, table: pa.Table) -> Ragged:
        """Rows of the table of every id of a list; a null list is an empty one.

        Raises:
            UnusableError: A list has a null, or weights do not fit.
        """
        lists = combined(table, self.columns[0])
        lengths = list_lengths(lists)
        flat = lists.flatten()
        if flat.null_count:
            raise UnusableError(self.columns[0])
        weights = None
        if self.weights is not None:
            weights = self._weights(combined(table, self.weights), lengths)
        return Ragged(self.ids.lookup(flat), lengths, weights)

    def _weights(self, lists: pa.Array, lengths: np.ndarray) -> np.ndarray:
        flat = lists.flatten()
        if flat.null_count or not np.array_equal(list_lengths(lists), lengths):
            raise UnusableError(self.weights)
        weights = flat.to_numpy(zero_copy_only=False).astype(np.float32)
        if not np.isfinite(weights).all():
            raise UnusableError(self.weights)
        if not self.mean_weights:
            return weights
        of_row = np.repeat(np.arange(len(lengths)), lengths)
        sums = np.bincount(of_row, np.abs(weights), minlength=len(lengths))[of_row]
        return (weights / np.where(sums > 0, sums, 1.0)).astype(np.float32)

    def numbers(self, table: pa.Table) -> np.ndarray:
        """The number as the model reads it and whether it is missing, float32 [n, 2].

        Raises:
            UnusableError: A number is not finite.
        """
        values, missing = read_numbers(table, self.columns[0])
        values = np.where(missing, self.mean, transformed(values, self.options.get("transform")))
        if self.options.get("scale") == "standard":
            values = (values - self.mean) / self.deviation
        return np.stack([values, missing], axis=1).astype(np.float32)


def options_of(feature: Feature) -> dict[str, Any]:
    """What of a feature's options decides how its values are encoded."""
    chosen = {name: getattr(feature.use, name) for name in OPTIONS}
    if feature.weights is not None:
        chosen["pooling"] = feature.use.pooling
    return {name: value for name, value in chosen.items() if value is not None}


def salt_of(table: str) -> int:
    """Salt of a table's hash, from its name: a table more changes no other's rows."""
    return int.from_bytes(hashlib.blake2b(table.encode(), digest_size=7).digest(), "little")


def combine_ids(columns: list[pa.Array]) -> pa.Array:
    """One 64-bit key per combination of ids (int64 or string, no nulls), int64; the order counts."""
    keys = np.zeros(len(columns[0]), dtype=np.uint64)
    for position, column in enumerate(columns, 1):
        keys = hash_ids(pa.array((keys ^ hash_ids(column, position)).view(np.int64)), position)
    return pa.array(keys.view(np.int64))


def transformed(values: np.ndarray, transform: str | None) -> np.ndarray:
    """Numbers after the configured transform, float64."""
    return np.sign(values) * np.log1p(np.abs(values)) if transform == "log" else values


def read_numbers(table: pa.Table, column: str) -> tuple[np.ndarray, np.ndarray]:
    """Numbers float64 [n], 0 where there is none; where that is, bool [n].

    Raises:
        UnusableError: A number is not finite.
    """
    numbers = combined(table, column)
    missing = numbers.is_null().to_numpy(zero_copy_only=False)
    values = pc.fill_null(numbers, 0.0).to_numpy(zero_copy_only=False).astype(np.float64)
    if not np.isfinite(values).all():
        raise UnusableError(column)
    return values, missing


def list_lengths(lists: pa.Array) -> np.ndarray:
    """Lengths of lists, 0 of a null, int64 [n]."""
    lengths = pc.fill_null(lists.value_lengths(), 0)
    return lengths.to_numpy(zero_copy_only=False).astype(np.int64)


def combined(table: pa.Table, column: str) -> pa.Array:
    """A column as one array."""
    values = table[column].combine_chunks()
    if isinstance(values, pa.ChunkedArray):  # an empty column combines to a chunked array
        return pa.array([], type=values.type)
    return values
