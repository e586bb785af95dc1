"""Fitting an encoder: vocabularies, moments and boundaries, of the training splits and nothing else."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from embeddings.ids import Vocabulary
from llm_knowledge.errors import InputError
from llm_knowledge.parquet import parquet_sql
from trainer.data.checks import find_problem
from trainer.features.encoder import FeatureEncoder
from trainer.features.encoding import (
    Encoding,
    UnusableError,
    combine_ids,
    options_of,
    read_numbers,
    transformed,
)
from trainer.features.resolve import Feature

SAMPLE_ROWS = 1_000_000  # of a number whose quantiles are wanted, evenly spread over the splits


def fit_encoder(
    features: Sequence[Feature], files: list[Path], earlier: FeatureEncoder | None = None
) -> FeatureEncoder:
    """Fits the encoder of a run.

    Args:
        features: What the run reads.
        files: Parquet files of the training splits, in order: equal files give an equal encoder.
        earlier: Of a run that this one starts from; its moments and boundaries are kept where a number
            is encoded by the same options, so that its scores stay.

    Raises:
        InputError: A file cannot be read, or has a value that no encoder takes.
    """
    before = {old.name: old for old in earlier.encodings} if earlier is not None else {}
    encodings: dict[str, Encoding] = {}
    numbers = [feature for feature in features if feature.kind == "number"]
    for feature in features:
        encoding = Encoding(
            feature.name,
            feature.kind,
            feature.columns,
            feature.weights,
            options_of(feature),
            mean_weights=feature.weights is not None and feature.use.pooling == "mean",
            fields=feature.fields,
        )
        if feature.is_sequence:
            encoding = replace(encoding, ids_per_sample=_mean_length(files, feature.columns[0]))
        elif feature.kind != "number":
            encoding = _with_ids(encoding, feature, files)
        encodings[feature.name] = encoding
    for feature in numbers:
        kept, encoding = before.get(feature.name), encodings[feature.name]
        same = kept is not None and (kept.options, kept.columns) == (
            encoding.options,
            encoding.columns,
        )
        encodings[feature.name] = (
            kept if same and kept is not None else _with_moments(encoding, feature, files)
        )
    return FeatureEncoder([encodings[feature.name] for feature in features])


# ---------------------------------------------------------------- ids


def _with_ids(encoding: Encoding, feature: Feature, files: list[Path]) -> Encoding:
    column = encoding.columns[0]
    if encoding.kind == "ids":
        encoding = replace(encoding, ids_per_sample=_mean_length(files, column))
    if feature.use.rows is not None:
        return replace(encoding, rows=feature.use.rows)
    least = feature.use.min_count or 1
    if encoding.kind == "cross":
        names = [f"part_{number}" for number in range(len(encoding.columns))]
        parts = ", ".join(f"{c} AS {n}" for c, n in zip(encoding.columns, names, strict=True))
        present = " AND ".join(f"{name} IS NOT NULL" for name in encoding.columns)
        counts = (
            f"SELECT {parts} FROM FILES WHERE {present} GROUP BY ALL HAVING count(*) >= {least}"
        )
        combinations = _query(files, column, counts)
        keys = combine_ids([combinations[name].combine_chunks() for name in names])
        ids = pa.array(np.unique(keys.to_numpy()))
    else:
        value = f"unnest({column})" if encoding.kind == "ids" else column
        ids = _query(
            files,
            column,
            f"SELECT id FROM (SELECT {value} AS id FROM FILES) WHERE id IS NOT NULL GROUP BY id "
            f"HAVING count(*) >= {least} ORDER BY id",
        )["id"].combine_chunks()
    vocabulary = Vocabulary(ids)
    return replace(encoding, vocabulary=vocabulary, rows=vocabulary.rows)


def _mean_length(files: list[Path], column: str) -> float:
    mean = _query(files, column, f"SELECT sum(coalesce(len({column}), 0)) / count(*) FROM FILES")
    return float(mean.column(0)[0].as_py() or 0.0)


def _query(files: list[Path], column: str, query: str) -> pa.Table:
    """Runs a query over FILES; names the file that cannot be read."""
    import duckdb

    with duckdb.connect() as connection:
        connection.execute("SET enable_progress_bar = false")
        try:
            return connection.execute(query.replace("FILES", parquet_sql(files))).to_arrow_table()
        except duckdb.Error:
            for file in files:
                try:
                    connection.execute(query.replace("FILES", parquet_sql([file]))).fetchall()
                except duckdb.Error as error:
                    raise InputError(
                        f"{file}: column {column} cannot be read ({error}); prepare the data again"
                    ) from error
            raise


# ---------------------------------------------------------------- numbers


def _with_moments(encoding: Encoding, feature: Feature, files: list[Path]) -> Encoding:
    column, transform = encoding.columns[0], feature.use.transform
    count, mean, squares = 0, 0.0, 0.0
    sample: list[np.ndarray] = []
    rows = sum(pq.read_metadata(file).num_rows for file in files)
    stride = -(-rows // SAMPLE_ROWS)
    position = 0
    for values, missing in _numbers(files, column):
        if feature.use.buckets is not None:
            chosen = (np.arange(position, position + len(values)) % stride == 0) & ~missing
            sample.append(values[chosen])
            position += len(values)
            continue
        known = transformed(values[~missing], transform)
        if len(known):  # Chan's update: exact for constants, and no large sums of squares
            step, total = float(known.mean()) - mean, count + len(known)
            squares += (
                float(((known - known.mean()) ** 2).sum()) + step**2 * count * len(known) / total
            )
            mean += step * len(known) / total
            count = total
    if feature.use.buckets is not None:
        boundaries = _boundaries(np.concatenate(sample), feature.use.buckets)
        # Row 0, of unknown ids, is never met: every number has its bucket.
        return replace(encoding, boundaries=boundaries, rows=len(boundaries) + 2)
    deviation = (squares / count) ** 0.5 if count else 0.0
    deviation = deviation if feature.use.scale == "standard" and deviation > 0 else 1.0
    return replace(encoding, mean=mean, deviation=deviation)


def _boundaries(values: np.ndarray, buckets: int) -> tuple[float, ...]:
    """The distinct inner quantiles; fewer than `buckets` - 1 where values repeat."""
    if len(values) == 0:
        return ()
    shares = np.arange(1, buckets) / buckets
    inner = np.unique(np.quantile(values, shares, method="inverted_cdf"))
    return tuple(float(value) for value in inner if value > values.min())


def _numbers(files: list[Path], column: str) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Numbers and where they are missing, in the order of the files."""
    for file in files:
        try:
            with pq.ParquetFile(file) as parquet:
                for batch in parquet.iter_batches(columns=[column]):
                    yield read_numbers(pa.Table.from_batches([batch]), column)
        except UnusableError as error:
            raise (
                find_problem(file, column) or InputError(f"{file}: column {column!r}")
            ) from error
        except (pa.ArrowException, OSError) as error:
            raise InputError(f"{file}: is damaged ({error}); prepare the data again") from error
