"""Counters: what happened strictly before an event and was known by then, out of core.

Every event is put three times into one order of its key's moments: where it asks, where it becomes known
(`known_after` later) and where the window leaves it behind. A running sum then answers every question, so
that memory is DuckDB's for a sort, whatever the number of events of one key. Events of one moment ask
before any of them becomes known: they see nothing of each other.

A moment is a second and the nanosecond within. Delays and windows are compared in whole seconds, to the
safe side: known is what has been so for a whole second.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from llm_knowledge.parquet import parquet_sql
from trainer.data.dataset import FeatureInfo
from trainer.data.sources.feature_schema import ROLES, Counter, Feature
from trainer.data.sources.log_schema import LogSchema
from trainer.data.sources.writer import quote_name

if TYPE_CHECKING:
    import duckdb
    import pyarrow as pa

BATCH_ROWS = 65_536
END_OF_SECOND = 10**9  # behind every nanosecond of a second


def describe_counters(counters: Mapping[str, Counter]) -> dict[str, FeatureInfo]:
    """The numbers that counters are, as features of the dataset."""
    return {
        name: FeatureInfo(kind="number", type="double", source="counters", column=counter.text)
        for name, counter in counters.items()
    }


def add_counters(
    con: duckdb.DuckDBPyConnection,
    events: str,
    rules: LogSchema,
    scratch: Path,
    past: str | None = None,
) -> str:
    """Computes every counter of the schema for every event.

    Args:
        con: Connection.
        events: SQL of the events with `fraction`, labels and features.
        rules: The schema.
        scratch: Folder for temporary files.
        past: SQL of earlier events, with the same columns but `fraction`; they are counted, and all lie
            before the first second of `events`.

    Returns:
        SQL of the events with the columns feature_NAME of the counters: null where a key is missing, and
        for a rate where nothing is known yet.
    """
    if not rules.counters:
        return events
    source, target = scratch / "uncounted.parquet", scratch / "counted.parquet"
    con.execute(f"COPY (SELECT * FROM {events}) TO {_quoted(source)} (FORMAT parquet)")
    rows = parquet_sql([source], file_row_number=True)
    columns, joins = [], []
    rates: dict[tuple[str, int], str] = {}  # what all of a label's past says, by label and delay
    for number, (name, counter) in enumerate(rules.counters.items()):
        sums = _count(
            con, rows, past, counter, rules.features, scratch / f"counter-{number}.parquet"
        )
        joins.append(f"LEFT JOIN {sums} AS c{number} ON c{number}.row = e.file_row_number")
        value = f"c{number}.{'positives' if counter.of != 'impression' else 'events'}::DOUBLE"
        if counter.is_rate:
            key = (counter.of, counter.known_after)
            if key not in rates:
                rates[key] = f"r{len(rates)}"
                whole = Counter.model_construct(
                    of=counter.of, by=[], known_after=counter.known_after
                )
                file = scratch / f"rate-{len(rates)}.parquet"
                sums = _count(con, rows, past, whole, rules.features, file)
                joins.append(
                    f"LEFT JOIN {sums} AS {rates[key]} ON {rates[key]}.row = e.file_row_number"
                )
            before = f"({rates[key]}.positives / nullif({rates[key]}.events, 0))"
            value = (
                f"(c{number}.positives + {counter.smoothing!r}::DOUBLE * {before}) "
                f"/ (c{number}.events + {counter.smoothing!r}::DOUBLE)"
            )
        columns.append(f"{value} AS feature_{name}")
    con.execute(
        f"COPY (SELECT e.* EXCLUDE (file_row_number), {', '.join(columns)} FROM {rows} AS e "
        f"{' '.join(joins)}) TO {_quoted(target)} (FORMAT parquet)"
    )
    for file in (source, *scratch.glob("counter-*.parquet"), *scratch.glob("rate-*.parquet")):
        file.unlink()
    return parquet_sql([target])


def _quoted(file: Path) -> str:
    return "'" + str(file).replace("'", "''") + "'"


def _count(
    con: duckdb.DuckDBPyConnection,
    rows: str,
    past: str | None,
    counter: Counter,
    features: Mapping[str, Feature],
    file: Path,
) -> str:
    """SQL of one counter's sums by row: `events` and their `positives` that the row may know of."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    keys = [f"key_{number}" for number in range(len(counter.by))]
    order = ", ".join([*keys, "second", "fraction", "step"])
    reader = con.execute(
        f"SELECT * FROM ({_moments(rows, past, counter, features)}) ORDER BY {order}"
    ).to_arrow_reader(BATCH_ROWS)
    form = pa.schema([(name, pa.int64()) for name in ("row", "events", "positives")])
    last: pa.Table | None = None
    sums = np.zeros((2, 1), dtype=np.int64)  # of the last key, to the end of the last batch
    with pq.ParquetWriter(file, form) as writer:
        for batch in reader:
            table = pa.Table.from_batches([batch])
            if len(table) == 0:
                continue
            # Without a key all rows share one.
            starts = _starts(table.select(keys), last) if keys else np.zeros(len(table), dtype=bool)
            known, sums = _running(table, starts, sums)
            asks = table["row"].is_valid().to_numpy()
            asked = [table["row"].to_numpy()[asks].astype(np.int64), *known[:, asks]]
            writer.write_table(pa.table(dict(zip(form.names, asked, strict=True)), schema=form))
            last = table.select(keys).slice(len(table) - 1)
    if any(key in features and features[key].kind == "ids" for key in counter.by):
        # Of a list: the sum over its different ids.
        total = "sum(events)::BIGINT AS events, sum(positives)::BIGINT AS positives"
        return f"(SELECT row, {total} FROM {parquet_sql([file])} GROUP BY row)"
    return parquet_sql([file])


