"""What is known of a user, a scenario and an item, by DuckDB or Spark from a prepared dataset.

Only the `profile` split and the catalogue are read, and for a dated profile the events of the
`train` split up to its cut-off: no event of the valid or test split can reach a prompt. Every
profile is one row (key, cutoff, data), `data` being JSON for `prompts`. Results are
deterministic: every order has a total tie-break. The log is never looped over in Python, and memory
does not grow with it, see `engines`; the queries are in `profile_queries`.

Cut-offs: of dated profiles it is the date asked for. Without one, a user's is the time of the
user's newest profile event. An item's is null, since only the catalogue is read. A scenario's
profile is made of aggregates over all users of the profile window and of category names, never of
item titles. Under a global time split its cut-off is the newest profile event. Under a per-user
split no such time exists, because one user's profile window may reach past another user's first
training event; the cut-off is null then. That is acceptable because no single event can be read off
a share of categories over all users, and the events that are aggregated are never scored
themselves.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llm_knowledge.dataset_files import (
    INTRODUCTION,
    check_footers,
    check_pages,
    part_files,
    read_description,
)
from llm_knowledge.errors import InputError
from llm_knowledge.profiles.queries import (
    Dialect,
    activity_query,
    category_query,
    correlation,
    item_query,
    most_events_query,
    pairs_query,
    user_query,
)

if TYPE_CHECKING:
    import pyarrow as pa

    from llm_knowledge.profiles.engines import Engine

WHOLE_FILE_HASH_BYTES = 64 << 20


@dataclass(frozen=True)
class Dataset:
    """The facts of `dataset.json` that profiles and prompts need."""

    path: Path
    name: str
    scenarios: dict[int | str, dict[str, str]]  # scenario_id -> name, description; in file order
    key_types: dict[str, str]  # level -> "int64" | "string"
    split_rule: str
    positive_name: str
    negative_name: str | None
    raw: dict[str, Any] = field(repr=False)

    @classmethod
    def open(cls, path: str | Path) -> Dataset:
        """Reads `dataset.json`.

        Raises:
            InputError: it is absent, not JSON, of another version, or lacks a field.
        """
        file = Path(path) / "dataset.json"
        raw = read_description(path)
        try:
            scenarios = {
                s["scenario_id"]: {
                    "name": str(s.get("name") or s["scenario_id"]),
                    "description": str(s.get("description") or ""),
                }
                for s in raw["scenarios"]
            }
            types = {level: str(raw[f"{level}_id_type"]) for level in ("user", "item", "scenario")}
            return cls(
                Path(path),
                str(raw["name"]),
                scenarios,
                types,
                raw["split"]["rule"],
                str(raw.get("positive_name") or "liked"),
                raw.get("negative_name"),
                raw,
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise InputError(f"{file}: field {error} is missing or has a wrong type") from error

    @property
    def negatives(self) -> bool:
        """Whether rows of label 0 happened. Where it has no name they were sampled."""
        return self.negative_name is not None

    def files(self, level: str, cutoff: int | None = None) -> list[Path]:
        """The Parquet files that a level's profiles are made of, in a fixed order: items, events.

        With a cut-off, events of the training window may enter as well: those up to it. Events of
        the valid and test splits never do.
        """
        if cutoff is not None and self.raw.get("timestamps") == "order":
            raise InputError(
                f"{self.path}: has no clock, its timestamps are places in each user's own order, so no date "
                "can be asked for; leave the date out"
            )
        splits = ["profile", INTRODUCTION, *([] if cutoff is None else ["train"])]
        splits = [] if level == "item" else splits
        parts = [file for split in splits for file in part_files(self.path, split)]
        if level != "item" and not parts:
            raise InputError(
                f"{self.path / 'profile'}: no part-*.parquet; the profile split is "
                f"empty, prepare the data with a profile window"
            )
        items = self.path / "items.parquet"
        if not items.is_file():
            raise InputError(f"{items}: not found; prepare the data again")
        check_footers(self.path, [items, *parts], self.raw.get("footers") or {})
        return [items, *parts]

    def fingerprint(self, level: str, cutoff: int | None = None) -> str:
        """Hash of all that a level's profiles depend on in this dataset.

        Files above 64 MiB enter with their size and their last MiB, which holds the Parquet footer;
        of the others the pages' checksums are looked at too.
        """
        digest = hashlib.blake2b(digest_size=16)
        named = [self.raw["positive_name"], self.raw["negative_name"]] if level != "item" else []
        about = [self.raw["scenarios"], *named] if level != "item" else []
        digest.update(json.dumps(about, sort_keys=True).encode())
        for file in self.files(level, cutoff):
            size = file.stat().st_size
            digest.update(f"\0{file.name}\0{size}\0".encode())
            if size <= WHOLE_FILE_HASH_BYTES:
                check_pages(file)
            with file.open("rb") as handle:
                if size > WHOLE_FILE_HASH_BYTES:
                    handle.seek(size - (1 << 20))
                while block := handle.read(1 << 20):
                    digest.update(block)
        return digest.hexdigest()


@dataclass(frozen=True)
class ProfileOptions:
    """How much of a user's past is kept, and what the database may use."""

    per_scenario: int = 8  # items per scenario, liked and disliked each
    total: int = 24  # items over all scenarios, liked and disliked each
    categories: int = 6  # category names in a scenario's lists
    min_interactions: int = 1  # users with fewer events have no profile
    cutoff: int | None = None  # newest second that enters; None: the whole profile window
    tastes: bool = False  # whether a user's categories are compared, for templates that name them
    engine: str = "duckdb"
    spark_master: str | None = None
    memory_limit: str = "2GB"
    threads: int | None = None


