"""Zero-collision rows: who gets one, who keeps it, who loses it."""

from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import pytest

from embeddings.ids import UNKNOWN_ROW, HashedKeys
from embeddings.zero_collision.key_index import KeyIndex, distinct
from embeddings.zero_collision.policy import ADMISSIONS, EVICTIONS, RowOwners, ZeroCollision


def keys_of(ids: list[int]) -> np.ndarray:
    return HashedKeys(2).lookup(pa.array(ids, type=pa.int64())).view(np.uint64)


def teach(owners: RowOwners, ids: list[int], step: int) -> tuple[np.ndarray, np.ndarray]:
    """Learns one step's ids (repeats allowed); returns their rows and the rows that were given anew."""
    keys, inverse, counts = np.unique(keys_of(ids), return_inverse=True, return_counts=True)
    rows, fresh, _ = owners.assign(keys, counts, step)
    return rows[inverse], fresh


def kept(owners: RowOwners, ids: list[int]) -> list[int]:
    return [i for i in ids if owners.find(keys_of([i]))[0] != UNKNOWN_ROW]


@pytest.mark.parametrize("count", [0, 1, 5000])
def test_distinct_is_numpys_unique(count: int) -> None:
    keys = np.random.default_rng(0).zipf(1.2, count).astype(np.uint64) << np.uint64(50)
    expected = np.unique(keys, return_inverse=True, return_counts=True)
    for found, wanted in zip(distinct(keys), expected, strict=True):
        np.testing.assert_array_equal(found, wanted)


