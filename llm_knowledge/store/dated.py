"""Several stores of one level side by side, each as of its own date: one table of vectors.

An event is joined with the newest vector of its key whose cut-off lies strictly before the event; where
a newer store does not have the key, an older one may. Rows are those of the oldest store, then those of
the next one. A single store is the case of one date.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from llm_knowledge.errors import InputError
from llm_knowledge.store.reader import KnowledgeStore, open_part

if TYPE_CHECKING:
    from llm_knowledge.profiles.dataset import Dataset

DAY = 86_400

# What vectors of one space have in common.
_SAME = ("level", "model", "template", "pooling", "layer", "dim", "key_type", "normalized", "note")


def store_paths(path: str | Path) -> list[Path]:
    """A store's own path, or the dated stores in a directory, by name.

    Raises:
        InputError: neither.
    """
    path = Path(path)
    if (path / "manifest.json").exists() or not path.is_dir():
        return [path]
    # A name with a dot in front is a store that is being written.
    stores = sorted(
        child
        for child in path.iterdir()
        if not child.name.startswith(".") and (child / "manifest.json").exists()
    )
    if not stores:
        raise InputError(
            f"{path / 'manifest.json'}: not found; this is no knowledge store and holds "
            f"none, make one with `knowledge extract`"
        )
    return stores


class DatedStores:
    """Stores of one level with distinct global cut-offs, or a single store of any kind.

    Attributes:
        stores: oldest first.
        offsets: int64 [stores + 1], first row of each store, then the number of rows.
        dim: length of a vector.
    """

    def __init__(self, stores: Sequence[KnowledgeStore]) -> None:
        if len(stores) > 1:
            stores = sorted(stores, key=_date)
            _check_together(stores)
        self.stores = list(stores)
        self.offsets = np.cumsum([0] + [len(store) for store in stores], dtype=np.int64)
        self.dim = stores[0].manifest.dim

    @classmethod
    def open(cls, paths: str | Path | Iterable[str | Path]) -> DatedStores:
        """Opens a store, a directory of dated stores, or a list of either.

        Raises:
            InputError: one cannot be opened, or they do not belong together.
        """
        given = [paths] if isinstance(paths, str | Path) else list(paths)
        return cls(
            [KnowledgeStore.open(store_path) for path in given for store_path in store_paths(path)]
        )

    @property
    def fingerprint(self) -> str:
        """Fingerprints of all stores, oldest first, joined by "+"."""
        return "+".join(store.fingerprint for store in self.stores)

    def __len__(self) -> int:
        return int(self.offsets[-1])

    def store_of_rows(self) -> np.ndarray:
        """Which of `stores` each row is of, int64 [rows]."""
        return np.repeat(np.arange(len(self.stores)), np.diff(self.offsets))

    def read_vectors(self, start: int, stop: int) -> np.ndarray:
        """Vectors of rows start..stop-1 over all stores: [stop-start, dim] float16 or float32."""
        blocks = []
        for store, first, last in zip(
            self.stores, self.offsets[:-1], self.offsets[1:], strict=True
        ):
            low, high = max(start, int(first)), min(stop, int(last))
            if low < high:
                blocks.append(store.read_vectors(low - int(first), high - int(first)))
        return np.concatenate(blocks) if blocks else self.stores[0].read_vectors(0, 0)


def _date(store: KnowledgeStore) -> int:
    cutoff = store.manifest.cutoff
    if cutoff.kind != "global" or cutoff.value is None:
        raise InputError(
            f"{store.path}: has no date (its cut-off is {cutoff.kind}); stores side by side "
            f"need one each: `knowledge extract --cutoffs`"
        )
    return cutoff.value


def _check_together(stores: Sequence[KnowledgeStore]) -> None:
    first = stores[0]
    for before, store in itertools.pairwise(stores):
        if _date(before) == _date(store):
            raise InputError(
                f"{before.path} and {store.path} have the same cut-off {_date(store)}; keep "
                f"one of them"
            )
        earlier, other = first.manifest, store.manifest
        differ = [
            f"{name}: {getattr(earlier, name)!r} there, {getattr(other, name)!r} here"
            for name in _SAME
            if getattr(earlier, name) != getattr(other, name)
        ]
        maps = [
            m.compression and (m.compression.method, m.compression.projection)
            for m in (earlier, other)
        ]
        if maps[0] != maps[1]:
            differ.append(
                "their vectors were made smaller by different projections; compress the "
                "directory of dated stores as a whole"
            )
        if differ:
            raise InputError(f"{store.path}: cannot stand beside {first.path}: {'; '.join(differ)}")


def cutoff_times(words: Sequence[str], dataset: Dataset) -> list[int]:
    """Cut-offs in seconds, ascending: an event at a cut-off still enters.

    Args:
        words: seconds; dates as YYYY-MM-DD (UTC; what happened before that day enters); or "day": all
            days from the first to the last event of the training window, and the day after.
        dataset: whose training window it is.

    Raises:
        InputError: another word, or there is no training event.
    """
    times: set[int] = set()
    for word in map(str, words):
        if word == "day":
            first, last = _training_window(dataset)
            times |= {day * DAY - 1 for day in range(first // DAY, last // DAY + 2)}
        elif word.lstrip("-").isdigit():
            times.add(int(word))
        else:
            try:
                when = datetime.strptime(word, "%Y-%m-%d").replace(tzinfo=UTC)
            except ValueError as error:
                raise InputError(f"--cutoffs {word!r}: want seconds, YYYY-MM-DD or day") from error
            times.add(int(when.timestamp()) - 1)
    return sorted(times)


def _training_window(dataset: Dataset) -> tuple[int, int]:
    """Times of the first and the last training event, from the footers."""
    times: list[int] = []
    for file in sorted((dataset.path / "train").glob("part-*.parquet")):
        with open_part(file) as part:
            column = part.schema_arrow.names.index("timestamp")
            for group in range(part.metadata.num_row_groups):
                about = part.metadata.row_group(group).column(column).statistics
                if about is None or not about.has_min_max:
                    times += part.read_row_group(group, ["timestamp"])["timestamp"].to_pylist()
                else:
                    times += [about.min, about.max]
    if not times:
        raise InputError(f"{dataset.path / 'train'}: --cutoffs day: there is no training event")
    return min(times), max(times)
