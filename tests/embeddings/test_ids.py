"""Raw ids to table rows."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from embeddings.ids import UNKNOWN_ROW, HashedIds, SortedKeys, Vocabulary


@pytest.mark.parametrize("ids", [[3, 10, 2**62], ["a", "b", "ö"]])
def test_vocabulary_round_trip(ids: list, tmp_path: Path) -> None:
    Vocabulary(pa.array(ids)).save(tmp_path / "ids.parquet")
    vocabulary = Vocabulary.load(tmp_path / "ids.parquet")
    absent = 4 if isinstance(ids[0], int) else "zz"
    assert vocabulary.rows == 4
    found = vocabulary.lookup(pa.array([ids[2], absent, ids[0]]))
    assert found.tolist() == [3, UNKNOWN_ROW, 1]
    assert vocabulary.lookup(pa.array([], type=pa.array(ids).type)).tolist() == []


def test_keys_of_another_type_are_refused() -> None:
    with pytest.raises(TypeError, match="string"):
        SortedKeys(pa.array([1, 2])).positions(pa.array(["1"]))


def test_keys_of_an_empty_store_match_nothing() -> None:
    assert SortedKeys(pa.array([], type=pa.int64())).positions(pa.array([5])).tolist() == [-1]


@pytest.mark.parametrize("make", [int, str])
def test_hashed_ids_spread_evenly_and_repeat(make: type) -> None:
    ids = pa.array([make(i) for i in range(20_000)])
    hashed = HashedIds(1_001)
    rows = hashed.lookup(ids)
    assert rows.min() >= 1
    assert rows.max() <= 1_000
    np.testing.assert_array_equal(rows, hashed.lookup(ids))
    counts = np.bincount(rows, minlength=1_001)[1:]
    # 20 per row expected: a chi-square statistic of 1000 cells stays within 1000 +- 5 * sqrt(2000).
    assert abs(((counts - 20) ** 2 / 20).sum() - 1000) < 5 * np.sqrt(2000)
    other = HashedIds(1_001, salt=1).lookup(ids)
    assert (rows == other).mean() < 0.01


def test_a_hashed_table_needs_rows() -> None:
    with pytest.raises(ValueError, match="at least 2"):
        HashedIds(1)
