"""Raw ids (int64 or string, straight from the log) to rows of a table."""

import hashlib
from pathlib import Path
from typing import Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

UNKNOWN_ROW = 0  # every id that was never seen in training shares this row
ID_TYPES = (pa.int64(), pa.string(), pa.large_string())


class IdMap(Protocol):
    """Maps raw ids to rows; `rows` is the size of the table it needs."""

    rows: int

    def lookup(self, ids: pa.Array | pa.ChunkedArray) -> np.ndarray:
        """Maps ids (int64 or string, no nulls) to table rows (int64, same length)."""
        ...


class SortedKeys:
    """Position of a key in a sorted list of unique keys; the one search behind vocabularies and joins.

    Integers are found by binary search, strings by Arrow's hash kernel.
    """

    def __init__(self, keys: pa.Array) -> None:
        self.keys = keys
        self._numbers = (
            keys.to_numpy(zero_copy_only=False) if pa.types.is_integer(keys.type) else None
        )

    def positions(self, ids: pa.Array | pa.ChunkedArray) -> np.ndarray:
        """Returns int64 positions, -1 where the id is absent.

        Raises:
            TypeError: If ids and keys differ in kind (integer against string).
        """
        if isinstance(ids, pa.ChunkedArray):
            ids = ids.combine_chunks()
        if pa.types.is_integer(ids.type) != (self._numbers is not None):
            raise TypeError(
                f"ids are {ids.type}, the keys they are looked up in are {self.keys.type}"
            )
        if len(self.keys) == 0:
            return np.full(len(ids), -1, dtype=np.int64)
        if self._numbers is None:
            index = pc.index_in(ids, value_set=self.keys.cast(ids.type))
            return pc.fill_null(index.cast(pa.int64()), -1).to_numpy(zero_copy_only=False)
        numbers = ids.to_numpy(zero_copy_only=False)
        position = np.searchsorted(self._numbers, numbers).clip(max=len(self._numbers) - 1)
        return np.where(self._numbers[position] == numbers, position, -1).astype(np.int64)


class Vocabulary:
    """One row per id of the training data, in sorted order after the shared row for unknown ids."""

    def __init__(self, ids: pa.Array) -> None:
        self._keys = SortedKeys(ids)
        self.rows = len(ids) + 1

    @property
    def keys(self) -> pa.Array:
        """The ids of rows 1 and up, sorted."""
        return self._keys.keys

    def lookup(self, ids: pa.Array | pa.ChunkedArray) -> np.ndarray:
        """See `IdMap.lookup`; unknown ids go to `UNKNOWN_ROW`."""
        return self._keys.positions(ids) + 1

    def save(self, path: Path) -> None:
        """Writes the ids as one Parquet column, in row order."""
        pq.write_table(pa.table({"id": self._keys.keys}), path)

    @classmethod
    def load(cls, path: Path) -> "Vocabulary":
        """Reads what `save` wrote.

        Raises:
            ValueError: The ids are not int64 or strings, not sorted, or not unique.
        """
        with pq.ParquetFile(path) as file:
            table = file.read()
        if table.column_names != ["id"] or table["id"].type not in ID_TYPES:
            raise ValueError("is no file of ids: it must have one column 'id', int64 or string")
        ids = table["id"].combine_chunks()
        rising = pc.less(ids.slice(0, max(len(ids) - 1, 0)), ids.slice(min(1, len(ids))))
        if ids.null_count or pc.any(pc.invert(rising)).as_py():
            raise ValueError("its ids are not sorted and unique")
        return cls(ids)


class HashedIds:
    """`rows` rows shared by all ids through a well-mixed hash; collisions are accepted."""

    def __init__(self, rows: int, salt: int = 0) -> None:
        if rows < 2:
            raise ValueError(f"a hashed table needs at least 2 rows, got {rows}")
        self.rows, self._salt = rows, salt

    def lookup(self, ids: pa.Array | pa.ChunkedArray) -> np.ndarray:
        """See `IdMap.lookup`; row 0 stays the row for unknown ids and is never hit by a hash."""
        return (hash_ids(ids, self._salt) % np.uint64(self.rows - 1)).astype(np.int64) + 1


class HashedKeys:
    """Ids as well-mixed 64-bit keys, which a zero-collision table gives rows to while training.

    Integers keep their identity: the mix is a bijection. Strings become the first 64 bits of a BLAKE2b
    digest; among n of them a pair shares a key with a chance of about n² / 2^65.
    """

    def __init__(self, rows: int, salt: int = 0, bits: int = 64) -> None:
        self.rows, self._salt, self._dropped = rows, salt, np.uint64(64 - bits)

    def lookup(self, ids: pa.Array | pa.ChunkedArray) -> np.ndarray:
        """Maps ids (int64 or string, no nulls) to keys (int64, the upper `bits` bits, same length)."""
        return (hash_ids(ids, self._salt) >> self._dropped).view(np.int64)


def hash_ids(ids: pa.Array | pa.ChunkedArray, salt: int = 0) -> np.ndarray:
    """Hashes ids (int64 or string, no nulls) to uint64; every input bit reaches every output bit.

    Raises:
        TypeError: If the ids are neither integers nor strings.
    """
    if isinstance(ids, pa.ChunkedArray):
        ids = ids.combine_chunks()
    if pa.types.is_integer(ids.type):
        return _mix64(ids.to_numpy(zero_copy_only=False).astype(np.int64).view(np.uint64), salt)
    if not (pa.types.is_string(ids.type) or pa.types.is_large_string(ids.type)):
        raise TypeError(f"ids are {ids.type}; int64 or string is needed")
    encoded = ids.dictionary_encode()  # each distinct string is hashed once
    digests = [
        hashlib.blake2b(value.encode(), digest_size=8, salt=salt.to_bytes(8, "little")).digest()
        for value in encoded.dictionary.to_pylist()
    ]
    table = np.frombuffer(b"".join(digests), dtype="<u8")
    return table[encoded.indices.to_numpy(zero_copy_only=False)]


def _mix64(values: np.ndarray, salt: int) -> np.ndarray:
    """Finaliser of SplitMix64 (Steele et al., 2014): every input bit reaches every output bit."""
    mask = (1 << 64) - 1
    with np.errstate(over="ignore"):
        x = values + np.uint64((0x9E3779B97F4A7C15 * (salt + 1)) & mask)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))
