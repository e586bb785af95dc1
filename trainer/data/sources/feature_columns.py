"""Features of a raw log and its catalogue: checked, selected, joined; columns that nothing reads."""

from __future__ import annotations

import fnmatch
import logging
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from llm_knowledge.errors import InputError
from trainer.data.dataset import FeatureInfo
from trainer.data.sources.feature_schema import Feature
from trainer.data.sources.log_schema import LogSchema
from trainer.data.sources.raw_columns import kind_of, literal, require_column
from trainer.data.sources.raw_files import RawFiles

if TYPE_CHECKING:
    import duckdb
    import pyarrow as pa

logger = logging.getLogger(__name__)

Type = Literal["int64", "string", "double"]
SQL_TYPES = {"int64": "BIGINT", "string": "VARCHAR", "double": "DOUBLE"}
ID_TYPES: dict[str, Type] = {"int64": "int64", "bool": "int64", "string": "string"}
NUMBERS = ("int64", "float", "bool")


def describe_features(raw: RawFiles, features: Mapping[str, Feature]) -> dict[str, FeatureInfo]:
    """Checks that every file has the features' columns, in one type, and says which.

    Raises:
        InputError: names file, column, type and what is needed.
    """
    return {name: _describe(raw, name, feature) for name, feature in features.items()}


def _describe(raw: RawFiles, name: str, feature: Feature) -> FeatureInfo:
    column = feature.column or name
    types: dict[Type, Path] = {}
    for file, schema in zip(raw.files, raw.schemas, strict=True):
        require_column(file, schema.names, column, f"feature {name}")
        arrow = schema.field(schema.names.index(column)).type
        types.setdefault(_type_of(file, name, column, feature, arrow), file)
        if feature.weights is not None:
            require_column(file, schema.names, feature.weights, f"weights of feature {name}")
            arrow = schema.field(schema.names.index(feature.weights)).type
            inner = element_type(arrow)
            if inner is None or kind_of(inner) not in ("int64", "float"):
                raise InputError(
                    f"{file}: column {feature.weights!r} (weights of feature {name}) is {arrow}, must be a "
                    "list of numbers"
                )
    if len(types) > 1:
        words = ", ".join(f"{kind} in {file}" for kind, file in types.items())
        raise InputError(f"column {column!r} (feature {name}) is {words}; give it one type")
    return FeatureInfo(
        kind=feature.kind,
        type=next(iter(types)),
        source=feature.source,
        column=column,
        weights=feature.weights,
    )


def element_type(column: pa.DataType) -> pa.DataType | None:
    """Type of a list's elements; None of what is no list."""
    import pyarrow.types as types

    lists = (types.is_list, types.is_large_list, types.is_fixed_size_list)
    return column.value_type if any(test(column) for test in lists) else None


def _type_of(file: Path, name: str, column: str, feature: Feature, arrow: pa.DataType) -> Type:
    def refuse(needed: str) -> InputError:
        return InputError(
            f"{file}: column {column!r} (feature {name}) is {arrow}, kind {feature.kind} must be {needed}"
        )

    if feature.kind == "number":
        if kind_of(arrow) not in NUMBERS:
            raise refuse("integers, floats or booleans; cast it first, or declare kind id")
        return "double"
    if feature.kind == "id":
        if kind_of(arrow) not in ID_TYPES:
            raise refuse("integers, booleans or text; cast it first, or declare kind ids or number")
        return ID_TYPES[kind_of(arrow)]
    if feature.separator is not None:
        if kind_of(arrow) != "string":
            raise refuse("text, as a separator is given; remove the separator")
        return "string"
    inner = element_type(arrow)
    if inner is None or kind_of(inner) not in ID_TYPES:
        raise refuse("a list of integers or text, or text with a separator")
    return ID_TYPES[kind_of(inner)]


# ---------------------------------------------------------------- values


def feature_columns(features: Mapping[str, FeatureInfo]) -> dict[str, str]:
    """Column of the events to the raw column that it is made of."""
    columns = {f"feature_{name}": feature.column for name, feature in features.items()}
    weights = {
        f"weights_{name}": declared.weights
        for name, declared in features.items()
        if declared.weights
    }
    return columns | weights


