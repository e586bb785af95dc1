"""From a log of events to a prepared dataset: split by time, history, global time order.

The way of every source: blocks of whole users (sorted by user and time) -> `Staging.add` (split and
history, vectorised) -> scratch files per split -> one out-of-core sort per split (`finish`).
Memory: one block (about `BLOCK_ROWS` rows, or the events of the single largest user if more) plus
DuckDB's limit.
"""

from __future__ import annotations

import logging
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from llm_knowledge.errors import InputError
from llm_knowledge.parquet import parquet_sql
from trainer.data.dataset import (
    HISTORY_LENGTH,
    INTRODUCTION,
    SPLITS,
    DatasetInfo,
    SplitInfo,
    read_footer,
    sequence_column,
    split_files,
)
from trainer.data.sources.feature_schema import BehaviourSequence
from trainer.data.sources.sequences import Steps, step_slices, steps_of
from trainer.data.sources.writer import event_order, write_info, write_sorted

if TYPE_CHECKING:
    import duckdb
    import pyarrow as pa

    from trainer.data.sources.negatives import NegativeSampler

logger = logging.getLogger(__name__)

BLOCK_ROWS = 2_000_000


# ---------------------------------------------------------------- split and history


def group_bounds(changed: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """First row and end (exclusive) of each row's run, from flags "a run starts here" [n]."""
    starts = np.flatnonzero(changed)
    run = np.cumsum(changed) - 1
    ends = np.append(starts[1:], len(changed))
    return starts[run], ends[run]


def split_per_user(users: np.ndarray, times: np.ndarray, fractions: Sequence[float]) -> np.ndarray:
    """Split code (0..3, int8 [n]) by each user's own order of time.

    A group of a user's simultaneous events goes whole to where its middle falls.

    Args:
        users: int64 [n], rows of one user adjacent.
        times: int64 seconds [n], ascending within a user.
        fractions: shares of profile, train, valid, test; their sum is 1.
    """
    new_user, new_time = _changes(users, times)
    first, end = group_bounds(new_user)
    group_first, group_end = group_bounds(new_time)
    middle = (group_first + group_end - 2 * first) / (2 * (end - first))
    cuts = np.round(np.cumsum(fractions)[:3], 12)
    return np.searchsorted(cuts, middle, side="right").astype(np.int8)


def split_global(times: np.ndarray, boundaries: Sequence[int]) -> np.ndarray:
    """Split code (0..3, int8 [n]); boundaries are the first seconds of train, valid, test."""
    return np.searchsorted(np.asarray(boundaries), times, side="right").astype(np.int8)


def hold_out(
    users: pa.ChunkedArray, codes: np.ndarray, share: float, valid_share: float = 0.0
) -> np.ndarray:
    """Takes shares of the users out of training.

    Who is chosen depends on the user's id alone, so the same people are held out whatever else the
    log holds.

    Args:
        users: user_id [n], rows of one user adjacent.
        codes: split of each row, 0..3.
        share: of the users, in [0, 1), who are tested.
        valid_share: of the users, who validate; below 1 with `share`.

    Returns:
        codes, where a chosen user's profile events are 4 (introduction) and all later ones 3 (test), or
        2 (valid).
    """
    if share + valid_share <= 0:
        return codes
    runs = run_codes(users)
    first = np.flatnonzero(np.diff(runs, prepend=-1))
    draw = np.array(
        [zlib.crc32(f"held out {user}".encode()) / 2**32 for user in users.take(first).to_pylist()]
    )[runs]
    later = np.where(draw < share, 3, 2)
    held_out = draw < share + valid_share
    return np.where(held_out, np.where(codes == 0, 4, later), codes).astype(np.int8)


def positive_slices(
    users: np.ndarray, times: np.ndarray, labels: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """For each row, which of all positive rows are its history.

    Rows are sorted by user, then time, in any unit. The history of a row is `positives[start:stop]`, where
    `positives` lists the rows with label 1 in order: the last 20 of the same user that are strictly
    earlier. Costs O(n), whatever the number of events of one user.

    Returns:
        start, stop: int64 [n].
    """
    return step_slices(users, times, labels == 1, HISTORY_LENGTH)


def moments_of(block: pa.Table, users: np.ndarray) -> np.ndarray:
    """A number that grows with time within each user, also within a second, int64 [n].

    Args:
        block: sorted by user, timestamp and, where it has one, `fraction`.
        users: int64 [n].
    """
    _, changed = _changes(users, block["timestamp"].to_numpy())
    if "fraction" in block.column_names:
        changed |= _changes(users, block["fraction"].to_numpy())[1]
    return np.cumsum(changed)


def _changes(users: np.ndarray, times: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    new_user = np.ones(len(users), dtype=bool)
    new_user[1:] = users[1:] != users[:-1]
    new_time = new_user.copy()
    new_time[1:] |= times[1:] != times[:-1]
    return new_user, new_time


class Staging:
    """Collects blocks of whole users in scratch files, one folder per split.

    Args:
        folder: scratch folder (created).
        schema: event schema, truth columns included.
        fraction: whether blocks have a column `fraction`: nanoseconds within the second. It orders
            events and histories, and is not part of the dataset.
        sequences: those of the schema; the ones that are made here are added to the events.
    """

    def __init__(
        self,
        folder: Path,
        schema: pa.Schema,
        fraction: bool = False,
        sequences: Mapping[str, BehaviourSequence] | None = None,
    ) -> None:
        import pyarrow as pa

        folder.mkdir()
        self.schema = self.scratch_schema = schema
        if fraction:
            self.scratch_schema = schema.append(pa.field("fraction", pa.int64()))
        self.files: dict[str, list[Path]] = {split: [] for split in (*SPLITS, INTRODUCTION)}
        self.rows: dict[str, int] = dict.fromkeys(self.files, 0)
        self.users = 0
        self._sequences = sequences or {}
        self._folder = folder
        self._blocks = 0

    @property
    def order(self) -> str:
        """SQL order of events: by time, then definite."""
        return event_order("fraction" in self.scratch_schema.names)

    def add(self, block: pa.Table, codes: np.ndarray) -> None:
        """Add all events of some users.

        Args:
            block: the schema's columns but those made here, sorted by user_id and `order`.
            codes: split of each row, as by `split_per_user` or `split_global` and `hold_out`.
        """
        import pyarrow as pa

        users = run_codes(block["user_id"])
        labels = block["label"].to_numpy()
        moments = moments_of(block, users)
        start, stop = positive_slices(users, moments, labels)
        items = block["item_id"].combine_chunks().filter(pa.array(labels == 1))
        history = Steps(start, stop, {"history": items}, frozenset())
        made = [history, *steps_of(block, users, moments, self._sequences)]
        for code, split in enumerate(self.files):
            chosen = np.flatnonzero(codes == code)
            if len(chosen):
                self._write(split, block, chosen, made)
        self._blocks += 1
        self.users += int(users[-1]) + 1 if len(users) else 0

    @property
    def read_columns(self) -> list[str]:
        """Columns of a block: those of the scratch files that are not made here."""
        made = {"history"} | {
            sequence_column(name, field)
            for name, sequence in self._sequences.items()
            if sequence.where is not None
            for field in sequence.fields
        }
        return [name for name in self.scratch_schema.names if name not in made]

    def _write(
        self, split: str, block: pa.Table, chosen: np.ndarray, made: Sequence[Steps]
    ) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        file = self._folder / f"{split}-{self._blocks:06d}.parquet"
        times = block["timestamp"].to_numpy()
        # Slices keep the expansion of histories and sequences small: each has so many values at most.
        size = (
            20
            * 131_072
            // max(HISTORY_LENGTH, *(one.length for one in self._sequences.values()), 1)
        )
        with pq.ParquetWriter(file, self.scratch_schema) as writer:
            for rows in np.array_split(chosen, len(chosen) // max(size, 1) + 1):
                table = block.take(pa.array(rows))
                for steps in made:
                    for column, lists in steps.columns(rows, times).items():
                        table = table.append_column(column, lists)
                table = table.select(self.scratch_schema.names)
                writer.write_table(table.cast(self.scratch_schema))
        self.files[split].append(file)
        self.rows[split] += len(chosen)


def run_codes(column: pa.ChunkedArray) -> np.ndarray:
    """0, 1, 2, … for the runs of equal values of a column [n] (int or string)."""
    import pyarrow.compute as pc

    if len(column) == 0:
        return np.zeros(0, dtype=np.int64)
    column = column.combine_chunks()
    differs = pc.not_equal(column.slice(1), column.slice(0, len(column) - 1))
    return np.append(0, np.cumsum(differs.to_numpy(zero_copy_only=False))).astype(np.int64)


def stage_log(
    con: duckdb.DuckDBPyConnection,
    events: str,
    staging: Staging,
    scratch: Path,
    split: SplitInfo,
    sampler: NegativeSampler | None = None,
) -> None:
    """Divide a relation into blocks of whole users and stage them.

    Args:
        con: connection on which `events` can be queried.
        events: SQL of a relation with the columns of an event but `history`.
        staging: where the blocks go.
        scratch: folder for the divided log.
        split: rule with fractions (per user) or boundaries (global).
        sampler: of negatives, where the log has positives only.
    """
    sources = _divide(con, events, scratch)
    query = f"SELECT {', '.join(staging.read_columns)} FROM {{}} ORDER BY user_id, {staging.order}"

    def block_of(source: str) -> tuple[pa.Table, np.ndarray]:
        block = con.execute(query.format(source)).to_arrow_table()
        return block, _split_codes(block, split)

    for source in progress(sources if sampler is not None else [], "popularity"):
        assert sampler is not None
        sampler.count(*block_of(source))
    for number, source in enumerate(progress(sources, "split and history")):
        block, codes = block_of(source)
        if sampler is not None:
            users = run_codes(block["user_id"])
            block, codes = sampler.add(block, codes, moments_of(block, users), users, number)
        staging.add(block, codes)


def _split_codes(block: pa.Table, split: SplitInfo) -> np.ndarray:
    """Split of each row, int8 [n]; rows are sorted by user and time."""
    times = block["timestamp"].to_numpy()
    if split.boundaries is not None:
        return split_global(times, split.boundaries)
    fractions = [split.fractions[name] for name in SPLITS]
    codes = split_per_user(run_codes(block["user_id"]), times, fractions)
    return hold_out(block["user_id"], codes, split.held_out_users, split.held_out_valid_users)


def _divide(con: duckdb.DuckDBPyConnection, events: str, scratch: Path) -> list[str]:
    """SQL of blocks of whole users, of about `BLOCK_ROWS` rows each."""
    rows = con.execute(f"SELECT count(*) FROM {events}").fetchall()[0][0]
    blocks = min(1_000, rows // BLOCK_ROWS + 1)
    if blocks == 1:
        return [events]
    target = str(scratch / "by-user").replace("'", "''")
    con.execute(
        f"COPY (SELECT *, hash(user_id) % {blocks} AS block FROM {events}) "
        f"TO '{target}' (FORMAT parquet, PARTITION_BY (block))"
    )
    folders = sorted((scratch / "by-user").iterdir())
    return [parquet_sql(sorted(folder.iterdir())) for folder in folders]


def finish(
    con: duckdb.DuckDBPyConnection, staging: Staging, folder: Path, info: DatasetInfo
) -> DatasetInfo:
    """Write every split in time order and dataset.json; items.parquet must be there already.

    Raises:
        InputError: a split is empty.
    """
    for split in SPLITS:
        if staging.rows[split] == 0:
            raise InputError(
                f"the {split} split is empty under this rule: {info.split.text} "
                "Give it a larger share or other boundaries, or a longer log"
            )
    if info.split.held_out and staging.rows[INTRODUCTION] == 0:
        raise InputError(
            f"no user was held out: {staging.users:,} users, share {info.split.held_out:g}; "
            "give a larger share"
        )
    rows: dict[str, int] = {}
    for split in progress([split for split in staging.files if staging.rows[split]], "time order"):
        files, count = staging.files[split], staging.rows[split]
        rows[split] = write_sorted(con, files, staging.schema, folder / split, count, staging.order)
    warn_of_unseen_items(con, folder)
    counts = {
        "introduction_rows": rows.pop(INTRODUCTION, 0),
        "rows": rows,
        "users": staging.users,
        "items": read_footer(folder / "items.parquet")[1],
    }
    return write_info(folder, info.model_copy(update=counts))


def warn_of_unseen_items(con: duckdb.DuckDBPyConnection, folder: Path) -> None:
    """Warns where most positives of test are of items that have no positive in train."""
    train, test = (parquet_sql(split_files(folder, split)) for split in ("train", "test"))
    positives, unseen = con.execute(
        f"SELECT count(*), count(*) FILTER (WHERE seen.item_id IS NULL) FROM {test} AS t LEFT JOIN "
        f"(SELECT DISTINCT item_id FROM {train} WHERE label = 1) AS seen USING (item_id) WHERE label = 1"
    ).fetchall()[0]
    if positives and unseen > positives / 2:
        logger.warning(
            "%s of %s positives of test (%.0f%%) are of items without a positive in train: what is measured "
            "is mostly how new items are ranked; their ids tell nothing, their texts may",
            f"{unseen:,}",
            f"{positives:,}",
            100 * unseen / positives,
        )


def progress(steps: Sequence[Any], text: str) -> Any:
    """A progress bar on stderr, only where stderr is a terminal."""
    from tqdm import tqdm

    return tqdm(steps, desc=text, disable=None, leave=False)


def time_quantile(con: duckdb.DuckDBPyConnection, events: str, share: float) -> int:
    """The second at which `share` of the events is over, exactly, in constant memory.

    Narrows a range of seconds in 65,536 steps per pass over the log.
    """
    low, high, rows = con.execute(
        f"SELECT min(timestamp), max(timestamp) + 1, count(*) FROM {events}"
    ).fetchall()[0]
    target = min(round(rows * share), rows - 1)
    while high - low > 1:
        step = -(-(high - low) // 65_536)
        steps = con.execute(
            f"SELECT (timestamp - {low}) // {step} AS place, count(*) FROM {events} "
            f"WHERE timestamp >= {low} AND timestamp < {high} GROUP BY place ORDER BY place"
        ).fetchall()
        passed = np.cumsum([count for _, count in steps])
        chosen = int(np.searchsorted(passed, target, side="right"))
        target -= int(passed[chosen - 1]) if chosen else 0
        low += steps[chosen][0] * step
        high = min(high, low + step)
    return low
