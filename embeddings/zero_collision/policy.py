"""Rows of a table given to ids one by one: admission, eviction, no two ids in one row.

The rows are cut into buckets and a key belongs to one of them by its upper bits. A bucket decides by
itself and in the order of steps, so who owns which row does not depend on the number of ranks: ranks
merely hold more or fewer buckets, and a checkpoint is re-routed by moving whole buckets.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from embeddings.ids import UNKNOWN_ROW
from embeddings.zero_collision.key_index import KeyIndex

Eviction = Literal["lfu", "lru", "distance_lfu", "ttl"]
FREE = -1  # `last` of a row that no id owns
NEVER_FREE = np.iinfo(np.int64).max  # `last` of the row for unknown ids
SKETCH_CELLS = 4  # counters per row and hash of the sketch that counts ids without a row
SKETCH_AGE = 8  # the sketch is halved after this many counted occurrences per counter
SKETCH_MAX = 255
ADMISSIONS, EVICTIONS, WAITING, COUNTED = range(4)  # columns of `tally`


@dataclass(frozen=True)
class ZeroCollision:
    """How a table gives its rows to ids.

    Attributes:
        rows: Rows of the table, a multiple of `buckets`; row 0 is shared by all ids without a row.
        buckets: Parts that decide by themselves; a multiple of every number of ranks to come.
        eviction: Which rows are taken back when a bucket is full. lfu: the least often seen; lru: those
            not seen for longest; distance_lfu: lowest count / (steps since seen + 1) ^ decay; ttl: none,
            rows come back by `time_to_live` alone.
        admission: Occurrences, while training, before an id gets a row.
        time_to_live: Steps after which an unseen id loses its row; None for never.
        interval: Steps between evictions; ids that find no free row until then stay in row 0.
        decay: Exponent of distance_lfu.
    """

    rows: int
    buckets: int
    eviction: Eviction = "lru"
    admission: int = 1
    time_to_live: int | None = None
    interval: int = 1
    decay: float = 1.0

    def __post_init__(self) -> None:
        if self.rows % self.buckets or self.rows < 2 * self.buckets:
            raise ValueError(
                f"{self.rows} rows cannot be cut into {self.buckets} buckets of at least 2 rows"
            )
        if not 1 <= self.admission <= SKETCH_MAX:
            raise ValueError(f"admission is {self.admission}; it must lie in 1..{SKETCH_MAX}")
        if self.eviction == "ttl" and self.time_to_live is None:
            raise ValueError("eviction = ttl needs time_to_live")


class RowOwners:
    """One rank's part of a table's owners: `buckets // world_size` buckets.

    State, all of it in checkpoints: per row `keys` uint64, `counts` int64, `last` int64 (the step in
    which its id was seen; `FREE` without one); per bucket `tally` int64 [buckets, 4] (admissions,
    evictions, ids waiting for a row, occurrences in the sketch), `sketch` uint8 (occurrences of ids
    without a row, where admission or eviction asks for them) and `waiting` uint8 (which ids wait).
    """

    def __init__(self, options: ZeroCollision, rank: int = 0, world_size: int = 1) -> None:
        if options.buckets % world_size:
            raise ValueError(f"{options.buckets} buckets cannot be spread over {world_size} ranks")
        self.options = options
        self.buckets = options.buckets // world_size
        self._first = rank * self.buckets
        self._width = options.rows // options.buckets  # rows of a bucket
        self.start = self._first * self._width  # the first row of this rank
        rows = self.buckets * self._width
        self.keys = np.zeros(rows, dtype=np.uint64)
        self.counts = np.zeros(rows, dtype=np.int64)
        self.last = np.full(rows, FREE, dtype=np.int64)
        if rank == 0:
            self.last[UNKNOWN_ROW] = NEVER_FREE
        self.tally = np.zeros((self.buckets, 4), dtype=np.int64)
        self.waiting = np.zeros((self.buckets, self._width), dtype=np.uint8)
        sketched = options.admission > 1 or options.eviction in ("lfu", "distance_lfu")
        cells = SKETCH_CELLS * self._width if sketched else 0
        self.sketch = np.zeros((self.buckets, 2 * cells), dtype=np.uint8)
        self.rebuild()

    @property
    def state(self) -> dict[str, np.ndarray]:
        """The arrays a checkpoint holds, by name; the first dimension follows the buckets."""
        state: dict[str, np.ndarray] = {"keys": self.keys, "counts": self.counts, "last": self.last}
        state |= {"tally": self.tally, "waiting": self.waiting}
        return state | ({"sketch": self.sketch} if self.sketch.size else {})

    def rebuild(self) -> None:
        """Derives the index and the free rows from the state; call after changing it."""
        self._index = KeyIndex(self.keys, self._owned())
        self._find_free()

    def occupied(self) -> int:
        """Number of rows that an id owns."""
        return len(self._owned())

    def find(self, keys: np.ndarray) -> np.ndarray:
        """Maps keys (uint64) to rows of the table (int64), `UNKNOWN_ROW` for those without one."""
        rows = self._index.find(keys)
        return np.where(rows < 0, UNKNOWN_ROW, rows + self.start)

    def assign(
        self, keys: np.ndarray, counts: np.ndarray, step: int
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Counts one step's ids, evicts if it is time, gives rows to new ids.

        Args:
            keys: The step's distinct keys over all ranks, uint64, sorted.
            counts: How often each occurred.
            step: Number of this step, growing.

        Returns:
            The rows of the keys (int64, `UNKNOWN_ROW` without one), and the rows that have a new owner
            with the owner's key (int64, uint64): they start anew before this step's lookup.
        """
        rows = self._index.find(keys)
        known = rows[rows >= 0]
        self.counts[known] += counts[rows >= 0]
        self.last[known] = step
        new = np.flatnonzero(rows < 0)  # positions in `keys`
        seen = self._count_unassigned(keys[new], counts[new])
        admitted = seen >= self.options.admission
        new, seen = new[admitted], seen[admitted]
        bucket = self._bucket(keys[new])
        best = np.lexsort((-seen, bucket))  # where rows are few, they go to the most frequent
        new, seen, bucket = new[best], seen[best], bucket[best]
        if step % self.options.interval == 0:
            self._evict(bucket, seen, step)
        # The n-th id of a bucket takes its n-th free row.
        ends = np.cumsum(np.bincount(bucket, minlength=self.buckets))
        begins = np.concatenate([[0], ends[:-1]])
        rank = np.arange(len(new)) - begins[bucket]
        has_row = rank < self._free_count[bucket]
        assigned = self._free[(self._free_start[bucket] + rank)[has_row]]
        admissions = np.bincount(bucket[has_row], minlength=self.buckets)
        self._free_start += admissions
        self._free_count -= admissions
        self._wait(keys[new[~has_row]], bucket[~has_row])
        self.keys[assigned] = keys[new[has_row]]
        self.counts[assigned] = seen[has_row]
        self.last[assigned] = step
        self.tally[:, ADMISSIONS] += admissions
        self._index.add(assigned)
        rows[new[has_row]] = assigned
        table_rows = np.where(rows < 0, UNKNOWN_ROW, rows + self.start)
        return table_rows, assigned + self.start, self.keys[assigned]

    def owner(self, keys: np.ndarray, world_size: int) -> np.ndarray:
        """Returns the rank of each key, growing with the key."""
        return (self._bucket(keys) + self._first) // (self.options.buckets // world_size)

    def _bucket(self, keys: np.ndarray) -> np.ndarray:
        """Buckets of keys, relative to this rank's first."""
        scaled = (keys >> np.uint64(32)) * np.uint64(self.options.buckets) >> np.uint64(32)
        return scaled.astype(np.int64) - self._first

    def _owned(self) -> np.ndarray:
        return np.flatnonzero((self.last != FREE) & (self.last != NEVER_FREE))

    def _find_free(self) -> None:
        """Lists free rows bucket by bucket, lowest first; rows are taken from the front of a bucket."""
        self._free = np.flatnonzero(self.last == FREE)
        self._free_count = np.bincount(self._free // self._width, minlength=self.buckets)
        self._free_start = np.cumsum(self._free_count) - self._free_count

    def _count_unassigned(self, keys: np.ndarray, counts: np.ndarray) -> np.ndarray:
        """Returns how often ids without a row were seen, this step included; at times too much.

        A count-min sketch with conservative update per bucket (Estan and Varghese, 2002), halved at
        times so that it does not fill up (TinyLFU; Einziger et al., 2017).
        """
        if not self.sketch.size:
            return counts
        bucket = self._bucket(keys)
        cells = self.sketch.shape[1] // 2
        mixed = keys * np.uint64(0x9E3779B97F4A7C15)
        low = (mixed >> np.uint64(33)) % np.uint64(cells)
        high = (mixed & np.uint64(0xFFFFFFFF)) % np.uint64(cells) + np.uint64(cells)
        columns = np.stack([low, high]).astype(np.int64)
        old = self.sketch[bucket, columns].min(0).astype(np.int64)
        seen = np.minimum(old + counts, SKETCH_MAX)
        for column in columns:  # all of a step's ids see the old counts: their order cannot matter
            np.maximum.at(self.sketch, (bucket, column), seen.astype(np.uint8))
        counted = self.tally[:, COUNTED]
        np.add.at(counted, bucket, counts)
        old_enough = counted > SKETCH_AGE * cells
        self.sketch[old_enough] >>= 1
        counted[old_enough] >>= 1
        return seen

    def _wait(self, keys: np.ndarray, bucket: np.ndarray) -> None:
        """Notes ids that found no row, each once: as many rows are evicted next time."""
        cell = (keys & np.uint64(0xFFFFFFFF)) % np.uint64(self._width)
        self.waiting[bucket, cell.astype(np.int64)] = 1
        self.tally[:, WAITING] = self.waiting.sum(1)

    def _evict(self, bucket: np.ndarray, seen: np.ndarray, step: int) -> None:
        """Takes back rows that expired, and as many more as ids wait for; never one seen in this step.

        By lfu and distance_lfu a row goes only to an id that is worth as much: the best of the new ids is
        held against the least of the old ones, the second against the second, and so on.

        Args:
            bucket: Bucket of every id that could have a row now, growing.
            seen: How often they were seen.
            step: This step.
        """
        arriving = np.bincount(bucket, minlength=self.buckets)
        ends = np.cumsum(arriving)
        options = self.options
        needed = np.maximum(self.tally[:, WAITING], arriving)
        self.waiting[self.tally[:, WAITING] > 0] = 0
        self.tally[:, WAITING] = 0
        if options.time_to_live is None and (needed <= self._free_count).all():
            return  # without a look at every row
        owned = (self.last != FREE) & (self.last < step)
        leaving = np.zeros(len(self.last), dtype=bool)
        if options.time_to_live is not None:
            leaving = owned & (step - self.last > options.time_to_live)
        if options.eviction != "ttl":
            short = needed - self._free_count - leaving.reshape(self.buckets, -1).sum(1)
            for full in np.flatnonzero(short > 0):  # buckets
                rows = slice(full * self._width, (full + 1) * self._width)
                stay = np.flatnonzero(owned[rows] & ~leaving[rows]) + rows.start
                count = min(int(short[full]), len(stay))
                score = self._eviction_score(stay, step)
                least = np.argpartition(score, count - 1)[:count] if count else np.arange(0)
                order = stay[least[np.argsort(score[least], kind="stable")]]
                if options.eviction != "lru":
                    new = np.full(needed[full], options.admission)
                    new[: arriving[full]] = seen[ends[full] - arriving[full] : ends[full]]
                    new = np.sort(new)[::-1][needed[full] - int(short[full]) :][:count]
                    order = order[self._score_in_occurrences(order, step) <= new]
                leaving[order] = True
        rows_leaving = np.flatnonzero(leaving)
        if not len(rows_leaving):
            return
        self._index.remove(rows_leaving)
        self.last[rows_leaving] = FREE
        self.counts[rows_leaving] = 0
        self.tally[:, EVICTIONS] += leaving.reshape(self.buckets, -1).sum(1)
        self._find_free()
        if self._index.worn(len(self._free)):
            self._index = KeyIndex(self.keys, self._owned())

    def _eviction_score(self, rows: np.ndarray, step: int) -> np.ndarray:
        """What evictions go by, lowest first; ties of one criterion are broken by the other."""
        counts, last = self.counts[rows], self.last[rows]
        if self.options.eviction == "lfu":
            return (np.minimum(counts, 2**31 - 1) << 32) | last
        if self.options.eviction == "lru":
            return (last << 31) | np.minimum(counts, 2**31 - 1)
        return self._score_in_occurrences(rows, step)

    def _score_in_occurrences(self, rows: np.ndarray, step: int) -> np.ndarray:
        """The same in occurrences, which is what a new id has as well."""
        counts = self.counts[rows]
        if self.options.eviction == "lfu":
            return counts
        return counts / (step - self.last[rows] + 1.0) ** self.options.decay
