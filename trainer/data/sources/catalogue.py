"""The catalogue of a prepared log: items.parquet, and how many of the log's items have a text."""

from __future__ import annotations

import html
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llm_knowledge.errors import InputError
from llm_knowledge.parquet import parquet_sql
from trainer.data.dataset import item_fields
from trainer.data.sources.log_schema import Catalogue, LogSchema
from trainer.data.sources.raw_columns import kind_of, literal, require_column
from trainer.data.sources.raw_files import RawFiles

if TYPE_CHECKING:
    import duckdb
    import pyarrow as pa

logger = logging.getLogger(__name__)

LOW_SHARE = 0.5  # of the logged items with a text; below it a warning


def write_items(
    con: duckdb.DuckDBPyConnection,
    events: str,
    schema: LogSchema,
    base: Path,
    out: Path,
    kind: str,
    scratch: Path,
) -> None:
    """Writes the items of the catalogue and of the log, by id; an item without an entry has the title "".

    Args:
        con: Connection.
        events: SQL of the log's events.
        schema: Names the catalogue.
        base: Folder that the catalogue's path starts from.
        out: The file to write.
        kind: Of the log's item ids: "int64" or "string".
        scratch: Folder for temporary files.

    Raises:
        InputError: The catalogue is unreadable, lacks a column, or has an id twice.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    query = f"SELECT DISTINCT item_id, '' AS title, []::VARCHAR[] AS categories FROM {events}"
    unescape = False
    if schema.catalogue is not None:
        entries = _read_catalogue(con, schema.catalogue, base, kind, scratch / "catalogue.parquet")
        query = (
            "SELECT item_id, coalesce(c.title, '') AS title, "
            "coalesce(c.categories, []::VARCHAR[]) AS categories "
            f"FROM (SELECT DISTINCT item_id FROM {events}) AS e "
            f"FULL JOIN {entries} AS c USING (item_id)"
        )
        unescape = schema.catalogue.unescape_html
    target = pa.schema(item_fields(kind))
    reader = con.execute(f"{query} ORDER BY item_id").to_arrow_reader(65_536)
    with pq.ParquetWriter(out, target, write_page_checksum=True) as writer:
        for batch in reader:
            table = pa.Table.from_batches([batch]).cast(target)
            writer.write_table(_clean(table, unescape))


def _clean(table: pa.Table, unescape: bool) -> pa.Table:
    """Strips categories and drops empty ones; unescapes HTML entities where that is asked for."""
    import pyarrow as pa

    def text(value: str) -> str:
        return html.unescape(value) if unescape else value

    categories = [
        [name for name in (text(entry).strip() for entry in entries if entry is not None) if name]
        for entries in table["categories"].to_pylist()
    ]
    titles = [text(title) for title in table["title"].to_pylist()]
    columns = [
        table["item_id"],
        pa.array(titles, pa.string()),
        pa.array(categories, pa.list_(pa.string())),
    ]
    return pa.table(columns, schema=table.schema)


def _read_catalogue(
    con: duckdb.DuckDBPyConnection, catalogue: Catalogue, base: Path, kind: str, copy: Path
) -> str:
    """Checks the catalogue and copies what is read of it; SQL of (item_id, title, categories)."""
    raw = RawFiles.open(base / catalogue.path)
    columns = {"item_id": catalogue.item_id, "title": catalogue.title}
    if catalogue.categories:
        columns["categories"] = catalogue.categories
    if catalogue.since:
        columns["since"] = catalogue.since
    for file, schema in zip(raw.files, raw.schemas, strict=True):
        for role, name in columns.items():
            require_column(file, schema.names, name, f"{role} of the catalogue")
        types = {
            role: schema.field(schema.names.index(name)).type for role, name in columns.items()
        }
        if kind_of(types["item_id"]) != kind:
            raise InputError(
                f"{file}: column {catalogue.item_id!r} is {types['item_id']}, but the log's item ids are "
                f"{kind}"
            )
        for role, needed in (("title", "text"), ("categories", "text or a list of texts")):
            if role in types and not _is_text(types[role], lists=role == "categories"):
                raise InputError(
                    f"{file}: column {columns[role]!r} (for {role} of the catalogue) is {types[role]}, must "
                    f"be {needed}"
                )

    def lists(column: str, type_: Any) -> str:
        if kind_of(type_) == "string":
            return f"string_split({column}, {literal(catalogue.categories_separator)})"
        return f"CAST({column} AS VARCHAR[])"

    source = raw.sql(columns, {"categories": lists})
    logger.info("%s: catalogue of %s rows in %s files", raw.path, f"{raw.rows:,}", len(raw.files))
    with raw.explained():
        if catalogue.since:
            first = "row_number() OVER (PARTITION BY item_id ORDER BY since) = 1"
            source = f"(SELECT * FROM {source} QUALIFY {first})"
        twice = con.execute(
            f"SELECT item_id, count(*) FROM {source} GROUP BY 1 "
            "HAVING count(*) > 1 OR item_id IS NULL LIMIT 1"
        ).fetchall()
        if twice:
            what = "null" if twice[0][0] is None else f"{twice[0][0]!r} stands {twice[0][1]} times"
            raise InputError(
                f"{raw.path}: column {catalogue.item_id!r}: {what}; ids must be unique"
            )
        sql_type = "BIGINT" if kind == "int64" else "VARCHAR"
        categories = "categories" if catalogue.categories else "[]::VARCHAR[]"
        target = str(copy).replace("'", "''")
        con.execute(
            f"COPY (SELECT CAST(item_id AS {sql_type}) AS item_id, CAST(title AS VARCHAR) AS title, "
            f"{categories} AS categories FROM {source}) TO '{target}' (FORMAT parquet)"
        )
    return parquet_sql([copy])


def _is_text(column: pa.DataType, lists: bool) -> bool:
    """Whether a column holds texts, numbers that stand for themselves, or nothing; `lists` of them too."""
    import pyarrow.types as types

    if lists and (types.is_list(column) or types.is_large_list(column)):
        column = column.value_type
    elif lists and kind_of(column) == "int64":
        return False
    return kind_of(column) in ("string", "int64", "null")


def check_texts(
    con: duckdb.DuckDBPyConnection, events: str, items: Path, schema: LogSchema, where: Path
) -> None:
    """Says how many of the log's items have a text.

    Args:
        con: Connection.
        events: SQL of the log's events.
        items: items.parquet, with the catalogue and all items of the log.
        schema: Says whether there is a catalogue.
        where: The schema file, for messages.

    Raises:
        InputError: There is a catalogue and none has: its ids are spelled otherwise, or it is another's.
    """
    if schema.catalogue is None:
        logger.warning("%s: names no catalogue, so no item has a text for prompts", where)
        return
    catalogue = parquet_sql([items])
    logged, known = con.execute(
        "SELECT count(*), count(*) FILTER (WHERE title <> '' OR len(categories) > 0) "
        f"FROM (SELECT DISTINCT item_id FROM {events}) JOIN {catalogue} USING (item_id)"
    ).fetchall()[0]
    share = known / max(logged, 1)
    column = f"{where.parent / schema.catalogue.path}: column {schema.catalogue.item_id!r}"
    said = f"{known:,} of {logged:,} items of the log ({share:.0%}) have a text in the catalogue"
    logger.info("%s", said)
    if known == logged:
        return
    hint = _spelled_otherwise(con, events, catalogue)
    if known == 0:
        raise InputError(
            f"{column}: {said}; {hint or 'is it the catalogue of another log?'}; give the catalogue whose "
            "ids are those of the log, or leave it out"
        )
    if share < LOW_SHARE or hint:
        logger.warning("%s: only %s%s", column, said, f"; {hint}" if hint else "")


def _spelled_otherwise(con: duckdb.DuckDBPyConnection, events: str, catalogue: str) -> str:
    """Items of the log that the catalogue has in another spelling, in words; "" if there are none."""
    plain = "nullif(ltrim(lower(trim(CAST(item_id AS VARCHAR))), '0 '), '')"
    rows = con.execute(
        f"SELECT count(*), any_value(l.item_id ORDER BY l.item_id), any_value(c.item_id ORDER BY l.item_id) "
        f"FROM (SELECT item_id, {plain} AS plain FROM {catalogue} WHERE title = '' AND len(categories) = 0 "
        f"AND item_id IN (SELECT item_id FROM {events})) AS l "
        f"JOIN (SELECT item_id, {plain} AS plain FROM {catalogue} WHERE title <> '') AS c USING (plain)"
    ).fetchall()
    count, logged, known = rows[0]
    if not count:
        return ""
    return f"{count:,} are there in another spelling: {known!r} for {logged!r}; spell them alike"
