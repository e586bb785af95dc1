"""Ids of a run: how the configured tables map them to rows, and what became of them."""

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
import torch.distributed as dist
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from embeddings.ids import UNKNOWN_ROW, HashedIds, HashedKeys, IdMap, Vocabulary
from embeddings.tables import HashZch
from embeddings.zero_collision.policy import ZeroCollision
from embeddings.zero_collision.remap import ZeroCollisionTables
from llm_knowledge.errors import InputError
from llm_knowledge.parquet import parquet_sql
from trainer.config.levels import TABLE_LEVELS
from trainer.config.run import DataConfig
from trainer.config.tables import TablesConfig
from trainer.distributed.process_group import Runtime, on_all_ranks
from trainer.run.features import training_files

# Keys of a batch by the table that they read; sequences add to them, see `readers_of_tables`.
FEATURES = {"user": ("user",), "item": ("item", "history")}


def id_maps(
    tables: TablesConfig, data: DataConfig, folder: Path, runtime: Runtime
) -> dict[str, IdMap]:
    """Makes the id maps of the run by level; vocabularies are built on rank 0 unless they are there."""
    if tables.hash_rows is not None:
        return {
            level.name: HashedIds(tables.hash_rows, salt) for salt, level in enumerate(TABLE_LEVELS)
        }
    if tables.ids in ("zero_collision", "hash_zch"):
        bits = 64 if tables.ids == "zero_collision" else 62  # the latter's kernel takes no sign
        rows = assigned_rows(tables, data.streams)
        return {
            level.name: HashedKeys(rows[level.name], salt, bits)
            for salt, level in enumerate(TABLE_LEVELS)
        }
    paths = {level: folder / "ids" / f"{level.name}.parquet" for level in TABLE_LEVELS}

    def write() -> None:
        for level, path in paths.items():
            if runtime.is_main and not path.exists():
                ids = Vocabulary(_distinct_ids(data, level.id_column))
                try:
                    path.parent.mkdir(exist_ok=True)
                    ids.save(path)
                except OSError as error:
                    raise InputError(f"{path}: cannot be written: {error.strerror}") from error

    on_all_ranks(write)
    return on_all_ranks(
        lambda: {level.name: _load_vocabulary(path) for level, path in paths.items()}
    )


def _load_vocabulary(path: Path) -> Vocabulary:
    """Reads the ids of a run's rows.

    Raises:
        InputError: The file is damaged: rows would belong to other ids than those they were trained for.
    """
    try:
        if not path.is_file():
            raise ValueError("is missing, or no regular file")
        return Vocabulary.load(path)
    except (pa.ArrowException, OSError, KeyError, TypeError, ValueError) as error:
        raise InputError(
            f"{path}: {error}; it says which id has which row: put it back from a copy, or train a new run"
        ) from error


