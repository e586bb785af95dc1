"""Rows of different lengths as flat arrays, sliced, taken and joined like an array of rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Ragged:
    """n rows of values, one after the other.

    Attributes:
        values: int64 [sum of lengths].
        lengths: int64 [n].
        weights: float32, one per value, or None.
    """

    values: np.ndarray
    lengths: np.ndarray
    weights: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        weights = 0 if self.weights is None else self.weights.nbytes
        return self.values.nbytes + self.lengths.nbytes + weights

    def __getitem__(self, rows: slice | np.ndarray) -> Ragged:
        """The rows of a slice without a step (views), or at positions int64."""
        if isinstance(rows, slice):
            start, stop, _ = rows.indices(len(self.lengths))
            first = int(self.lengths[:start].sum())
            chosen = slice(first, first + int(self.lengths[start:stop].sum()))
            weights = None if self.weights is None else self.weights[chosen]
            return Ragged(self.values[chosen], self.lengths[start:stop], weights)
        lengths = self.lengths[rows]
        starts = (np.cumsum(self.lengths) - self.lengths)[rows]
        before = np.cumsum(lengths) - lengths
        positions = np.repeat(starts - before, lengths) + np.arange(int(lengths.sum()))
        weights = None if self.weights is None else self.weights[positions]
        return Ragged(self.values[positions], lengths, weights)

    def copy(self) -> Ragged:
        """The same in arrays of its own."""
        weights = None if self.weights is None else self.weights.copy()
        return Ragged(self.values.copy(), self.lengths.copy(), weights)

    @staticmethod
    def concatenate(pieces: Sequence[Ragged]) -> Ragged:
        """All rows, in order."""
        weights = [piece.weights for piece in pieces if piece.weights is not None]
        return Ragged(
            np.concatenate([piece.values for piece in pieces]),
            np.concatenate([piece.lengths for piece in pieces]),
            np.concatenate(weights) if weights else None,
        )
