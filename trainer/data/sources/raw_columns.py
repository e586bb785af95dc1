"""Columns of raw Parquet files: whether they are there, and of what kind."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from llm_knowledge.errors import InputError

if TYPE_CHECKING:
    import pyarrow as pa


def require_column(file: Path, names: Sequence[str], column: str, role: str) -> None:
    """Refuses, with similar names, a file that does not have exactly one column called `wanted`."""
    if names.count(column) > 1:
        raise InputError(
            f"{file}: column {column!r} (for {role}) is there {names.count(column)} times; rename all but "
            "the right one"
        )
    if column not in names:
        near = difflib.get_close_matches(column, names, n=3, cutoff=0.4)
        near += [name for name in names if name.lower() == column.lower() and name not in near]
        hint = f"did you mean {' or '.join(map(repr, near))}?" if near else f"it has {list(names)}"
        raise InputError(f"{file}: column {column!r} (for {role}) is missing; {hint}")


def refuse_twins(file: Path, names: Sequence[str], column: str) -> None:
    """Refuses a file in which another column's name differs from `wanted` in case alone.

    DuckDB would take one for the other, wherever columns are read by name.
    """
    twins = [name for name in names if name.lower() == column.lower()]
    if len(twins) > 1:
        raise InputError(
            f"{file}: columns {' and '.join(map(repr, twins))} differ in case at most; rename all but "
            f"{column!r}"
        )


def kind_of(column: pa.DataType) -> str:
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


def literal(value: int | str) -> str:
    """An SQL literal."""
    return str(value) if isinstance(value, int) else "'" + value.replace("'", "''") + "'"