def profile_batches(
    dataset: Dataset, level: str, options: ProfileOptions, rows: int, scratch: Path
) -> Iterator[pa.RecordBatch]:
    """Yields the profiles of a level as record batches of `rows` rows (the last may be shorter).

    Columns: key (int64 | string, unique, increasing over all batches), cutoff (int64 or null), data
    (JSON text). Users without any profile event have no row.

    Args:
        dataset: the prepared dataset.
        level: "user", "scenario" or "item".
        options: limits.
        rows: rows per batch.
        scratch: directory that DuckDB may spill to.

    Raises:
        InputError: a file or column is missing or damaged.
    """
    import pyarrow as pa

    from llm_knowledge.profiles.engines import open_engine

    key_type = pa.int64() if dataset.key_types[level] == "int64" else pa.string()
    schema = pa.schema([("key", key_type), ("cutoff", pa.int64()), ("data", pa.string())])
    files = dataset.files(level, options.cutoff)
    engine = open_engine(
        options.engine, scratch, options.memory_limit, options.threads, options.spark_master
    )
    with engine:
        try:
            engine.open(files[0], files[1:], options.cutoff)
            if level == "scenario":
                yield from _scenario_batches(engine, dataset, options, schema, rows)
                return
            query = _query(engine.dialect, dataset, level, options)
            any_user = False
            stream = engine.stream(query, rows, by_user=level == "user")
            for batch in _rebatch((_cast(batch, schema) for batch in stream), rows):
                any_user = True
                yield batch
            if level == "user" and not any_user:
                most = engine.fetch(most_events_query(dataset.negatives))[0][0]
                raise _nobody(dataset, options, most or 0)
        except engine.errors as error:
            names = ", ".join(sorted({str(file.parent) for file in files}))
            text = str(error).splitlines()[0]
            if "Out of Memory" in text:
                raise InputError(
                    f"--memory-limit {options.memory_limit}: not enough for the {level} "
                    f"profiles ({text}); raise it"
                ) from error
            raise InputError(f"{names}: the {level} profiles cannot be read: {text}") from error


def _query(dialect: Dialect, dataset: Dataset, level: str, options: ProfileOptions) -> str:
    """The query of all profiles of users or items."""
    if level == "item":
        return item_query(dialect)
    return user_query(
        dialect,
        options.per_scenario,
        options.total,
        dataset.negatives,
        options.min_interactions,
        options.cutoff,
        options.tastes,
    )


def _nobody(dataset: Dataset, options: ProfileOptions, most: int) -> InputError:
    until = "" if options.cutoff is None else f" up to the cut-off {options.cutoff}"
    if not most:
        sampled = (
            "" if dataset.negatives else " (label 0 means nothing here: negative_name is null)"
        )
        return InputError(f"{dataset.path}: no event{until}: no user has a profile{sampled}")
    return InputError(
        f"--min-interactions: no user has {options.min_interactions} events{until} in "
        f"{dataset.path}; the most that one has is {most}"
    )


def _cast(batch: pa.RecordBatch, schema: pa.Schema) -> pa.RecordBatch:
    import pyarrow as pa

    columns = [batch[name].cast(schema.field(name).type) for name in schema.names]
    return pa.RecordBatch.from_arrays(columns, schema=schema)


