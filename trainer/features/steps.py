"""The steps of sequences: columns of lists to rows of the tables that their fields read; no torch."""

from collections.abc import Mapping

import numpy as np
import pyarrow as pa

from embeddings.ids import UNKNOWN_ROW, IdMap
from trainer.features.encoding import Encoding, UnusableError, combined, list_lengths
from trainer.features.ragged import Ragged

ITEM, GAP = "item", "gap"  # fields that are no features
# Gaps of 2^(k-1) to 2^k - 1 seconds share row k + 1, up to 136 years; row 0, of unknown ids, is never met.
LARGEST_POWER = 32
GAP_ROWS = LARGEST_POWER + 2


def gap_rows(seconds: np.ndarray) -> np.ndarray:
    """Row of the gaps' table of each gap, int64 [n]: its base-2 logarithm, rounded down, from row 2 on."""
    return np.minimum(np.frexp(seconds.astype(np.float64))[1], LARGEST_POWER).astype(np.int64) + 1


def encode_steps(
    encoding: Encoding, table: pa.Table, items: IdMap | None, features: Mapping[str, Encoding]
) -> dict[str, Ragged]:
    """Encodes a sequence.

    Args:
        encoding: Of the sequence.
        table: n rows with its columns; a null list is an empty one.
        items: Of the item table, for the field item.
        features: Encodings by name, of the features that are fields.

    Returns:
        Each column to its steps' rows. Those of a feature have weights: 0 where the step has no value,
        whose row is then that of unknown ids.

    Raises:
        UnusableError: A step without item or gap, a gap below 0, fields of unlike lengths in a row.
    """
    encoded: dict[str, Ragged] = {}
    for field, column in zip(encoding.fields, encoding.columns, strict=True):
        lists = combined(table, column)
        lengths, flat = list_lengths(lists), lists.flatten()
        if encoded and not np.array_equal(lengths, next(iter(encoded.values())).lengths):
            raise UnusableError(column)
        if field in (ITEM, GAP):
            if flat.null_count:
                raise UnusableError(column)
            encoded[column] = Ragged(_rows(field, flat, items, column), lengths)
            continue
        present = flat.is_valid().to_numpy(zero_copy_only=False)
        rows = np.full(len(flat), UNKNOWN_ROW, dtype=np.int64)
        rows[present] = features[field].ids.lookup(flat.drop_null())
        encoded[column] = Ragged(rows, lengths, present.astype(np.float32))
    return encoded


def _rows(field: str, flat: pa.Array, items: IdMap | None, column: str) -> np.ndarray:
    if field == ITEM:
        if items is None:
            raise ValueError(f"column {column!r} holds items: give the ids of the item table")
        return items.lookup(flat)
    seconds = flat.to_numpy(zero_copy_only=False)
    if len(seconds) and seconds.min() < 0:
        raise UnusableError(column)
    return gap_rows(seconds)