def feature_casts(
    features: Mapping[str, FeatureInfo], rules: Mapping[str, Feature]
) -> dict[str, Callable[[str, Any], str]]:
    """Column of the events to what makes its SQL of the raw column's, see `RawFiles.sql`."""
    casts: dict[str, Callable[[str, Any], str]] = {}
    for name, feature in features.items():
        kind = SQL_TYPES[feature.type]
        casts[f"feature_{name}"] = cast_to(f"{kind}[]" if feature.kind == "ids" else kind)
        separator = rules[name].separator
        if separator is not None:
            casts[f"feature_{name}"] = _split(separator)
        if feature.weights is not None:
            casts[f"weights_{name}"] = cast_to("FLOAT[]")
    return casts


def cast_to(kind: str) -> Callable[[str, Any], str]:
    """What makes a column one of an SQL type, see `RawFiles.sql`."""
    return lambda column, _: f"CAST({column} AS {kind})"


def _split(separator: str) -> Callable[[str, Any], str]:
    parts = f"string_split({{}}, {literal(separator)})"
    return lambda column, _: f"list_filter({parts.format(column)}, lambda x: x <> '')"


def check_feature_values(
    con: duckdb.DuckDBPyConnection,
    raw: RawFiles,
    features: Mapping[str, FeatureInfo],
    rules: Mapping[str, Feature],
) -> None:
    """Refuses numbers and weights that are not finite, nulls inside lists, weights of another length.

    Raises:
        InputError: names file, column and row.
    """
    # (column, test, what is wrong, what to do)
    checks: list[tuple[str, str, str, str]] = []
    number, mend = "give a number, or null where there is none", "mend or drop these rows"
    for name, feature in features.items():
        column, weights = f"feature_{name}", f"weights_{name}"
        if feature.kind == "number":
            checks.append((column, f"NOT isfinite({column})", "NaN or infinite", number))
        if feature.kind == "ids":
            checks.append((column, _any(column, "x IS NULL"), "a list with a null in it", mend))
        if feature.weights is not None:
            bad = _any(weights, "x IS NULL OR NOT isfinite(x)")
            checks.append((weights, bad, "a weight that is null or not finite", mend))
            lengths = f"coalesce(len({column}), 0) <> coalesce(len({weights}), 0)"
            checks.append((weights, lengths, "not as many weights as ids", mend))
    if not checks:
        return
    columns, casts = feature_columns(features), feature_casts(features, rules)
    counts = ", ".join(f"count(*) FILTER (WHERE {test})" for _, test, _, _ in checks)
    rows = con.execute(f"SELECT {counts} FROM {raw.sql(columns, casts)}").fetchall()[0]
    for count, (column, test, what, remedy) in zip(rows, checks, strict=True):
        if count:
            file, row, value = raw.first_row(con, columns, casts, test, column)
            raise InputError(
                f"{file}: column {columns[column]!r}, row {row} (the first is 1): {what} ({value!r}); "
                f"{count} such rows in all; {remedy}"
            )


def _any(column: str, test: str) -> str:
    """SQL: whether a list has an element x of which a test is true."""
    return f"list_contains(list_transform({column}, lambda x: {test}), true)"


# ---------------------------------------------------------------- what nothing reads


def report_unread(raw: RawFiles, read: Iterable[str], rules: LogSchema, schema: Path) -> None:
    """Names once the columns that neither a role nor a feature reads and `ignore` does not cover.

    Raises:
        InputError: the schema says strict, and there are some.
    """
    known = set(read)
    columns = dict.fromkeys(name for entry in raw.schemas for name in entry.names)
    unread = [
        name
        for name in columns
        if name not in known and not any(fnmatch.fnmatchcase(name, entry) for entry in rules.ignore)
    ]
    if not unread:
        return
    text = (
        f"{raw.path}: columns that nothing reads: {', '.join(unread)}; declare them under features in "
        f"{schema}, or list them under ignore"
    )
    if rules.strict:
        raise InputError(text)
    logger.warning("%s", text)