def _rebatch(batches: Iterator[pa.RecordBatch], rows: int) -> Iterator[pa.RecordBatch]:
    """Cuts a stream of batches into batches of exactly `rows` rows, the last one shorter."""
    import pyarrow as pa

    held: list[pa.RecordBatch] = []
    for batch in batches:
        held.append(batch)
        while sum(len(b) for b in held) >= rows:
            table = pa.Table.from_batches(held).combine_chunks()
            yield table.slice(0, rows).to_batches()[0]
            rest = table.slice(rows)
            held = rest.to_batches() if len(rest) else []
    if any(len(batch) for batch in held):
        yield pa.Table.from_batches(held).combine_chunks().to_batches()[0]


def _scenario_batches(
    engine: Engine,
    dataset: Dataset,
    options: ProfileOptions,
    schema: pa.Schema,
    rows: int,
) -> Iterator[pa.RecordBatch]:
    import pyarrow as pa

    activity = {row[0]: row[1:] for row in engine.fetch(activity_query(dataset.negatives))}
    liked: dict[Any, dict[str, int]] = {}
    for scenario, category, count in engine.fetch(category_query(engine.dialect)):
        liked.setdefault(scenario, {})[category] = count
    pairs = {
        row[:2]: (row[2], correlation(*row[2:]))
        for row in engine.fetch(pairs_query(dataset.negatives))
    }
    unknown = [scenario for scenario in activity if scenario not in dataset.scenarios]
    if unknown:
        raise InputError(
            f"{dataset.path / 'profile'}: scenario_id {unknown[0]!r} is not in "
            f"dataset.json ({list(dataset.scenarios)})"
        )
    if not activity:
        raise _nobody(dataset, options, 0)
    cutoff = options.cutoff
    if cutoff is None and dataset.split_rule == "global_time":
        cutoff = max(row[4] for row in activity.values())
    keys = sorted(dataset.scenarios)
    data = [
        json.dumps(
            _scenario_data(key, dataset, options, activity, liked, pairs), ensure_ascii=False
        )
        for key in keys
    ]
    columns = [
        pa.array(keys, schema.field("key").type),
        pa.array([cutoff] * len(keys), pa.int64()),
        pa.array(data),
    ]
    yield from pa.Table.from_arrays(columns, schema=schema).to_batches(max_chunksize=rows)


def _scenario_data(
    key: Any,
    dataset: Dataset,
    options: ProfileOptions,
    activity: dict[Any, Any],
    liked: dict[Any, dict[str, int]],
    pairs: dict[Any, Any],
) -> dict[str, Any]:
    """Aggregates of one scenario as JSON values; `rate` is None where negatives are sampled."""
    events, users, items, rate, _ = activity.get(key, (0, 0, 0, None, None))
    liked_here = liked.get(key, {})
    others: list[dict[str, Any]] = []
    for other in dataset.scenarios:
        if other == key:
            continue
        common, agreement = pairs.get((key, other), (0, None))
        others.append(
            {
                "name": dataset.scenarios[other]["name"],
                "common_users": common / users if users else 0.0,
                "agreement": agreement if dataset.negatives and common >= 30 else None,
                "category_similarity": _cosine(liked_here, liked.get(other, {})),
            }
        )
    others.sort(key=lambda other: (-other["common_users"], other["name"]))
    return {
        **dataset.scenarios[key],
        "events": events,
        "users": users,
        "items": items,
        "rate": rate if dataset.negatives else None,
        "top_categories": list(liked_here)[: options.categories],
        "distinct_categories": _distinct(key, liked, options.categories),
        "others": others,
    }


def _distinct(key: Any, liked: dict[Any, dict[str, int]], count: int) -> list[str]:
    """Categories with at least 1.2 times the share that they have in the other scenarios."""
    own = liked.get(key, {})
    rest: dict[str, int] = {}
    for other, counts in liked.items():
        for category, number in counts.items() if other != key else ():
            rest[category] = rest.get(category, 0) + number
    own_sum, rest_sum = sum(own.values()), sum(rest.values())
    if not own_sum or not rest_sum:
        return []
    # One added observation keeps a category that is seen once from looking distinctive.
    lift = {
        c: (n / own_sum) / ((rest.get(c, 0) + 1) / rest_sum)
        for c, n in own.items()
        if n >= 0.01 * own_sum
    }
    return sorted((c for c in lift if lift[c] >= 1.2), key=lambda c: (-lift[c], c))[:count]


def _cosine(one: dict[str, int], two: dict[str, int]) -> float:
    dot = sum(number * two.get(category, 0) for category, number in one.items())
    norm = sum(n * n for n in one.values()) * sum(n * n for n in two.values())
    return dot / norm**0.5 if norm else 0.0