def assigned_rows(tables: TablesConfig, buckets: int) -> dict[str, int]:
    """Rows of the tables whose rows are assigned to ids: whole buckets of two or more."""
    options = tables.zero_collision
    configured = {"user": options.user_rows or 0, "item": options.item_rows or 0}
    return {level: max(-(-rows // buckets), 2) * buckets for level, rows in configured.items()}


def readers_of_tables(item_steps: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """Keys of a batch by the table of ids that they read: `item_steps` are sequences of items."""
    return FEATURES | {"item": (*FEATURES["item"], *item_steps)}


def zero_collision_tables(
    tables: TablesConfig,
    ids: dict[str, IdMap],
    buckets: int,
    seed: int,
    readers: dict[str, tuple[str, ...]] | None = None,
) -> ZeroCollisionTables | None:
    """Makes the row owners of the run's tables, or None where ids have fixed rows; collective.

    Args:
        tables: What is configured.
        ids: The id maps of the run by level.
        buckets: The streams of the data: both bound the numbers of ranks that can continue a run.
        seed: Of the vectors that reassigned rows begin with.
        readers: Keys of a batch by the table that they read; None: without sequences.
    """
    options = tables.zero_collision
    if tables.ids != "zero_collision":
        return None
    policies = {
        level: ZeroCollision(
            rows=ids[level].rows,
            buckets=buckets,
            eviction=options.eviction,
            admission=options.admission,
            time_to_live=options.time_to_live,
            interval=options.eviction_interval,
            decay=options.distance_decay,
        )
        for level in FEATURES
    }
    return ZeroCollisionTables(policies, readers or FEATURES, tables.init_std, seed)


def hash_zch(tables: TablesConfig, buckets: int) -> HashZch | None:
    """Options of torchrec's hash-based tables, or None where the run has others."""
    if tables.ids != "hash_zch":
        return None
    return HashZch(buckets, tables.zero_collision.hours)


def check_device(tables: TablesConfig, device: str) -> None:
    """Refuses ids that a device's kernels cannot map.

    Raises:
        InputError: With what to use instead.
    """
    if tables.ids == "hash_zch" and device != "cuda":
        raise InputError(
            "tables.ids: hash_zch runs on CUDA only, its kernel on a CPU finds ids but takes no new ones; "
            "use zero_collision, which runs everywhere"
        )


def collision_rates(hash_rows: int | None, data: DataConfig) -> dict[str, float]:
    """Share of a table's training ids that share their row with another one of them.

    Counted for a hash, in one pass over the ids; 0 by construction for the other kinds, whose ids
    without a row are reported as unknown.
    """
    rates = {}
    for salt, level in enumerate(TABLE_LEVELS):
        rates[f"{level.name}_collision_rate"] = 0.0
        if hash_rows is not None:
            distinct = _distinct_ids(data, level.id_column)
            rows = HashedIds(hash_rows, salt).lookup(distinct)
            crowd = np.bincount(rows)[rows]
            rates[f"{level.name}_collision_rate"] = float((crowd > 1).mean())
            rates[f"{level.name}_occupancy"] = len(np.unique(rows)) / (hash_rows - 1)
    return rates


class IdUse:
    """Counts, on the host, how many ids of the batches have no row of their own.

    Args:
        readers: Keys of a batch by the table that they read.
    """

    def __init__(self, readers: dict[str, tuple[str, ...]] | None = None) -> None:
        self._read = readers or FEATURES
        self._counts = {table: [0, 0] for table in self._read}

    def count(self, ids: KeyedJaggedTensor) -> None:
        """Adds a batch's ids."""
        # As NumPy: PyTorch sums booleans more slowly on a CPU.
        values, offsets, keys = ids.values().numpy(), ids.offset_per_key(), ids.keys()
        for table, features in self._read.items():
            for index in map(keys.index, features):
                part = values[offsets[index] : offsets[index + 1]]
                self._counts[table][0] += len(part)
                self._counts[table][1] += int(np.count_nonzero(part == UNKNOWN_ROW))

    def report(self) -> dict[str, float]:
        """Unknown rates since the last report; collective."""
        totals = torch.tensor(list(self._counts.values()))
        dist.all_reduce(totals)
        self._counts = {table: [0, 0] for table in self._read}
        return {
            f"{table}_unknown_rate": unknown / max(seen, 1)
            for table, (seen, unknown) in zip(self._read, totals.tolist(), strict=True)
        }


def _distinct_ids(data: DataConfig, column: str) -> pa.Array:
    import duckdb

    files = training_files(data)

    def query(files: list[Path]) -> str:  # the column's name is a constant of this module
        return f"SELECT DISTINCT {column} AS id FROM {parquet_sql(files)} ORDER BY id"

    with duckdb.connect() as connection:
        try:
            ids = connection.execute(query(files)).to_arrow_table()
        except duckdb.Error:
            for file in files:  # which one is it?
                try:
                    connection.execute(query([file])).fetchall()
                except duckdb.Error as error:
                    raise InputError(
                        f"{file}: column {column} cannot be read ({error}); prepare the data again"
                    ) from error
            raise
    return ids["id"].combine_chunks()
