"""Paths of Parquet files for query engines, whose readers take a path for a pattern and for columns."""

import re
from collections.abc import Iterable
from pathlib import Path


def escape_glob(text: str) -> str:
    """Text that, as a pattern of pathlib or DuckDB, matches itself alone."""
    return re.sub(r"[*?\[]", r"[\g<0>]", text)


def parquet_sql(files: Iterable[Path], **options: bool) -> str:
    """DuckDB's SQL text of a table made of exactly these files and of nothing but their columns.

    No pattern in a name is expanded, and folders named `column=value` neither add nor replace columns.
    """
    names = ", ".join("'" + escape_glob(str(f)).replace("'", "''") + "'" for f in files)
    extra = "".join(f", {name}={str(value).lower()}" for name, value in options.items())
    return f"read_parquet([{names}], hive_partitioning=false{extra})"


def spark_path(file: Path) -> str:
    """A path for Spark's readers that matches this file alone.

    Below a file that is given by its own path Spark looks for no `column=value` folders.
    """
    return re.sub(r"[\\*?\[\]{}]", r"\\\g<0>", str(file))
