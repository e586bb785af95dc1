"""Rows of the log as the model needs them: ids to table rows, keys to store rows, rows to a batch."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np
import pyarrow as pa
import torch
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from embeddings.ids import IdMap, SortedKeys
from llm_knowledge.errors import InputError
from trainer.config.levels import LEVELS, SCENARIO, TABLE_LEVELS
from trainer.data.checks import find_problem
from trainer.data.loading.batch import Batch, no_ids
from trainer.features.encoder import IDS, NUMBERS, FeatureEncoder
from trainer.features.encoding import MISSING
from trainer.features.ragged import Ragged

COLUMNS = ["user_id", "item_id", "scenario_id", "timestamp", "label", "history"]
Rows = dict[str, np.ndarray | Ragged]  # column name to an array whose first dimension is the row


class Joinable(Protocol):
    """What the join needs to know of a knowledge store."""

    def keys(self) -> np.ndarray:
        """Sorted keys."""
        ...

    def cutoffs(self) -> np.ndarray:
        """Newest event behind each vector, seconds."""
        ...


class KnowledgeJoin:
    """Point-in-time join: (key, event time) to the row of a vector, -1 where none is eligible.

    A vector is eligible for an event only if every event behind it lies strictly before. Of several
    stores, given oldest first, the newest eligible vector of the key is taken; rows count on from one
    store to the next.
    """

    def __init__(self, *stores: Joinable) -> None:
        # Newest first: row offset, keys, cut-offs, the oldest cut-off.
        self._stores: list[tuple[int, SortedKeys, np.ndarray, int]] = []
        offset = 0
        for store in stores:
            cutoffs = store.cutoffs()
            if len(cutoffs):
                keys = SortedKeys(pa.array(store.keys()))
                self._stores.insert(0, (offset, keys, cutoffs, int(cutoffs.min())))
            offset += len(cutoffs)

    def rows(self, keys: pa.ChunkedArray, timestamps: np.ndarray) -> np.ndarray:
        """Returns rows, int64, same length as `keys`."""
        joined = np.full(len(keys), -1, dtype=np.int64)
        for offset, keys_of_store, cutoffs, oldest in self._stores:
            # What no newer store has answered and this one may.
            asked = np.flatnonzero((joined < 0) & (timestamps > oldest))
            if len(asked) == 0:
                continue
            rows = keys_of_store.positions(
                keys if len(asked) == len(keys) else keys.take(pa.array(asked))
            )
            eligible = (rows >= 0) & (timestamps[asked] > cutoffs[rows])
            joined[asked[eligible]] = offset + rows[eligible]
        return joined


@dataclass(frozen=True)
class RowEncoder:
    """Turns columns of the log into table rows and store rows."""

    users: IdMap
    items: IdMap
    scenarios: SortedKeys
    scenario_order: np.ndarray  # sorted position to position in dataset.json
    history_length: int
    joins: dict[str, KnowledgeJoin]  # level to join; absent levels are never eligible
    extra_labels: tuple[str, ...] = ()  # columns label_NAME
    features: FeatureEncoder = field(default_factory=lambda: FeatureEncoder([]))

    @property
    def columns(self) -> list[str]:
        """What `encode` reads."""
        return list(dict.fromkeys([*COLUMNS, *self.extra_labels, *self.features.columns]))

    def encode(self, table: pa.Table, source: Path) -> Rows:
        """Encodes `columns` of one piece of a file.

        Raises:
            InputError: If a value is null, a label is not 0 or 1, or a scenario of the log is not one
                of the dataset's.
        """
        for column in (*COLUMNS, *self.extra_labels):
            if table[column].null_count:
                raise self._problem(source, column, "has a null")
        timestamps = table["timestamp"].to_numpy()
        labels = np.empty((len(table), 1 + len(self.extra_labels)), dtype=np.float32)
        for index, column in enumerate(("label", *self.extra_labels)):
            labels[:, index] = table[column].to_numpy()
            if not np.isin(labels[:, index], (0, 1)).all():
                raise self._problem(source, column, "is not 0 or 1 everywhere")
        position = self.scenarios.positions(table["scenario_id"])
        if len(position) and position.min() < 0:
            value = table["scenario_id"][int(np.argmin(position))].as_py()
            raise self._problem(source, "scenario_id", f"{value!r} is not listed in dataset.json")
        joined = {
            level.knowledge: self.joins[level.name].rows(table[level.id_column], timestamps)
            if level.name in self.joins
            else np.full(len(table), -1, dtype=np.int64)
            for level in LEVELS
        }
        history = table["history"].combine_chunks()
        if isinstance(history, pa.ChunkedArray):  # an empty column combines to a chunked array
            history = pa.array([], type=history.type)
        if history.flatten().null_count:
            raise self._problem(source, "history", "has a null inside a list")
        lengths = history.value_lengths().to_numpy(zero_copy_only=False).astype(np.int64)
        flat = self.items.lookup(history.flatten())
        return {
            "user": self.users.lookup(table["user_id"]),
            "item": self.items.lookup(table["item_id"]),
            "scenario": self.scenario_order[position],
            "label": labels[:, 0],
            "extra_labels": labels[:, 1:],
            "history": _last_columns(flat, lengths, self.history_length),
            "history_length": np.minimum(lengths, self.history_length),
            **joined,
            **self.features.encode(table, source, self.items),
        }

    def collate(self, rows: Rows, batch_size: int) -> Batch:
        """A batch of rows that were encoded here, see `collate`."""
        return collate(rows, batch_size, self.features)

    def _problem(self, source: Path, column: str, text: str) -> InputError:
        """Names the first bad row of the file, or says `text` where the file has none any more."""
        problem = find_problem(source, column, self.scenarios.keys.to_pylist())
        return problem or InputError(f"{source}: column {column!r} {text}; prepare the data again")


def _last_columns(flat: np.ndarray, lengths: np.ndarray, width: int) -> np.ndarray:
    """Lays out ragged rows as [n, width]: the last `width` values of each, left-aligned, 0 beyond."""
    ends = np.cumsum(lengths)
    kept = np.minimum(lengths, width)
    position = (ends - kept)[:, None] + np.arange(width)
    inside = np.arange(width) < kept[:, None]
    if len(flat) == 0:
        return np.zeros((len(lengths), width), dtype=np.int64)
    return np.where(inside, flat[np.minimum(position, len(flat) - 1)], 0)


def collate(encoded: Rows, batch_size: int, features: FeatureEncoder) -> Batch:
    """Builds a batch of exactly `batch_size` samples, padding with samples of weight 0 and no ids."""
    rows = {name: values for name, values in encoded.items() if isinstance(values, np.ndarray)}
    count = len(rows["label"])
    present = np.zeros(batch_size, dtype=np.int64)
    present[:count] = 1

    ragged = {name: values for name, values in encoded.items() if isinstance(values, Ragged)}
    steps = {column: ragged[column] for one in features.sequences for column in one.columns}
    there = [values.weights for values in steps.values() if values.weights is not None]
    weighted = {
        name: values
        for name, values in ragged.items()
        if values.weights is not None and name not in steps
    }

    def padded(values: np.ndarray, fill: int = 0) -> torch.Tensor:
        full = np.full((batch_size, *values.shape[1:]), fill, dtype=values.dtype)
        full[:count] = values
        return torch.from_numpy(full)

    lengths = rows["history_length"]
    inside = np.arange(rows["history"].shape[1]) < lengths[:, None]
    ids = _keyed(
        {
            "user": (rows["user"], present),
            "item": (rows["item"], present),
            "history": (rows["history"][inside], padded(lengths).numpy()),
            **single_valued(
                rows[IDS], [encoding.table_name for encoding in features.single], batch_size
            ),
            **{
                name: (encoding.values, padded(encoding.lengths).numpy())
                for name, encoding in ragged.items()
                if name not in weighted
            },
        }
    )
    knowledge = _keyed(
        {
            level.name: (joined[joined >= 0], padded((joined >= 0).astype(np.int64)).numpy())
            for level in TABLE_LEVELS
            for joined in [rows[level.knowledge]]
        }
    )
    return Batch(
        ids=ids,
        knowledge=knowledge,
        scenario=padded(rows["scenario"]),
        scenario_knowledge=padded(rows[SCENARIO.knowledge], fill=-1),
        label=padded(rows["label"]),
        weight=torch.from_numpy(present.astype(np.float32)),
        extra_labels=padded(rows["extra_labels"]),
        numbers=padded(rows[NUMBERS]),
        present=torch.from_numpy(np.concatenate(there)) if there else torch.empty(0),
        weighted=_weighted(weighted, padded),
    )


def _weighted(
    ragged: dict[str, Ragged], padded: Callable[[np.ndarray], torch.Tensor]
) -> KeyedJaggedTensor:
    """Ids with weights, by table; lengths are padded to the batch."""
    if not ragged:
        return no_ids()
    return _keyed(
        {name: (rows.values, padded(rows.lengths).numpy()) for name, rows in ragged.items()},
        [rows.weights for rows in ragged.values() if rows.weights is not None],
    )


def single_valued(
    table_rows: np.ndarray, names: list[str], batch_size: int
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Values and lengths [B] of features with one id or none, from table rows int64 [n, features]."""
    columns = np.ascontiguousarray(table_rows.T)
    present = columns != MISSING
    lengths = np.zeros((len(names), batch_size), dtype=np.int64)
    lengths[:, : len(table_rows)] = present
    return {
        name: (columns[number][present[number]], lengths[number])
        for number, name in enumerate(names)
    }


def _keyed(
    features: dict[str, tuple[np.ndarray, np.ndarray]], weights: list[np.ndarray] | None = None
) -> KeyedJaggedTensor:
    return KeyedJaggedTensor(
        keys=list(features),
        values=torch.from_numpy(np.concatenate([values for values, _ in features.values()])),
        lengths=torch.from_numpy(np.concatenate([lengths for _, lengths in features.values()])),
        weights=torch.from_numpy(np.concatenate(weights)) if weights is not None else None,
        # Said here, on the host: a model on a GPU would wait for the device to count them.
        length_per_key=[len(values) for values, _ in features.values()],
    )
