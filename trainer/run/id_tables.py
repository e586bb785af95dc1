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
from trainer.config.run import RunConfig
from trainer.data.dataset import split_files
from trainer.distributed.process_group import Runtime, on_all_ranks

FEATURES = {"user": ("user",), "item": ("item", "history")}  # of a batch, by the table they read


def id_maps(config: RunConfig, folder: Path, runtime: Runtime) -> dict[str, IdMap]:
    """Makes the id maps of the run by level; vocabularies are built on rank 0 unless they are there."""
    tables = config.tables
    if tables.hash_rows is not None:
        return {
            level: HashedIds(tables.hash_rows, salt) for salt, level in enumerate(("user", "item"))
        }
    if tables.ids in ("zero_collision", "hash_zch"):
        bits = 64 if tables.ids == "zero_collision" else 62  # the latter's kernel takes no sign
        rows = given_rows(config)
        return {
            level: HashedKeys(rows[level], salt, bits)
            for salt, level in enumerate(("user", "item"))
        }
    paths = {level: folder / "ids" / f"{level}.parquet" for level in ("user", "item")}

    def write() -> None:
        for level, path in paths.items():
            if runtime.is_main and not path.exists():
                ids = Vocabulary(_distinct_ids(config, f"{level}_id"))
                try:
                    path.parent.mkdir(exist_ok=True)
                    ids.save(path)
                except OSError as error:
                    raise InputError(f"{path}: cannot be written: {error.strerror}") from error

    on_all_ranks(write)
    return on_all_ranks(lambda: {level: _load_vocabulary(path) for level, path in paths.items()})


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


def given_rows(config: RunConfig) -> dict[str, int]:
    """Rows of the tables whose rows are given to ids: whole buckets of two or more."""
    chosen, streams = config.tables.zero_collision, config.data.streams
    wanted = {"user": chosen.user_rows or 0, "item": chosen.item_rows or 0}
    return {level: max(-(-rows // streams), 2) * streams for level, rows in wanted.items()}


def zero_collision_tables(config: RunConfig, ids: dict[str, IdMap]) -> ZeroCollisionTables | None:
    """Makes the row owners of the run's tables, or None where ids have fixed rows; collective.

    Buckets are the streams of the data: both bound the numbers of ranks that can continue a run.
    """
    chosen = config.tables.zero_collision
    if config.tables.ids != "zero_collision":
        return None
    options = {
        level: ZeroCollision(
            rows=ids[level].rows,
            buckets=config.data.streams,
            eviction=chosen.eviction,
            admission=chosen.admission,
            time_to_live=chosen.time_to_live,
            interval=chosen.eviction_interval,
            decay=chosen.distance_decay,
        )
        for level in FEATURES
    }
    return ZeroCollisionTables(options, FEATURES, config.tables.init_std, config.train.seed)


def hash_zch(config: RunConfig) -> HashZch | None:
    """Options of torchrec's hash-based tables, or None where the run has others."""
    if config.tables.ids != "hash_zch":
        return None
    return HashZch(config.data.streams, config.tables.zero_collision.hours)


def check_device(config: RunConfig, device: str) -> None:
    """Refuses ids that a device's kernels cannot map.

    Raises:
        InputError: With what to use instead.
    """
    if config.tables.ids == "hash_zch" and device != "cuda":
        raise InputError(
            "tables.ids: hash_zch runs on CUDA only, its kernel on a CPU finds ids but takes no new ones; "
            "use zero_collision, which runs everywhere"
        )


def collision_rates(config: RunConfig) -> dict[str, float]:
    """Share of a table's training ids that share their row with another one of them.

    Counted for a hash, in one pass over the ids; 0 by construction for the other kinds, whose ids
    without a row are reported as unknown.
    """
    rates = {}
    for salt, level in enumerate(FEATURES):
        rates[f"{level}_collision_rate"] = 0.0
        if config.tables.hash_rows is not None:
            distinct = _distinct_ids(config, f"{level}_id")
            rows = HashedIds(config.tables.hash_rows, salt).lookup(distinct)
            crowd = np.bincount(rows)[rows]
            rates[f"{level}_collision_rate"] = float((crowd > 1).mean())
            rates[f"{level}_occupancy"] = len(np.unique(rows)) / (config.tables.hash_rows - 1)
    return rates


class IdUse:
    """Counts, on the host, how many ids of the batches have no row of their own.

    Args:
        feature_tables: Tables of features, each read by the ids of its name.
    """

    def __init__(self, feature_tables: Iterable[str] = ()) -> None:
        self._read = FEATURES | {table: (table,) for table in feature_tables}
        self._counts = {table: [0, 0] for table in self._read}

    def count(self, ids: KeyedJaggedTensor) -> None:
        """Adds a batch's ids."""
        # As NumPy: PyTorch sums booleans more slowly on a CPU.
        values, offsets, keys = ids.values().numpy(), ids.offset_per_key(), ids.keys()
        for table, features in self._read.items():
            for at in map(keys.index, features):
                part = values[offsets[at] : offsets[at + 1]]
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


def _distinct_ids(config: RunConfig, column: str) -> pa.Array:
    import duckdb

    files = [
        file
        for split in config.data.train_splits
        for file in split_files(Path(config.data.path), split)
    ]

    def query(files: list[Path]) -> str:  # the column's name is a constant of this module
        return f"SELECT DISTINCT {column} AS id FROM {parquet_sql(files)} ORDER BY id"

    with duckdb.connect() as connection:
        try:
            found = connection.execute(query(files)).to_arrow_table()
        except duckdb.Error:
            for file in files:  # which one is it?
                try:
                    connection.execute(query([file])).fetchall()
                except duckdb.Error as error:
                    raise InputError(
                        f"{file}: column {column} cannot be read ({error}); prepare the data again"
                    ) from error
            raise
    return found["id"].combine_chunks()
