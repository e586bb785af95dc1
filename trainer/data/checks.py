"""Checks of a prepared dataset's event files: columns, nulls, labels, scenarios.

Parquet statistics answer most of it from the footer; only where they look wrong is a column read, to name
the row. Statistics cannot show every unknown scenario, so the reader of the events checks again.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llm_knowledge.errors import InputError

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq

# A list's statistics count its empty lists as nulls, so `history` is left to the reader of the events.
PLAIN_COLUMNS = ("user_id", "item_id", "scenario_id", "timestamp", "label")


def check_schema(file: Path, present: pa.Schema, expected: pa.Schema) -> None:
    """Refuses a file whose first columns are not exactly those of `wanted`.

    Raises:
        InputError: names the file and the column.
    """
    for index, field in enumerate(expected):
        if field.name not in present.names:
            raise InputError(f"{file}: column {field.name!r} is missing")
        have = present.field(field.name).type
        if not have.equals(field.type):
            raise InputError(f"{file}: column {field.name!r} is {have}, expected {field.type}")
        if present.names[index] != field.name:
            raise InputError(
                f"{file}: column {index + 1} is {present.names[index]!r}, expected {field.name!r}"
            )


def check_statistics(
    file: Path, metadata: pq.FileMetaData, scenario_ids: Sequence[int | str]
) -> None:
    """Refuses a file whose footer shows a null, a label other than 0 and 1, or an unknown scenario.

    Raises:
        InputError: names the file, the column, the row and the value.
    """
    known = set(scenario_ids)
    suspects: set[str] = set()
    for group in range(metadata.num_row_groups):
        for number in range(metadata.num_columns):
            chunk = metadata.row_group(group).column(number)
            name, statistics = chunk.path_in_schema, chunk.statistics
            if not (name in PLAIN_COLUMNS or name.startswith("label_")) or statistics is None:
                continue
            if statistics.has_null_count and statistics.null_count:
                suspects.add(name)
            if statistics.has_min_max:
                ends = {statistics.min, statistics.max}
                if (name.startswith("label") and not ends <= {0, 1}) or (
                    name == "scenario_id" and not ends <= known
                ):
                    suspects.add(name)
    for name in (*PLAIN_COLUMNS, *sorted(suspects - set(PLAIN_COLUMNS))):
        if name in suspects and (problem := find_problem(file, name, scenario_ids)):
            raise problem


def find_problem(
    file: Path, column: str, scenario_ids: Sequence[int | str] = ()
) -> InputError | None:
    """Reads one column of a file and describes its first bad value; None if it finds none."""
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    start = 0
    if not file.is_file():
        return None
    with pq.ParquetFile(file) as parquet:
        for batch in parquet.iter_batches(columns=[column]):
            values = batch.column(0)
            bad, what = pc.is_null(values), "null"
            if column.startswith(
                ("feature_", "weights_", "sequence_")
            ):  # of which a row may have none
                bad, what = (
                    _unusable(values),
                    "NaN, infinite, or a list with a null or such a number",
                )
            allowed: Sequence[Any] | None = (0, 1) if column.startswith("label") else None
            if column == "scenario_id":
                allowed = scenario_ids
            if not pc.any(bad).as_py() and allowed is not None:
                bad = pc.invert(pc.is_in(values, value_set=pa.array(allowed, values.type)))
                what = "not 0 or 1" if column.startswith("label") else "not listed in dataset.json"
            row = pc.index(bad, True).as_py()
            if row >= 0:
                value = "" if what == "null" else f" ({values[row].as_py()!r})"
                return InputError(
                    f"{file}: column {column!r}, row {start + row + 1} (the first is 1): "
                    f"{what}{value}; prepare the data again"
                )
            start += len(values)
    return None


def _unusable(values: pa.Array) -> pa.Array:
    """Rows of a feature that no encoder takes: numbers that are not finite, nulls inside lists."""
    import pyarrow as pa
    import pyarrow.compute as pc

    def wrong(numbers: pa.Array) -> pa.Array:
        if pa.types.is_floating(numbers.type):
            return pc.fill_null(pc.invert(pc.is_finite(numbers)), False)
        return pa.array([False] * len(numbers))

    if not pa.types.is_list(values.type):
        return wrong(values)
    elements = values.flatten()
    bad = pc.or_(pc.is_null(elements), wrong(elements))
    rows = pc.filter(pc.list_parent_indices(values), bad)
    return pc.is_in(pa.array(range(len(values)), rows.type), value_set=rows.unique())
