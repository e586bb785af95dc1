"""What the columns of raw Parquet files hold: kinds, nulls, distinct values, ranges, examples."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from trainer.data.sources.feature_columns import element_type
from trainer.data.sources.raw_columns import kind_of
from trainer.data.sources.raw_files import RawFiles

if TYPE_CHECKING:
    import duckdb
    import pyarrow as pa

MOST_DISTINCT = 100_000  # values are counted so far
SAMPLE_ROWS = 200_000  # of the log, for what a column tells of the label
EXAMPLES = 3
FEW_NUMBERS = 50  # of so many different numbers each has a rate of its own


@dataclass(frozen=True)
class ColumnProfile:
    """One column.

    Attributes:
        name: Its exact name.
        kind: Of its values: int64, string, float, bool, time, list of one of these, or its type's name.
        rows: Of all files.
        nulls: Rows without a value; of a list empty ones too.
        distinct: Different values, of a list its elements; counted up to `MOST_DISTINCT` + 1.
        low: Smallest value; None of a list, or without a value.
        high: Largest value, likewise.
        unusable: Rows with NaN or infinity, or with a null inside a list.
        examples: The most frequent values.
        types: Its type in each file that has another one than the first; it may be missing in some.
    """

    name: str
    kind: str
    rows: int
    nulls: int
    distinct: int
    low: Any = None
    high: Any = None
    unusable: int = 0
    examples: list[Any] = field(default_factory=list)
    types: tuple[str, ...] = ()

    @property
    def element(self) -> str:
        """Kind of a list's elements; "" of what is no list."""
        return self.kind.removeprefix("list of ") if self.kind.startswith("list of ") else ""

    @property
    def is_constant(self) -> bool:
        """Whether all rows hold one value, or none."""
        return self.distinct == 0 or (self.distinct == 1 and self.nulls == 0)

    @property
    def is_binary(self) -> bool:
        """Whether its values are 0 and 1 alone, in every row."""
        numbers = self.kind in ("int64", "float", "bool")
        return (
            numbers and self.nulls == 0 and self.distinct == 2 and {self.low, self.high} == {0, 1}
        )

    def describe(self) -> str:
        """Its values in one line, for a comment."""
        many = f"over {MOST_DISTINCT:,}" if self.distinct > MOST_DISTINCT else f"{self.distinct:,}"
        words = [self.kind, f"{many} distinct"]
        if self.nulls:
            words.append(f"{self.nulls / max(self.rows, 1):.2%} null")
        if self.kind in ("int64", "float", "time") and self.low is not None:
            words.append(f"{_short(self.low)} to {_short(self.high)}")
        return ", ".join([*words, "e.g. " + " ".join(map(_short, self.examples))])


def _short(value: Any) -> str:
    """A value in a comment: one line, never longer than 32 characters."""
    text = f"{value:g}" if isinstance(value, float) else str(value)
    text = "".join(letter if letter.isprintable() else " " for letter in text)
    return text if len(text) <= 32 else text[:31] + "…"


def profile_columns(con: duckdb.DuckDBPyConnection, raw: RawFiles) -> list[ColumnProfile]:
    """Describes every column, one after the other: memory is that of one.

    Raises:
        InputError: A file cannot be read.
    """
    first: dict[str, pa.DataType] = {}
    types: dict[str, set[str]] = {}
    for schema in raw.schemas:
        for name in dict.fromkeys(schema.names):
            kind = schema.field(schema.names.index(name)).type
            first.setdefault(name, kind)
            types.setdefault(name, set()).add(_kind(kind))
    for schema in raw.schemas:
        for name in first.keys() - set(schema.names):
            types[name].add("missing")
    with raw.explained():
        return [_profile(con, raw, name, kind, types[name]) for name, kind in first.items()]


def _kind(column: pa.DataType) -> str:
    inner = element_type(column)
    return kind_of(column) if inner is None else f"list of {kind_of(inner)}"


