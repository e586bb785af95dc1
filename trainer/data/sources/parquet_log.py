"""Prepare anybody's own log: Parquet files and a YAML schema that says what their columns mean."""

from __future__ import annotations

import contextlib
import difflib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from llm_knowledge.errors import InputError
from llm_knowledge.parquet import parquet_sql
from trainer.data.dataset import (
    SPLITS,
    DatasetInfo,
    IdType,
    SplitInfo,
    event_schema,
    item_fields,
    read_footer,
)
from trainer.data.sources.log_schema import Catalogue, LogSchema, SplitChoice, load_schema
from trainer.data.sources.staging import Staging, finish, stage_log, time_quantile
from trainer.data.sources.writer import connect, output_directory, quote_name

if TYPE_CHECKING:
    import duckdb
    import pyarrow as pa

# Seconds of the year 5138: a larger "seconds" value is certainly of a finer unit.
LARGEST_SECONDS = 100_000_000_000


def parquet_inputs(raw: Path) -> list[Path]:
    """Parquet files of a path: the file itself, or all *.parquet below a folder, by name."""
    if raw.is_dir():
        files = sorted(raw.rglob("*.parquet"))
        if not files:
            raise InputError(f"{raw}: no *.parquet file in this folder")
        return files
    if not raw.exists():
        raise InputError(f"{raw}: no such file or folder")
    return [raw]


def require_column(file: Path, names: Sequence[str], wanted: str, role: str) -> None:
    """Raise InputError, with similar names, unless `wanted` is among a file's columns."""
    if wanted not in names:
        near = difflib.get_close_matches(wanted, names, n=3, cutoff=0.4)
        hint = f"did you mean {' or '.join(map(repr, near))}?" if near else f"it has {list(names)}"
        raise InputError(f"{file}: column {wanted!r} (for {role}) is missing; {hint}")


# ---------------------------------------------------------------- checks of the raw log


def _kind(column: pa.DataType) -> str:
    """Coarse type of a column: "int64", "string", "float", "bool", "time", or its own name."""
    import pyarrow.types as types

    if types.is_dictionary(column):
        column = column.value_type
    tests = {
        "int64": types.is_integer,
        "float": types.is_floating,
        "bool": types.is_boolean,
        "time": types.is_timestamp,
    }
    for name, test in tests.items():
        if test(column):
            return name
    text = (types.is_string, types.is_large_string, types.is_string_view)
    return "string" if any(test(column) for test in text) else str(column)


ALLOWED = {
    "user_id": ("int64", "string"),
    "item_id": ("int64", "string"),
    "scenario_id": ("int64", "string"),
    "timestamp": ("int64", "time"),
    "label": ("int64", "float", "bool"),
}


def _roles(schema: LogSchema) -> dict[str, str]:
    """Our column to the log's, further labels included."""
    further = {f"label_{name}": column for name, column in schema.labels.items()}
    return {**schema.columns.model_dump(), **further}


def _column_kinds(files: list[Path], columns: dict[str, str]) -> dict[str, str]:
    """Kind of each role's column, the same in every file."""
    kinds: dict[str, str] = {}
    for file in files:
        schema, _ = read_footer(file)
        for role, name in columns.items():
            require_column(file, schema.names, name, role)
            kind = _kind(schema.field(name).type)
            allowed = ALLOWED["label" if role.startswith("label") else role]
            if kind not in allowed:
                wanted = " or ".join(allowed).replace("time", "a timestamp type")
                raise InputError(
                    f"{file}: column {name!r} (for {role}) is {kind}, must be {wanted}"
                )
            if kinds.setdefault(role, kind) != kind:
                raise InputError(
                    f"{file}: column {name!r} is {kind}, but {kinds[role]} in {files[0]}; "
                    "give it one type in all files"
                )
    return kinds


def _select(schema: LogSchema, kinds: dict[str, str]) -> str:
    """SELECT list that turns the log's columns into ours."""
    names = {role: quote_name(name) for role, name in _roles(schema).items()}
    parts = []
    for role in ("user_id", "item_id", "scenario_id"):
        sql_type = "BIGINT" if kinds[role] == "int64" else "VARCHAR"
        parts.append(f"CAST({names[role]} AS {sql_type}) AS {role}")
    divisor = {"seconds": 1, "milliseconds": 1_000, "microseconds": 1_000_000}
    if kinds["timestamp"] == "time":
        parts.append(f"epoch_us({names['timestamp']}) // 1000000 AS timestamp")
    else:
        unit = divisor[schema.timestamp_unit]
        parts.append(f"CAST({names['timestamp']} AS BIGINT) // {unit} AS timestamp")
    labels = [role for role in names if role.startswith("label")]
    parts += [f"CAST({names[role]} AS TINYINT) AS {quote_name(role)}" for role in labels]
    return ", ".join(parts)


