"""Raw ids to table rows."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
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


@pytest.mark.parametrize(
    ("table", "words"),
    [
        ({"id": pa.array([1, 3, 2])}, "not sorted and unique"),
        ({"id": pa.array([1, 2, 2])}, "not sorted and unique"),
        ({"id": pa.array([1, None, 3])}, "not sorted and unique"),
        ({"id": pa.array(["b", "a"])}, "not sorted and unique"),
        ({"id": pa.array([1.0, 2.0])}, "no file of ids"),
        ({"key": pa.array([1, 2])}, "no file of ids"),
        ({"id": pa.array([1, 2]), "more": pa.array([1, 2])}, "no file of ids"),
    ],
)
def test_a_vocabulary_that_was_edited_is_refused(tmp_path: Path, table: dict, words: str) -> None:
    pq.write_table(pa.table(table), tmp_path / "ids.parquet")
    with pytest.raises(ValueError, match=words):
        Vocabulary.load(tmp_path / "ids.parquet")


@pytest.mark.parametrize("ids", [[], [7], [-(2**63), 0, 2**63 - 1], ["", "a", "é", "日本"]])
def test_a_vocabulary_comes_back_as_it_was(tmp_path: Path, ids: list) -> None:
    array = pa.array(ids, pa.string() if ids and isinstance(ids[0], str) else pa.int64())
    Vocabulary(array).save(tmp_path / "ids.parquet")
    assert Vocabulary.load(tmp_path / "ids.parquet").keys.to_pylist() == ids