def _profile(
    con: duckdb.DuckDBPyConnection, raw: RawFiles, name: str, column: pa.DataType, types: set[str]
) -> ColumnProfile:
    kind = _kind(column)
    if len(types) > 1:
        return ColumnProfile(name, kind, raw.rows, 0, 0, types=tuple(sorted(types)))
    table = raw.sql({"x": name})
    lists = kind.startswith("list of ")
    missing = "x IS NULL OR len(x) = 0" if lists else "x IS NULL"
    inside = "len(list_filter(x, lambda e: e IS NULL)) > 0"
    if kind.endswith("float"):
        inside = (
            "len(list_filter(x, lambda e: e IS NULL OR NOT isfinite(e))) > 0"
            if lists
            else "NOT isfinite(x)"
        )
    bad = inside if lists or kind == "float" else "false"
    ends = f"min(x) FILTER (WHERE NOT ({bad})), max(x) FILTER (WHERE NOT ({bad}))"
    if kind not in ("int64", "float", "bool", "time", "string"):
        ends = "NULL, NULL"
    nulls, unusable, low, high = con.execute(
        f"SELECT count(*) FILTER (WHERE {missing}), count(*) FILTER (WHERE {bad}), {ends} FROM {table}"
    ).fetchall()[0]
    values = f"SELECT {'unnest(x)' if lists else 'x'} AS v FROM {table}"
    groups = f"SELECT v, count(*) AS n FROM ({values}) WHERE v IS NOT NULL GROUP BY v"
    (distinct,) = con.execute(
        f"SELECT count(*) FROM ({groups} LIMIT {MOST_DISTINCT + 1})"
    ).fetchall()[0]
    examples = con.execute(f"{groups} ORDER BY n DESC, v LIMIT {EXAMPLES}").fetchall()
    return ColumnProfile(
        name,
        kind,
        raw.rows,
        nulls,
        distinct,
        low,
        high,
        unusable,
        [value for value, _ in examples],
    )


def separator_of(con: duckdb.DuckDBPyConnection, raw: RawFiles, name: str) -> str | None:
    """What splits a column of text into lists of few different values; None of plain text."""
    table = raw.sql({"x": name})
    for separator in ("|", ",", ";"):
        share, parts, texts = con.execute(
            f"SELECT avg((contains(x, '{separator}'))::INT), "
            f"count(DISTINCT p), count(DISTINCT x) FROM (SELECT x, unnest(string_split(x, '{separator}')) "
            f"AS p FROM {table} LIMIT {SAMPLE_ROWS})"
        ).fetchall()[0]
        if share is not None and share > 0.5 and parts < texts:
            return separator
    return None


# ---------------------------------------------------------------- what a column tells of the label


def label_auc(
    con: duckdb.DuckDBPyConnection, raw: RawFiles, column: ColumnProfile, label: str
) -> float:
    """AUC of the label by one column alone: how often it puts a positive before a negative.

    Every other row of a sample says which label rate goes with a value, or in which direction a number
    points; the others are scored. .5 where nothing can be said.
    """
    rows = con.execute(
        f"SELECT x, y::DOUBLE AS y FROM {raw.sql({'x': column.name, 'y': label})} "
        f"WHERE y IS NOT NULL USING SAMPLE reservoir({SAMPLE_ROWS} ROWS) REPEATABLE (0)"
    ).to_arrow_table()
    labels = rows["y"].to_numpy() > 0
    if len(labels) < 4:
        return 0.5
    fitted = np.arange(len(labels)) % 2 == 0
    if column.kind in ("int64", "float") and column.distinct > FEW_NUMBERS:
        import pyarrow.compute as pc

        missing = rows["x"].is_null().to_numpy()
        values = pc.fill_null(rows["x"].cast("float64", safe=False), 0.0).to_numpy()
        scores = np.where(missing, -np.inf, np.nan_to_num(values))
        direction = 1.0 if auc(labels[fitted], scores[fitted]) >= 0.5 else -1.0
        return auc(labels[~fitted], direction * scores[~fitted])
    codes = rows["x"].combine_chunks().dictionary_encode(null_encoding="encode").indices.to_numpy()
    seen = np.bincount(codes[fitted], minlength=codes.max() + 1)
    positive = np.bincount(codes[fitted], labels[fitted], minlength=codes.max() + 1)
    rates = (positive + labels[fitted].mean()) / (seen + 1)
    return auc(labels[~fitted], rates[codes[~fitted]])


def auc(labels: np.ndarray, scores: np.ndarray) -> float:
    """Chance that a positive has a higher score than a negative, ties by half; .5 without either."""
    positives = int(labels.sum())
    if positives in (0, len(labels)):
        return 0.5
    _, places, counts = np.unique(scores, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[places]
    above = ranks[labels].sum() - positives * (positives + 1) / 2
    return float(above / (positives * (len(labels) - positives)))
