"""Tables beside the log, joined to its events by user or item: as of the event where they say since when."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llm_knowledge.errors import InputError
from trainer.data.dataset import FeatureInfo
from trainer.data.sources.feature_columns import (
    cast_to,
    check_feature_values,
    describe_features,
    feature_casts,
    feature_columns,
    report_unread,
)
from trainer.data.sources.log_checks import LARGEST_SECONDS, whole_seconds
from trainer.data.sources.log_schema import Catalogue, LogSchema, Users
from trainer.data.sources.raw_columns import kind_of, literal, require_column
from trainer.data.sources.raw_files import RawFiles

if TYPE_CHECKING:
    import duckdb

Casts = dict[str, Callable[[str, Any], str]]


def table_features(source: str, rules: LogSchema, schema: Path) -> dict[str, FeatureInfo]:
    """What the features of a table are: catalogue or users.

    Raises:
        InputError: A column is missing or of a wrong kind.
    """
    raw = RawFiles.open(schema.parent / rules.tables[source].path)
    of_table = {name: one for name, one in rules.features.items() if one.source == source}
    return describe_features(raw, of_table)


def join_table(
    con: duckdb.DuckDBPyConnection,
    events: str,
    source: str,
    kinds: dict[str, str],
    rules: LogSchema,
    schema: Path,
) -> tuple[str, dict[str, FeatureInfo]]:
    """Joins a table's features by its key; an event without an entry has none.

    Of a table with `since`, an event gets the newest row whose second is before the event's.

    Args:
        con: Connection.
        events: SQL of the log's events.
        source: catalogue or users.
        kinds: Kind of each role's column of the log.
        rules: The schema.
        schema: Its file.

    Returns:
        SQL of the events with these features, and what they are.

    Raises:
        InputError: A column is missing or of a wrong kind, two rows hold for one key at one time, no id is
            one of the log's, or a value is one that no model takes; names file, column and row.
    """
    table = rules.tables[source]
    raw = RawFiles.open(schema.parent / table.path)
    of_table = {name: one for name, one in rules.features.items() if one.source == source}
    features = describe_features(raw, of_table)
    named = [_key_column(table), table.since or ""]
    if isinstance(table, Catalogue):
        named += [table.title, table.categories or ""]
    report_unread(raw, [*named, *feature_columns(features).values()], rules, schema)
    if not features and table.since is None:
        return events, features
    key = "item_id" if source == "catalogue" else "user_id"
    _check_columns(raw, table, kinds[key])
    columns = {key: _key_column(table), **feature_columns(features)}
    casts = {
        key: cast_to("BIGINT" if kinds[key] == "int64" else "VARCHAR"),
        **feature_casts(features, of_table),
    }
    if table.since is not None:
        columns["since"] = table.since
        casts["since"] = _seconds_or_null(rules)
    with raw.explained():
        check_feature_values(con, raw, features, of_table)
        _check_rows(con, raw, table, key, columns, casts)
        if features:
            _check_known(con, events, raw, table, key, columns, casts)
    joined = raw.sql(columns, casts)
    if not features:
        return events, features
    if table.since is None:
        return f"(SELECT * FROM {events} LEFT JOIN {joined} USING ({key}))", features
    return (
        f"(SELECT e.*, t.* EXCLUDE ({key}, since) FROM {events} AS e ASOF LEFT JOIN {joined} AS t "
        f"ON e.{key} = t.{key} AND e.timestamp > t.since)"
    ), features


def _seconds_or_null(rules: LogSchema) -> Callable[[str, str], str]:
    """SQL of a time in seconds; `whole_seconds` would make the largest number of a null."""
    seconds = whole_seconds(rules.timestamp_unit)
    return lambda column, kind: f"CASE WHEN {column} IS NOT NULL THEN {seconds(column, kind)} END"


def _key_column(table: Catalogue | Users) -> str:
    return table.item_id if isinstance(table, Catalogue) else table.user_id


def _check_columns(raw: RawFiles, table: Catalogue | Users, kind: str) -> None:
    key = _key_column(table)
    for file, schema in zip(raw.files, raw.schemas, strict=True):
        require_column(file, schema.names, key, "the key")
        found = schema.field(schema.names.index(key)).type
        if kind_of(found) != kind:
            raise InputError(
                f"{file}: column {key!r} is {found}, but the log's ids are {kind}; cast one"
            )
        if table.since is not None:
            require_column(file, schema.names, table.since, "since")
            found = schema.field(schema.names.index(table.since)).type
            if kind_of(found) not in ("int64", "time"):
                raise InputError(
                    f"{file}: column {table.since!r} (since) is {found}, must be integers in the log's "
                    "timestamp_unit, or timestamps"
                )


def _check_rows(
    con: duckdb.DuckDBPyConnection,
    raw: RawFiles,
    table: Catalogue | Users,
    key: str,
    columns: dict[str, str],
    casts: Casts,
) -> None:
    """Refuses a row without key or time, a time of another unit, and two rows of one key and time."""
    at = [key, *(["since"] if table.since is not None else [])]
    tests = [(name, f"{name} IS NULL", "null", "drop these rows or fill them") for name in at]
    if table.since is not None:
        mend = "give the column in the log's timestamp_unit"
        tests.append(("since", f"since > {LARGEST_SECONDS}", "a time after the year 5000", mend))
    twice = con.execute(
        f"SELECT {', '.join(at)}, count(*) FROM {raw.sql(columns, casts)} "
        f"GROUP BY {', '.join(at)} HAVING count(*) > 1 ORDER BY {', '.join(at)} LIMIT 1"
    ).fetchone()
    if twice is not None and None not in twice:
        same = " AND ".join(
            f"{name} = {literal(value)}" for name, value in zip(at, twice[:-1], strict=True)
        )
        what = f"{twice[-1]} rows of one {' and '.join(columns[name] for name in at)}"
        tests.append((key, same, what, "keep one of them"))
    for name, test, what, remedy in tests:
        (count,) = con.execute(
            f"SELECT count(*) FROM {raw.sql(columns, casts)} WHERE {test}"
        ).fetchall()[0]
        if count:
            file, row, value = raw.first_row(con, columns, casts, test, name)
            shown = "" if value is None else f" ({value!r})"
            raise InputError(
                f"{file}: column {columns[name]!r}, row {row} (the first is 1): {what}{shown}; {remedy}"
            )


def _check_known(
    con: duckdb.DuckDBPyConnection,
    events: str,
    raw: RawFiles,
    table: Catalogue | Users,
    key: str,
    columns: dict[str, str],
    casts: Casts,
) -> None:
    """Refuses a table that has none of the log's ids."""
    (known,) = con.execute(
        f"SELECT count(*) FROM (SELECT {key} FROM {events} INTERSECT "
        f"SELECT {key} FROM {raw.sql(columns, casts)})"
    ).fetchall()[0]
    if not known:
        raise InputError(
            f"{raw.path}: column {_key_column(table)!r}: none of the ids is in the log; is it the table of "
            "another log, or are the ids spelled otherwise?"
        )