def _check_values(
    con: duckdb.DuckDBPyConnection, files: list[Path], schema: LogSchema, kinds: dict[str, str]
) -> None:
    """Nulls, NaN, labels other than 0 and 1, times of another unit, unknown scenarios."""
    names = {role: quote_name(name) for role, name in _roles(schema).items()}
    time = names["timestamp"]
    fill = "drop these rows or fill them"
    checks = [(role, f"{name} IS NULL", "null", fill) for role, name in names.items()]
    for role in (role for role in names if role.startswith("label")):
        label = names[role]
        if kinds[role] == "float":
            checks.append((role, f"isnan({label})", "NaN", "drop these rows or give a label"))
        if kinds[role] != "bool":
            remedy = "map the labels to 0 and 1 first"
            checks.append((role, f"{label} NOT IN (0, 1)", "not 0 or 1", remedy))
    if kinds["timestamp"] == "int64" and schema.timestamp_unit == "seconds":
        remedy = "set timestamp_unit: milliseconds or microseconds in the schema"
        checks.append(("timestamp", f"{time} > {LARGEST_SECONDS}", "too large for seconds", remedy))
    known = ", ".join(_literal(scenario.scenario_id) for scenario in schema.scenarios)
    remedy = "list it under scenarios in the schema, with a name and a description"
    unknown = f"{names['scenario_id']} NOT IN ({known})"
    checks.append(("scenario_id", unknown, "a scenario that the schema does not list", remedy))

    counts = ", ".join(f"count(*) FILTER (WHERE {test})" for _, test, _, _ in checks)
    found = con.execute(f"SELECT {counts} FROM {parquet_sql(files, union_by_name=True)}").fetchall()
    for count, (role, test, what, remedy) in zip(found[0], checks, strict=True):
        if count:
            file, row, value = con.execute(
                f"SELECT filename, file_row_number + 1, {names[role]} FROM "
                f"{parquet_sql(files, union_by_name=True, filename=True, file_row_number=True)} "
                f"WHERE {test} ORDER BY 1, 2 LIMIT 1"
            ).fetchall()[0]
            value = "" if value is None or value != value else f" ({value!r})"
            raise InputError(
                f"{file}: column {_roles(schema)[role]!r}, row {row} (the first is 1): "
                f"{what}{value}; {count} such rows in all; {remedy}"
            )


def _literal(value: int | str) -> str:
    return str(value) if isinstance(value, int) else "'" + value.replace("'", "''") + "'"


def _check_scenarios(schema: LogSchema, file: Path, kind: str) -> None:
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


def _check_pages(file: Path) -> None:
    """Read a whole Parquet file and keep nothing; InputError names the file if it is damaged."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(file) as parquet:
            for _ in parquet.iter_batches():
                pass
    except (pa.ArrowException, OSError) as error:
        reason = (str(error).splitlines() or ["unreadable"])[0]
        raise InputError(f"{file}: damaged ({reason}); copy or write it again") from None


# ---------------------------------------------------------------- the catalogue and the whole


def write_items(
    con: duckdb.DuckDBPyConnection, events: str, schema: LogSchema, base: Path, out: Path, kind: str
) -> None:
    """Items of the catalogue and of the log, sorted; an item without an entry has the title ""."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    sql_type = "BIGINT" if kind == "int64" else "VARCHAR"
    query = f"SELECT DISTINCT item_id, '' AS title, []::VARCHAR[] AS categories FROM {events}"
    if schema.catalogue is not None:
        entries = _catalogue_sql(con, schema.catalogue, base, kind, sql_type)
        query = (
            "SELECT item_id, coalesce(c.title, '') AS title, "
            "list_filter(coalesce(c.categories, []::VARCHAR[]), lambda x: x IS NOT NULL AND x <> '') "
            f"AS categories FROM (SELECT DISTINCT item_id FROM {events}) AS e "
            f"FULL JOIN {entries} AS c USING (item_id)"
        )
    target = pa.schema(item_fields(kind))
    reader = con.execute(f"{query} ORDER BY item_id").to_arrow_reader(65_536)
    with pq.ParquetWriter(out, target) as writer:
        for batch in reader:
            writer.write_table(pa.Table.from_batches([batch]).cast(target))


