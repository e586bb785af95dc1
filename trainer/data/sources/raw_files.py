"""A user's own Parquet files: which of a folder are read, and columns by their exact names."""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llm_knowledge.dataset_files import check_pages
from llm_knowledge.errors import InputError
from llm_knowledge.parquet import parquet_sql
from trainer.data.dataset import read_footer
from trainer.data.sources.writer import quote_name

if TYPE_CHECKING:
    import duckdb
    import pyarrow as pa

logger = logging.getLogger(__name__)

PARQUET_SUFFIXES = (".parquet", ".parq", ".pq")
# Rows in a form that is not read: to leave such a file out without a word would lose them.
OTHER_ROWS = {
    *(".csv", ".tsv", ".json", ".jsonl", ".ndjson", ".orc", ".avro", ".feather", ".arrow"),
    *(".gz", ".zst", ".bz2", ".xz", ".zip", ".tar", ".tgz", ".crdownload", ".part"),
}


# ---------------------------------------------------------------- which files


def parquet_inputs(raw: Path) -> list[Path]:
    """The Parquet files of a path: the file itself, or those below a folder, by name.

    Below a folder everything that is Parquet by its suffix, in any case, or by its first bytes is read,
    through links too, each file once. Names that begin with `.` or `_` are left out, as Spark and
    Jupyter mean them. Other files are named in a warning.

    Raises:
        InputError: There is none; a file holds rows in another form, or is no regular file.
    """
    if not raw.exists():
        raise InputError(f"{raw}: no such file or folder")
    if not raw.is_dir():
        if not raw.is_file():
            raise InputError(f"{raw}: is no regular file; give a Parquet file or a folder of them")
        return [raw]
    files: list[Path] = []
    others: list[Path] = []
    for file in sorted(_walk(raw)):
        (files if _is_parquet(file) else others).append(file)
    rows = [file for file in others if file.suffix.lower() in OTHER_ROWS]
    if rows:
        raise InputError(
            f"{rows[0]}: is not Parquet, so its rows would be left out ({len(rows)} such files below "
            f"{raw}); write it as Parquet, or move it elsewhere"
        )
    if not files:
        raise InputError(f"{raw}: no *.parquet file in this folder")
    if others:
        names = ", ".join(str(file.relative_to(raw)) for file in others[:3])
        logger.warning("%s: %d files are not Parquet and not read: %s", raw, len(others), names)
    return files


def _walk(folder: Path) -> Iterator[Path]:
    """Files below a folder, linked ones and those of linked folders included, each once."""
    seen = {os.path.realpath(folder)}
    for parent, folders, names in os.walk(folder, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith((".", "_")))
        for name in sorted(names):
            file = Path(parent, name)
            if name.startswith((".", "_")):
                continue
            true_path = os.path.realpath(file)
            if true_path in seen:
                logger.warning("%s: is a link to a file that is read already", file)
                continue
            seen.add(true_path)
            yield file
        # A link to a folder above would be followed for ever.
        inside = {name: os.path.realpath(os.path.join(parent, name)) for name in folders}
        folders[:] = [name for name in folders if inside[name] not in seen]
        seen.update(inside.values())


def _is_parquet(file: Path) -> bool:
    if file.suffix.lower() in PARQUET_SUFFIXES:
        if file.exists() and not file.is_file():
            raise InputError(f"{file}: is no regular file; give Parquet files only")
        return True
    if not file.is_file():
        return False
    try:
        with file.open("rb") as content:
            return content.read(4) == b"PAR1"
    except OSError as error:
        raise InputError(f"{file}: cannot be read ({error.strerror})") from None


# ---------------------------------------------------------------- their columns


