"""What a raw log must be: columns of the right kinds, no nulls, labels 0 and 1, times of one unit."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llm_knowledge.errors import InputError
from trainer.data.sources.log_schema import LogSchema
from trainer.data.sources.raw_columns import kind_of, literal, require_column
from trainer.data.sources.raw_files import RawFiles

if TYPE_CHECKING:
    import duckdb
    import pyarrow as pa

logger = logging.getLogger(__name__)

ALLOWED = {
    "user_id": ("int64", "string"),
    "item_id": ("int64", "string"),
    "scenario_id": ("int64", "string"),
    "timestamp": ("int64", "time"),
    "order": ("int64",),
    "label": ("int64", "float", "bool"),
}
UNITS = {"seconds": 1, "milliseconds": 10**3, "microseconds": 10**6, "nanoseconds": 10**9}
NANOSECONDS = 10**9
LARGEST_INTEGER = 2**63 - 1
# Seconds of 1973, 2001, 2100 and 5138. A clock of a log shows times from the first to the third; beyond
# the fourth a value is certainly of a finer unit.
CLOCK_FROM, CLOCK_SURE, CLOCK_TO, LARGEST_SECONDS = (
    100_000_000,
    1_000_000_000,
    4_100_000_000,
    100_000_000_000,
)


def log_columns(schema: LogSchema) -> dict[str, str]:
    """Our column to the log's, further labels included; without what the log does not have."""
    roles = {role: name for role, name in schema.columns.model_dump().items() if name is not None}
    return roles | {f"label_{name}": column for name, column in schema.labels.items()}


def column_kinds(raw: RawFiles, columns: dict[str, str]) -> dict[str, str]:
    """Kind of each role's column, the same in every file.

    Raises:
        InputError: names the file and the column that is missing, there twice, or of a wrong kind.
    """
    kinds: dict[str, str] = {}
    for file, schema in zip(raw.files, raw.schemas, strict=True):
        for role, name in columns.items():
            require_column(file, schema.names, name, role)
            kind = kind_of(schema.field(schema.names.index(name)).type)
            allowed = ALLOWED["label" if role.startswith("label") else role]
            if kind not in allowed:
                needed = " or ".join(allowed).replace("time", "a timestamp type")
                raise InputError(
                    f"{file}: column {name!r} (for {role}) is {kind}, must be {needed}"
                )
            if kinds.setdefault(role, kind) != kind:
                raise InputError(
                    f"{file}: column {name!r} is {kind}, but {kinds[role]} in {raw.files[0]}; "
                    "give it one type in all files"
                )
    return kinds


def whole_seconds(unit: str) -> Callable[[str, Any], str]:
    """SQL of the seconds since 1970 of a time column; integers are of `unit`, zones are minded."""

    def expression(column: str, kind: pa.DataType) -> str:
        ticks, per_second = _ticks(column, kind, unit)
        return f"({ticks} // {per_second} - ({ticks} % {per_second} < 0)::INT)"

    return expression


def nanoseconds_within(unit: str) -> Callable[[str, Any], str]:
    """SQL of what a time column shows beyond whole seconds, in nanoseconds."""

    def expression(column: str, kind: pa.DataType) -> str:
        ticks, per_second = _ticks(column, kind, unit)
        rest = f"({ticks} % {per_second} + {per_second}) % {per_second}"
        return f"({rest}) * {NANOSECONDS // per_second}"

    return expression


def _ticks(column: str, kind: pa.DataType, unit: str) -> tuple[str, int]:
    """SQL of a time as an integer, and its ticks per second."""
    if kind_of(kind) != "time":
        # What an unsigned integer can hold beyond is refused as too large in any unit.
        return f"CAST(least({column}, {LARGEST_INTEGER}) AS BIGINT)", UNITS[unit]
    if kind.unit == "ns" and kind.tz is None:  # with a zone DuckDB knows microseconds only
        return f"epoch_ns({column})", NANOSECONDS
    return f"epoch_us({column})", 10**6


@dataclass(frozen=True)
class Check:
    """What no row may be: an SQL test over our columns, in words, with what to do about it."""

    role: str
    test: str
    problem: str
    remedy: str


def check_values(
    con: duckdb.DuckDBPyConnection, raw: RawFiles, schema: LogSchema, kinds: dict[str, str]
) -> None:
    """Refuses nulls, NaN, labels other than 0 and 1, times of another unit, and unknown scenarios.

    Raises:
        InputError: names the file, the column, the row and the value.
    """
    columns = log_columns(schema)
    as_sql: dict[str, Callable[[str, Any], str]] = {}
    checks = [
        Check(role, f'"{role}" IS NULL', "null", "drop these rows or fill them") for role in columns
    ]
    problem, remedy = "too large for a signed 64-bit integer", "write such ids as text"
    for role, kind in kinds.items():
        if kind == "int64" and role.endswith("_id"):
            checks.append(Check(role, f'"{role}" > {LARGEST_INTEGER}', problem, remedy))
    for role in (role for role in columns if role.startswith("label")):
        if kinds[role] == "float":
            checks.append(Check(role, f'isnan("{role}")', "NaN", "drop these rows or give a label"))
        if kinds[role] != "bool":
            remedy = "map the labels to 0 and 1 first"
            checks.append(Check(role, f'"{role}" NOT IN (0, 1)', "not 0 or 1", remedy))
    known = ", ".join(literal(scenario.scenario_id) for scenario in schema.scenarios)
    problem = "a scenario that the schema does not list"
    remedy = "list it under scenarios in the schema, with a name and a description"
    checks.append(Check("scenario_id", f"scenario_id NOT IN ({known})", problem, remedy))
    if "timestamp" in columns:
        columns |= {"second": columns["timestamp"]}
        # Of parts with and without zones or of several units, each is read in its own terms.
        as_sql = {
            "second": whole_seconds(schema.timestamp_unit),
            "timestamp": lambda column, kind: _ticks(column, kind, schema.timestamp_unit)[0],
        }
        checks += _unit_checks(schema, kinds["timestamp"])
        checks += _missing_times(con, raw.sql(columns, as_sql))
    _run_checks(con, raw, columns, as_sql, checks)


