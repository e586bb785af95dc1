"""Ids of a run: how the configured tables map them to rows, and what became of them."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
import torch.distributed as dist
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from embeddings.ids import UNKNOWN_ROW, HashedIds, HashedKeys, IdMap, Vocabulary
from embeddings.remap import ZeroCollisionTables
from embeddings.zero_collision import ZeroCollision
from llm_knowledge.errors import InputError
from trainer.config import RunConfig
from trainer.data.dataset import split_files
from trainer.distributed import Runtime, together

FEATURES = {"user": ("user",), "item": ("item", "history")}  # of a batch, by the table they read


def id_maps(config: RunConfig, folder: Path, runtime: Runtime) -> dict[str, IdMap]:
    """Makes the id maps of the run by level; vocabularies are built on rank 0 unless they are there."""
    tables = config.tables
    if tables.hash_rows is not None:
        return {
            level: HashedIds(tables.hash_rows, salt) for salt, level in enumerate(("user", "item"))
        }
    if tables.ids == "zero_collision":
        streams = config.data.streams
        rows = (tables.zero_collision.user_rows or 0, tables.zero_collision.item_rows or 0)
        return {
            level: HashedKeys(max(-(-wanted // streams), 2) * streams, salt)
            for salt, (level, wanted) in enumerate(zip(("user", "item"), rows, strict=True))
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

    together(write)
    return {level: Vocabulary.load(path) for level, path in paths.items()}


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
    """Counts, on the host, how many ids of the batches have no row of their own."""

    def __init__(self) -> None:
        self._counts = {table: [0, 0] for table in FEATURES}

    def count(self, ids: KeyedJaggedTensor) -> None:
        """Adds a batch's ids."""
        values, offsets, keys = ids.values(), ids.offset_per_key(), ids.keys()
        for table, features in FEATURES.items():
            for at in map(keys.index, features):
                part = values[offsets[at] : offsets[at + 1]]
                self._counts[table][0] += len(part)
                self._counts[table][1] += int((part == UNKNOWN_ROW).sum())

    def report(self) -> dict[str, float]:
        """Unknown rates since the last report; collective."""
        totals = torch.tensor(list(self._counts.values()))
        dist.all_reduce(totals)
        self._counts = {table: [0, 0] for table in FEATURES}
        return {
            f"{table}_unknown_rate": unknown / max(seen, 1)
            for table, (seen, unknown) in zip(FEATURES, totals.tolist(), strict=True)
        }


def _distinct_ids(config: RunConfig, column: str) -> pa.Array:
    import duckdb

    files = [
        str(file)
        for split in config.data.train_splits
        for file in split_files(Path(config.data.path), split)
    ]
    # The column's name is a constant of this module.
    query = f"SELECT DISTINCT {column} AS id FROM read_parquet($files) ORDER BY id"
    with duckdb.connect() as connection:
        try:
            found = connection.execute(query, {"files": files}).to_arrow_table()
        except duckdb.Error:
            for file in files:  # which one is it?
                try:
                    connection.execute(query, {"files": [file]}).fetchall()
                except duckdb.Error as error:
                    raise InputError(
                        f"{file}: column {column} cannot be read ({error}); prepare the data again"
                    ) from error
            raise
    return found["id"].combine_chunks()