@dataclass(frozen=True)
class RawFiles:
    """Parquet files and their footers.

    DuckDB takes `label` and `Label` for one column, even in quotes, and adds columns of its own that may
    have a user's name. So columns are addressed by their place in each file, never by name.

    Attributes:
        path: What the user gave.
        files: The files, by name.
        schemas: Arrow schema of each.
        rows: In all.
    """

    path: Path
    files: list[Path]
    schemas: list[pa.Schema]
    rows: int

    @classmethod
    def open(cls, path: Path) -> RawFiles:
        """Finds the files and reads their footers.

        Raises:
            InputError: See `parquet_inputs`; or a file is truncated or no Parquet.
        """
        files = parquet_inputs(path)
        footers = [read_footer(file) for file in files]
        return cls(path, files, [schema for schema, _ in footers], sum(n for _, n in footers))

    def sql(
        self,
        columns: Mapping[str, str],
        as_sql: Mapping[str, Callable[[str, Any], str]] | None = None,
    ) -> str:
        """SQL of one table made of all files.

        Args:
            columns: Column of the table to the exact name of the column in the files.
            as_sql: For some of these, what makes an expression of the column's SQL and its Arrow type,
                in the terms of each file: parts may differ in units and zones.
        """
        as_sql = as_sql or {}
        legs = []
        for _, members in itertools.groupby(
            zip(self.schemas, self.files, strict=True),
            key=lambda pair: str(pair[0].remove_metadata()),
        ):
            pairs = list(members)
            schema = pairs[0][0]
            picked = []
            for alias, name in columns.items():
                index = schema.names.index(name)
                expression = as_sql.get(alias, lambda sql, kind: sql)
                picked.append(
                    f"{expression(f'c{index}', schema.field(index).type)} AS {quote_name(alias)}"
                )
            names = ", ".join(f"c{index}" for index in range(len(schema)))
            legs.append(
                f"SELECT {', '.join(picked)} FROM {parquet_sql([file for _, file in pairs])} AS raw({names})"
            )
        return f"({' UNION ALL '.join(legs)})"

    def first_row(
        self,
        con: duckdb.DuckDBPyConnection,
        columns: Mapping[str, str],
        as_sql: Mapping[str, Callable[[str, Any], str]],
        test: str,
        value: str,
    ) -> tuple[Path, int, Any]:
        """File, row (the first is 1) and value of the first row of which a test is true.

        Args:
            con: Connection.
            columns: See `sql`.
            as_sql: See `sql`.
            test: SQL condition over the table's columns.
            value: SQL expression of the value to show.
        """
        con.execute("SET preserve_insertion_order = true")
        try:
            for file, schema in zip(self.files, self.schemas, strict=True):
                alone = RawFiles(file, [file], [schema], 0)
                row = con.execute(
                    f"SELECT number, {value} FROM (SELECT *, row_number() OVER () AS number "
                    f"FROM {alone.sql(columns, as_sql)}) WHERE {test} ORDER BY number LIMIT 1"
                ).fetchone()
                if row is not None:
                    return file, row[0], row[1]
        finally:
            con.execute("SET preserve_insertion_order = false")
        raise AssertionError(f"no row of {self.path} is {test}")

    @contextlib.contextmanager
    def explained(self) -> Iterator[None]:
        """Turns what DuckDB says about these files' content into one message with the file's name.

        Raises:
            InputError: A value does not fit, or a file is damaged or written in a way DuckDB cannot read.
        """
        import duckdb

        try:
            yield
        except duckdb.DataError as error:
            raise InputError(f"{self.path}: a value does not fit: {_first_line(error)}") from error
        except (duckdb.OutOfMemoryException, duckdb.BinderException, duckdb.ParserException):
            raise
        except duckdb.Error as error:
            if "No space left" in str(error) or "max_temp_directory_size" in str(error):
                raise
            for file in self.files:
                check_pages(file)
            raise InputError(
                f"{self.path}: DuckDB cannot read it: {_first_line(error)}; write the file again, with plain "
                "encoding and valid UTF-8"
            ) from error


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or ["unreadable"])[0]