def _unit_checks(schema: LogSchema, kind: str) -> list[Check]:
    """Tests of each row's time by itself: of another unit than the schema says."""
    remedy = "give the unit of the column as timestamp_unit in the schema, one unit in all files"
    if kind == "time":
        remedy = "the column was made from numbers of another unit; make it again"
    large = "a time after the year 5000"
    if kind == "int64":
        large += f", too large for {schema.timestamp_unit}"
    checks = [Check("timestamp", f"second > {LARGEST_SECONDS}", large, remedy)]
    if kind == "int64":
        problem = "the largest number there is, or beyond it"
        checks.append(Check("timestamp", f"timestamp >= {LARGEST_INTEGER}", problem, remedy))
        said = UNITS[schema.timestamp_unit]
        for unit, per_second in UNITS.items():
            if per_second < said:
                low, high = (edge * per_second // said for edge in (CLOCK_FROM, CLOCK_TO))
                text = f"a time of 1970 in {schema.timestamp_unit}, but of today in {unit}"
                test = f"timestamp // {per_second} BETWEEN {CLOCK_FROM} AND {CLOCK_TO}"
                checks.append(
                    Check("timestamp", f"second BETWEEN {low} AND {high} AND {test}", text, remedy)
                )
    return checks


def _missing_times(con: duckdb.DuckDBPyConnection, table: str) -> list[Check]:
    """A test for times that cannot belong to a log whose newest event is of this century."""
    (newest,) = con.execute(f"SELECT max(second) FROM {table}").fetchone() or (None,)
    if newest is None or not CLOCK_SURE <= newest <= LARGEST_SECONDS:
        if newest is not None and newest < CLOCK_FROM:
            logger.warning(
                "the newest event is %s seconds after 1 January 1970: if the column is an order and no "
                "clock, name it as columns.order in the schema",
                newest,
            )
        return []
    problem = "a time before 1973 in a log of this century, as 0 or a missing time is read"
    return [Check("timestamp", f"second < {CLOCK_FROM}", problem, "drop these rows or mend them")]


def _run_checks(
    con: duckdb.DuckDBPyConnection,
    raw: RawFiles,
    columns: dict[str, str],
    as_sql: dict[str, Callable[[str, Any], str]],
    checks: list[Check],
) -> None:
    counts = ", ".join(f"count(*) FILTER (WHERE {check.test})" for check in checks)
    bad_rows = con.execute(f"SELECT {counts} FROM {raw.sql(columns, as_sql)}").fetchall()[0]
    for count, check in zip(bad_rows, checks, strict=True):
        if count:
            others = {name: way for name, way in as_sql.items() if name != check.role}
            value = (
                f'CAST("{check.role}" AS VARCHAR)' if check.role in as_sql else f'"{check.role}"'
            )
            file, row, value = raw.first_row(con, columns, others, check.test, value)
            shown = "" if value is None or value != value else f" ({value})"
            raise InputError(
                f"{file}: column {columns[check.role]!r}, row {row} (the first is 1): "
                f"{check.problem}{shown}; {count} such rows in all; {check.remedy}"
            )


def check_labels(
    con: duckdb.DuckDBPyConnection, raw: RawFiles, schema: LogSchema, where: Path
) -> None:
    """Refuses to sample negatives for a log that has its own; warns of a log of one class.

    Raises:
        InputError: names the schema file and the number of negatives.
    """
    if schema.columns.label is None:
        return
    table = raw.sql({"label": schema.columns.label})
    query = f"SELECT count(*) FILTER (WHERE label::INT = 0), count(*) FROM {table}"
    negatives, rows = con.execute(query).fetchall()[0]
    if schema.samples_negatives and negatives:
        raise InputError(
            f"{where}: negatives.per_positive: the log has {negatives:,} rows of label 0 of its own; sample "
            "for a log of positives only, or leave negatives out"
        )
    if not schema.samples_negatives and negatives in (0, rows):
        logger.warning(
            "%s: every label is %d: nothing can be learned or measured; a log of positives needs "
            "negatives.per_positive in the schema",
            raw.path,
            0 if negatives else 1,
        )


def check_scenarios(schema: LogSchema, file: Path, kind: str) -> None:
    """Refuses a schema that lists a scenario twice, or ids of another type than the log's.

    Raises:
        InputError: names the schema file and the id.
    """
    ids = [scenario.scenario_id for scenario in schema.scenarios]
    if len(set(ids)) != len(ids):
        raise InputError(f"{file}: scenarios: a scenario_id is listed twice")
    wrong = [value for value in ids if isinstance(value, int) != (kind == "int64")]
    if wrong:
        raise InputError(
            f"{file}: scenarios: scenario_id {wrong[0]!r} is {type(wrong[0]).__name__}, "
            f"but the log's column {schema.columns.scenario_id!r} is {kind}; "
            "write it with or without quotes accordingly"
        )