def _moments(rows: str, past: str | None, counter: Counter, features: Mapping[str, Feature]) -> str:
    """SQL of where events ask (`row` is theirs), become known (+1) and are left behind (-1)."""
    columns, missing = [], []
    for number, key in enumerate(counter.by):
        column = f"{key}_id" if key in ROLES else f"feature_{key}"
        lists = key in features and features[key].kind == "ids" and key not in ROLES
        columns.append(f"{f'unnest(list_distinct({column}))' if lists else column} AS key_{number}")
        missing.append(f"{column} IS NOT NULL")
    label = {"impression": "0", "label": "label"}.get(counter.of, quote_name(f"label_{counter.of}"))
    columns += ["timestamp AS second", f"{label}::BIGINT AS positive"]
    present = f"WHERE {' AND '.join(missing)}" if missing else ""
    chosen = ", ".join(columns)
    found = f"SELECT {chosen}, fraction, file_row_number AS row FROM {rows} {present}"
    if past is not None:
        found += f" UNION ALL SELECT {chosen}, 0 AS fraction, NULL AS row FROM {past} {present}"
    keys = "".join(f"key_{number}, " for number in range(len(counter.by)))

    def at(delay: int, sign: int) -> str:
        fraction = str(END_OF_SECOND) if delay else "fraction"
        return (
            f"SELECT {keys}second + {delay} AS second, {fraction} AS fraction, 1 AS step, "
            f"NULL AS row, {sign}::BIGINT AS events, {sign} * positive AS positives FROM found"
        )

    legs = [
        f"SELECT {keys}second, fraction, 0 AS step, row, 0::BIGINT AS events, 0::BIGINT AS positives "
        "FROM found WHERE row IS NOT NULL",
        at(counter.known_after, 1),
    ]
    if counter.window is not None:
        legs.append(at(counter.window, -1))
    return f"WITH found AS ({found}) {' UNION ALL '.join(legs)}"


def _starts(keys: pa.Table, last: pa.Table | None) -> np.ndarray:
    """Whether a row's key is another than that of the row before, bool [n]."""
    import pyarrow as pa
    import pyarrow.compute as pc

    changed = np.zeros(len(keys), dtype=bool)
    whole = keys if last is None else pa.concat_tables([last, keys])
    for column in whole.columns:
        values = column.combine_chunks()
        differs = pc.not_equal(values.slice(1), values.slice(0, len(values) - 1))
        changed[len(keys) - len(differs) :] |= differs.to_numpy(zero_copy_only=False)
    return changed


def _running(
    table: pa.Table, starts: np.ndarray, before: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Sums of events and positives from each key's first row to each row, int64 [2, n]; the last ones.

    Args:
        table: Rows in order.
        starts: See `_starts`.
        before: Sums at the end of the rows before, [2, 1].
    """
    steps = np.stack([table[name].to_numpy() for name in ("events", "positives")])
    totals = before + np.cumsum(steps, axis=1)
    first = np.flatnonzero(starts)
    # What had been summed when the row's key began; the first key may have begun in an earlier batch.
    base = np.concatenate([np.zeros((2, 1), np.int64), totals[:, first] - steps[:, first]], axis=1)
    sums = totals - base[:, np.cumsum(starts)]
    return sums, sums[:, -1:]