def _catalogue_sql(
    con: duckdb.DuckDBPyConnection, catalogue: Catalogue, base: Path, kind: str, sql_type: str
) -> str:
    """Check the catalogue; SQL of a relation (item_id, title, categories)."""
    files = parquet_inputs(base / catalogue.path)
    for file in files:
        found, _ = read_footer(file)
        wanted = {"item_id": catalogue.item_id, "title": catalogue.title}
        if catalogue.categories:
            wanted["categories"] = catalogue.categories
        for role, name in wanted.items():
            require_column(file, found.names, name, role)
        if _kind(found.field(catalogue.item_id).type) != kind:
            raise InputError(
                f"{file}: column {catalogue.item_id!r} is {found.field(catalogue.item_id).type}, "
                f"but the log's item ids are {kind}"
            )
    key, source = quote_name(catalogue.item_id), parquet_sql(files, union_by_name=True)
    twice = con.execute(
        f"SELECT {key}, count(*) FROM {source} GROUP BY 1 HAVING count(*) > 1 OR {key} IS NULL LIMIT 1"
    ).fetchall()
    if twice:
        what = "null" if twice[0][0] is None else f"{twice[0][0]!r} stands {twice[0][1]} times"
        raise InputError(
            f"{files[0].parent}: column {catalogue.item_id!r}: {what}; ids must be unique"
        )
    categories = "[]::VARCHAR[]"
    if catalogue.categories:
        categories = f"CAST({quote_name(catalogue.categories)} AS VARCHAR[])"
        if _kind(found.field(catalogue.categories).type) == "string":
            separator = _literal(catalogue.categories_separator)
            categories = f"string_split({quote_name(catalogue.categories)}, {separator})"
    return (
        f"(SELECT CAST({key} AS {sql_type}) AS item_id, "
        f"CAST({quote_name(catalogue.title)} AS VARCHAR) AS title, {categories} AS categories "
        f"FROM {source})"
    )


def _split_info(con: duckdb.DuckDBPyConnection, events: str, choice: SplitChoice) -> SplitInfo:
    shares = " / ".join(f"{choice.fractions[name]:.0%}" for name in SPLITS)
    if choice.rule == "per_user_time":
        text = f"Each user's events in order of time: {shares} profile, train, valid, test."
        return SplitInfo(
            rule=choice.rule,
            fractions=choice.fractions,
            held_out_users=choice.held_out_users,
            held_out_valid_users=choice.held_out_valid_users,
            text=text,
        )
    bounds, how = choice.boundaries, "Given boundaries"
    if bounds is None:
        past = [sum(choice.fractions[name] for name in SPLITS[: n + 1]) for n in range(3)]
        bounds, how = (
            [time_quantile(con, events, share) for share in past],
            f"{shares} of the events",
        )
    text = f"{how}; train, valid and test begin at {bounds} (seconds since 1970, UTC)."
    return SplitInfo(rule=choice.rule, fractions=choice.fractions, boundaries=bounds, text=text)


def _id_type(kind: str) -> IdType:
    return "int64" if kind == "int64" else "string"


@contextlib.contextmanager
def log_relation(
    con: duckdb.DuckDBPyConnection, raw: Path, rules: LogSchema, schema: Path
) -> Iterator[tuple[str, dict[str, str]]]:
    """Checks a log, and explains what goes wrong while it is read.

    Args:
        con: connection for the queries.
        raw: a Parquet file, or a folder of them.
        rules: content of the schema file.
        schema: the schema file, for messages.

    Yields:
        SQL of a relation with the columns of an event but `history`; the kind of each role's column.

    Raises:
        InputError: names file, column and row of what is wrong.
    """
    import duckdb

    files = parquet_inputs(raw)
    kinds = _column_kinds(files, _roles(rules))
    _check_scenarios(rules, schema, kinds["scenario_id"])
    try:
        _check_values(con, files, rules, kinds)
        yield (
            f"(SELECT {_select(rules, kinds)} FROM {parquet_sql(files, union_by_name=True)})",
            kinds,
        )
    except duckdb.DataError as error:
        raise InputError(f"{raw}: a value does not fit: {str(error).splitlines()[0]}") from error
    except duckdb.Error:
        for file in files:
            _check_pages(file)
        raise


def prepare_parquet(raw: Path, out: Path, schema: Path, memory: str = "2GB") -> DatasetInfo:
    """Prepare a log of one or many Parquet files, out of core.

    Args:
        raw: a Parquet file, or a folder of them.
        out: dataset directory to create.
        schema: YAML file, see `LogSchema`.
        memory: DuckDB's limit; beyond it, it spills beside `out`.

    Raises:
        InputError: names file, column and row of what is wrong; nothing is written then.
    """
    rules = load_schema(schema)
    with output_directory(out) as folder:
        con = connect(folder / "scratch", memory)
        with log_relation(con, raw, rules, schema) as (events, kinds):
            split = _split_info(con, events, rules.split)
            write_items(
                con, events, rules, schema.parent, folder / "items.parquet", kinds["item_id"]
            )
            user, item, scenario = (
                _id_type(kinds[role]) for role in ("user_id", "item_id", "scenario_id")
            )
            staging = Staging(
                folder / "scratch" / "staged",
                event_schema(user, item, scenario, labels=rules.labels),
            )
            stage_log(con, events, staging, folder / "scratch", split)
        info = DatasetInfo(
            name=rules.name,
            source={"kind": "parquet", "files": len(parquet_inputs(raw))},
            scenarios=rules.scenarios,
            user_id_type=user,
            item_id_type=item,
            scenario_id_type=scenario,
            extra_labels=list(rules.labels),
            split=split,
            negatives=rules.negatives,
            positive_name=rules.positive_name,
            negative_name=rules.negative_name,
        )
        return finish(con, staging, folder, info)