def test_index_agrees_with_a_dict() -> None:
    rng = np.random.default_rng(0)
    keys = rng.integers(0, 2**64, 300, dtype=np.uint64)
    keys[:50] = np.arange(50, dtype=np.uint64) << np.uint64(40)  # all of them want the same cell
    index, known = KeyIndex(keys, np.arange(0)), {}
    for _ in range(40):
        rows = rng.permutation(300)[: rng.integers(0, 300)]
        new = np.array([r for r in rows if r not in known.values()], dtype=np.int64)
        if index.worn(len(new)):
            index = KeyIndex(keys, np.array(list(known.values()), dtype=np.int64))
        index.add(new)
        known |= {int(keys[r]): int(r) for r in new}
        gone = rng.choice(list(known.values()), len(known) // 2, replace=False)
        index.remove(gone)
        known = {k: r for k, r in known.items() if r not in set(gone.tolist())}
        assert index.find(keys).tolist() == [known.get(int(k), -1) for k in keys]


@pytest.mark.parametrize(
    "ids", [range(100_000), range(2**60, 2**60 + 100_000), range(0, 2**62, 2**46)]
)
def test_ids_spread_evenly_over_ranks_whatever_their_range(ids: range) -> None:
    """Consecutive small ones, huge ones, and ones whose lower bits are all zero."""
    owners = RowOwners(ZeroCollision(rows=1 << 20, buckets=64))
    counts = np.bincount(owners.owner(keys_of(list(ids)), 8), minlength=8)
    expected = len(ids) / 8
    assert np.abs(counts - expected).max() < 5 * np.sqrt(expected)


def test_no_two_ids_share_a_row_while_capacity_lasts() -> None:
    owners = RowOwners(ZeroCollision(rows=1 << 14, buckets=4))
    ids = list(range(15_000))
    rows, fresh = teach(owners, ids, 0)
    assert UNKNOWN_ROW not in rows
    assert len(set(rows.tolist())) == 15_000
    assert sorted(fresh) == sorted(rows)
    again, fresh = teach(owners, ids[::-1], 1)
    assert again[::-1].tolist() == rows.tolist()
    assert len(fresh) == 0
    assert owners.occupied() == owners.tally[:, ADMISSIONS].sum() == 15_000
    assert owners.tally[:, EVICTIONS].sum() == 0


def full(eviction: str, **options: object) -> tuple[RowOwners, Iterator[int]]:
    """A table of 8 usable rows that ids 0..7 fill in step 0, and the steps to come."""
    options = {"rows": 9, "buckets": 1, "eviction": eviction} | options
    owners = RowOwners(ZeroCollision(**options))  # type: ignore[arg-type]
    teach(owners, list(range(8)), 0)
    return owners, iter(range(1, 1000))


def test_lfu_takes_the_rarest() -> None:
    owners, steps = full("lfu")
    teach(owners, [0, 1, 2, 3, 4, 5] * 2, next(steps))
    teach(owners, [100, 101], next(steps))
    assert kept(owners, list(range(8))) == [0, 1, 2, 3, 4, 5]
    assert kept(owners, [100, 101]) == [100, 101]


@pytest.mark.parametrize("eviction", ["lfu", "distance_lfu"])
def test_a_flood_of_new_ids_displaces_each_other_and_not_the_frequent(eviction: str) -> None:
    owners = RowOwners(ZeroCollision(rows=1000, buckets=1, eviction=eviction))  # type: ignore[arg-type]
    often = list(range(900))
    for step in range(20):
        teach(owners, often * 5, step)
    for step in range(20, 24):
        teach(owners, list(range(step * 1000, step * 1000 + 1000)), step)
    assert kept(owners, often) == often
    assert owners.tally[:, EVICTIONS].sum() > 100


def test_the_most_frequent_of_the_new_ids_get_the_few_rows() -> None:
    """Two rows can be had: those of 6 and 7, seen twice; the others were seen five times."""
    owners, steps = full("lfu")
    teach(owners, [0, 1, 2, 3, 4, 5] * 4 + [6, 7], next(steps))
    teach(owners, [100, 101, 102, 103, 103, 103, 104, 104, 104], next(steps))
    assert kept(owners, [*range(8), *range(100, 105)]) == [0, 1, 2, 3, 4, 5, 103, 104]


def test_lru_takes_the_one_not_seen_for_longest() -> None:
    owners, steps = full("lru")
    teach(owners, [0, 1] * 50, next(steps))
    teach(owners, [2, 3, 4, 5, 6, 7], next(steps))
    teach(owners, [100, 101], next(steps))
    assert kept(owners, list(range(8))) == [2, 3, 4, 5, 6, 7]


def test_distance_lfu_forgives_distance_where_counts_make_up_for_it() -> None:
    """count / (steps since + 1) at step 10: id 0 has 41 / 10, ids 1 to 5 have 4 / 3, 6 and 7 have 2 / 3."""
    owners, _ = full("distance_lfu")
    teach(owners, [0] * 40, 1)
    teach(owners, [1, 2, 3, 4, 5] * 3 + [6, 7], 8)
    teach(owners, [100, 101], 10)
    assert kept(owners, list(range(8))) == [0, 1, 2, 3, 4, 5]
    # With a high exponent the distance decides: 41 / 1000 against 2 / 27.
    owners, _ = full("distance_lfu", decay=3.0)
    teach(owners, [0] * 40, 1)
    teach(owners, [1, 2, 3, 4, 5] * 3 + [6, 7], 8)
    teach(owners, [100], 10)
    assert kept(owners, list(range(8))) == [1, 2, 3, 4, 5, 6, 7]


def test_ttl_takes_back_only_what_expired() -> None:
    owners, _ = full("ttl", time_to_live=3)
    teach(owners, [0, 1, 100], 2)
    assert kept(owners, [*range(8), 100]) == list(
        range(8)
    )  # full, and nothing has expired: 100 waits
    teach(owners, [100], 4)  # 2..7 were seen 4 steps ago
    assert kept(owners, [*range(8), 100]) == [0, 1, 100]


def test_a_time_to_live_joins_any_other_eviction() -> None:
    owners, _ = full("lfu", time_to_live=3)
    teach(owners, [0] * 100, 1)
    teach(owners, [7], 5)
    assert kept(owners, list(range(8))) == [7]  # not even 0, seen 101 times, but 7, seen just now


@pytest.mark.parametrize("eviction", ["lfu", "lru", "distance_lfu"])
def test_a_step_never_evicts_its_own_ids(eviction: str) -> None:
    owners, _ = full(eviction)
    ids = list(range(12))
    rows, _ = teach(owners, ids, 1)
    assert kept(owners, ids) == list(range(8))
    assert (rows[8:] == UNKNOWN_ROW).all()  # they wait …
    rows, _ = teach(owners, [8, 9, 10, 11], 3)
    assert UNKNOWN_ROW not in rows  # … for the next one


def test_evictions_wait_for_their_interval() -> None:
    owners, _ = full("lru", interval=5)
    for step in (1, 2, 3, 4):
        rows, _ = teach(owners, [100, 101], step)
        assert rows.tolist() == [UNKNOWN_ROW] * 2
    teach(owners, [0, 1, 2, 3], 5)  # makes room for the two that waited, though neither is here
    assert len(kept(owners, list(range(8)))) == 6
    rows, _ = teach(owners, [100, 101], 6)
    assert UNKNOWN_ROW not in rows


def test_admission_by_frequency() -> None:
    owners = RowOwners(ZeroCollision(rows=1000, buckets=2, admission=3))
    assert teach(owners, [1, 2, 2, 3, 3, 3], 0)[0].tolist()[:3] == [UNKNOWN_ROW] * 3
    assert kept(owners, [1, 2, 3]) == [3]
    teach(owners, [1, 2], 1)
    assert kept(owners, [1, 2, 3]) == [2, 3]
    teach(owners, [1], 2)
    assert kept(owners, [1, 2, 3]) == [1, 2, 3]
    assert owners.counts[owners.find(keys_of([1, 2, 3]))].tolist() == [3, 3, 3]


def test_ids_of_one_occurrence_do_not_pile_up_into_an_admission() -> None:
    """50,000 strangers over 1000 rows: without ageing the sketch would let nearly all of them in."""
    owners = RowOwners(ZeroCollision(rows=1000, buckets=2, admission=10))
    for step in range(500):
        teach(owners, list(range(step * 100, step * 100 + 100)), step)
    assert owners.tally[:, ADMISSIONS].sum() < 50


@pytest.mark.slow
@pytest.mark.parametrize("eviction", ["lfu", "lru", "distance_lfu", "ttl"])
@pytest.mark.parametrize("admission", [1, 2])
def test_rows_do_not_depend_on_the_number_of_ranks(eviction: str, admission: int) -> None:
    options = ZeroCollision(
        rows=64,
        buckets=4,
        eviction=eviction,
        admission=admission,
        time_to_live=20,
        interval=3,  # type: ignore[arg-type]
    )
    rng = np.random.default_rng(0)
    worlds = {n: [RowOwners(options, rank, n) for rank in range(n)] for n in (1, 2, 4)}
    for step in range(60):
        keys, counts = np.unique(keys_of(rng.zipf(1.3, 40).tolist()), return_counts=True)
        answers = []
        for ranks in worlds.values():
            found = np.zeros(len(keys), dtype=np.int64)
            given: set[tuple[int, int]] = set()
            for rank, part in enumerate(ranks):
                own = ranks[0].owner(keys, len(ranks)) == rank
                found[own], rows, fresh = part.assign(keys[own], counts[own], step)
                given |= set(zip(rows.tolist(), fresh.tolist(), strict=True))
            answers.append((found.tolist(), given))
        assert answers[0] == answers[1] == answers[2]
    for name, whole in worlds[1][0].state.items():
        for ranks in worlds.values():
            np.testing.assert_array_equal(np.concatenate([r.state[name] for r in ranks]), whole)
    assert worlds[1][0].tally[:, EVICTIONS].sum() > 0


def test_a_restored_table_goes_on_as_if_nothing_had_happened() -> None:
    options = ZeroCollision(rows=64, buckets=4, eviction="lfu", admission=2, interval=2)
    rng = np.random.default_rng(0)
    first, second = RowOwners(options), RowOwners(options)
    before: dict[str, np.ndarray] = {}
    for step in range(40):
        ids = rng.zipf(1.2, 40).tolist()
        rows, _ = teach(first, ids, step)
        if step == 20:
            for name, values in second.state.items():
                values[:] = before[name]
            second.rebuild()
        if step >= 20:
            assert teach(second, ids, step)[0].tolist() == rows.tolist()
        before = {name: values.copy() for name, values in first.state.items()}


def test_strings_are_keys_too() -> None:
    ids = pa.array([f"user-{i}" for i in range(5000)])
    keys = HashedKeys(2).lookup(ids)
    assert keys.dtype == np.int64
    assert len(np.unique(keys)) == 5000
    np.testing.assert_array_equal(HashedKeys(2).lookup(ids.cast(pa.large_string())), keys)
    assert len(HashedKeys(2).lookup(pa.array([], type=pa.string()))) == 0
    with pytest.raises(TypeError, match="double; int64 or string is needed"):
        HashedKeys(2).lookup(pa.array([1.5]))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"rows": 10, "buckets": 4}, "cannot be cut"),
        ({"rows": 8, "buckets": 4, "eviction": "ttl"}, "needs time_to_live"),
        ({"rows": 8, "buckets": 4, "admission": 300}, "admission is 300"),
    ],
)
def test_impossible_options_are_refused(options: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        ZeroCollision(**options)
