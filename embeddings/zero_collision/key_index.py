"""Where a key's row is: open addressing over arrays, a batch of keys at a time."""

import numpy as np
import pyarrow as pa

EMPTY, REMOVED = -1, -2


def distinct(keys: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What `np.unique` gives of uint64 keys: sorted distinct ones, positions in them, occurrences.

    Repeats are found by Arrow's hash kernel and only distinct keys are sorted, which is several times
    faster where ids repeat.
    """
    encoded = pa.array(keys).dictionary_encode()
    values = encoded.dictionary.to_numpy()
    codes = encoded.indices.to_numpy()
    order = np.argsort(values)
    rank = np.empty(len(order), dtype=np.int64)
    rank[order] = np.arange(len(order))
    return values[order], rank[codes], np.bincount(codes, minlength=len(values))[order]


class KeyIndex:
    """Finds the row of a 64-bit key among rows whose keys lie in an array.

    Linear probing over a power of two of cells, at most half of them in use, so a batch is answered by
    a few passes over arrays that shrink. A cell holds a row, not a key: 8 to 16 bytes per row in all.

    Args:
        keys: The key of every row, uint64 [rows]; read, never written.
        rows: The rows that hold a key, int64.
    """

    def __init__(self, keys: np.ndarray, rows: np.ndarray) -> None:
        self._keys = keys
        size = 1 << max(2 * len(keys) - 1, 1).bit_length()
        kind = np.int32 if len(keys) < 2**31 else np.int64
        self._cells = np.full(size, EMPTY, dtype=kind)
        self._mask = np.uint64(size - 1)
        self._used = 0  # cells that are not empty: what makes searches long
        self.add(rows)

    def find(self, keys: np.ndarray) -> np.ndarray:
        """Returns rows, int64, -1 where a key has none. Keys uint64, repeats allowed."""
        return self._search(keys)[0]

    def add(self, rows: np.ndarray) -> None:
        """Makes rows known whose keys are not yet in the index; keys must be distinct."""
        self._used += len(rows)
        cells = self._keys[rows] & self._mask
        left = np.arange(len(rows))
        while len(left):
            cell = cells[left]
            free = self._cells[cell] < 0
            # Of several rows that claim a cell the last writer wins, the others go on to the next.
            self._cells[cell[free]] = rows[left[free]]
            placed = free & (self._cells[cell] == rows[left])
            left = left[~placed]
            cells[left] = (cells[left] + np.uint64(1)) & self._mask

    def remove(self, rows: np.ndarray) -> None:
        """Forgets rows; their keys must still lie in the array."""
        self._cells[self._search(self._keys[rows])[1]] = REMOVED

    def worn(self, coming: int) -> bool:
        """Whether removed rows have left too few empty cells for `coming` more; make a new one then."""
        return self._used + coming > 0.7 * len(self._cells)

    def _search(self, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns rows and cells of keys; -1 and the empty cell where there is none."""
        rows_found = np.full(len(keys), -1, dtype=np.int64)
        cells = keys & self._mask
        left = np.arange(len(keys))
        while len(left):
            rows = self._cells[cells[left]].astype(np.int64)
            hit = (rows >= 0) & (self._keys[rows] == keys[left])
            rows_found[left[hit]] = rows[hit]
            left = left[~hit & (rows != EMPTY)]
            cells[left] = (cells[left] + np.uint64(1)) & self._mask
        return rows_found, cells
