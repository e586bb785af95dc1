"""A smaller knowledge store from a large one: PCA fitted in a stream, or truncation.

Shape legend: N rows of a block, D dimensions of the source, K dimensions kept.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa

from llm_knowledge.errors import InputError
from llm_knowledge.files import new_directory
from llm_knowledge.store.dated import DatedStores, store_paths
from llm_knowledge.store.manifest import Compression, DType, Manifest, Part, file_checksum
from llm_knowledge.store.reader import PROJECTION, KnowledgeStore, check_projection, verify
from llm_knowledge.store.writer import write_manifest, write_part
from llm_knowledge.vectors import unit_length

BLOCK_BYTES = 64 << 20  # float32 rows that are in memory at a time
SAMPLE_ROWS, NEIGHBOURS = 2000, 10

Method = Literal["pca", "truncate"]


def main(options: argparse.Namespace) -> int:
    """Runs from parsed options, prints what was lost, and returns 0.

    Raises:
        InputError: see `compress`.
    """
    paths = store_paths(options.store)
    if paths == [options.store]:
        _say(
            options.out,
            compress(options.store, options.out, options.dim, options.method, options.dtype),
        )
        return 0
    # One space for all dates: the projection is fitted on the oldest, which knows no later event.
    first: Path | None = None
    for store in DatedStores.open(options.store).stores:
        out = options.out / store.path.name
        if first is None:
            done = compress(store.path, out, options.dim, options.method, options.dtype)
        else:
            done = recompress(store.path, first, out)
        first = first or out
        _say(out, done)
    return 0


def _say(out: Path, done: Manifest) -> None:
    lost = done.compression
    assert lost is not None
    print(
        f"{out}: {lost.source_dim} -> {done.dim} dimensions, {done.dtype}; retained variance "
        f"{lost.retained_variance:.4f}, overlap of the {NEIGHBOURS} nearest "
        f"{lost.neighbour_overlap:.3f}, cosine error {lost.cosine_error:.2e}"
    )


@dataclass(frozen=True)
class Projection:
    """How a vector becomes a smaller one.

    Attributes:
        method: "pca": (x - mean) @ basis; "truncate": the first K, at length 1 if the source's are.
        mean_D: float64 mean of all rows ("pca").
        basis_DK: float64 orthonormal columns, largest variance first ("pca").
        dim: K.
        retained: share of the variance over all rows that the kept dimensions have.
        unit: whether vectors are scaled to length 1 ("truncate").
    """

    method: Method
    dim: int
    retained: float
    mean_D: np.ndarray
    basis_DK: np.ndarray
    unit: bool = False

    def apply(self, rows_ND: np.ndarray) -> np.ndarray:
        """Smaller vectors, float32 [N, K]."""
        if self.method == "pca":
            # In float64, since a mean far from zero would cancel digits.
            return ((rows_ND - self.mean_D) @ self.basis_DK).astype(np.float32)
        kept = rows_ND[:, : self.dim].astype(np.float32)
        return unit_length(kept) if self.unit else kept

    def restore(self, small_NK: np.ndarray, dim: int) -> np.ndarray:
        """What smaller vectors stand for in the source's space, float64 [N, D]."""
        if self.method == "pca":
            return small_NK @ self.basis_DK.T + self.mean_D
        return np.pad(small_NK.astype(np.float64), ((0, 0), (0, dim - self.dim)))


def compress(
    path: str | Path,
    out: str | Path,
    dim: int,
    method: Method = "pca",
    dtype: Literal["float16", "int8"] = "float16",
) -> Manifest:
    """Writes a store with `dim` dimensions per vector; keys, prompts, answers, cut-offs stay.

    Memory holds a block of vectors, for PCA also the covariance (float64 [D, D]), and the texts of
    one part. What was lost is measured and stands in the new manifest, see `Compression`.

    Args:
        path: a complete store.
        out: new directory; it appears whole, by rename.
        dim: dimensions to keep, 1..D.
        method: "pca", centred, fitted on all rows; or "truncate", for Matryoshka models.
        dtype: of the stored numbers; int8 has one scale per row.

    Raises:
        InputError: the store is incomplete, damaged or compressed already, or an option does not fit.
    """
    source = KnowledgeStore.open(path)
    if source.manifest.compression is not None:
        raise InputError(f"{path}: is a compressed store; compress its source, errors add up")
    if not 1 <= dim <= source.manifest.dim:
        raise InputError(f"dim: {dim} is outside 1..{source.manifest.dim} of {path}")
    if method not in ("pca", "truncate") or dtype not in ("float16", "int8"):
        raise InputError(
            f"method {method!r}, dtype {dtype!r}: want pca or truncate, float16 or int8"
        )
    if method == "pca" and dim > max(1, len(source) - 1):
        raise InputError(
            f"dim: {len(source)} rows span at most {max(1, len(source) - 1)} dimensions "
            f"for pca; ask for fewer, or use truncate"
        )
    return _write(source, out, fit(source, dim, method), dtype)


def recompress(path: str | Path, like: str | Path, out: str | Path) -> Manifest:
    """Compresses a store as another one was: the same projection and dtype, nothing fitted anew.

    Rows that are the same in both sources stay the same. Vectors before and after can be mixed.

    Raises:
        InputError: `like` is not a compressed store, or of another model.
    """
    source, model = KnowledgeStore.open(path), KnowledgeStore.open(like)
    about = model.manifest
    if about.compression is None:
        raise InputError(f"{like}: is not a compressed store")
    same = ("model", "template", "pooling", "layer", "level", "key_type")
    differ = [name for name in same if getattr(about, name) != getattr(source.manifest, name)]
    if differ or about.compression.source_dim != source.manifest.dim:
        raise InputError(f"{like}: {', '.join(differ) or 'dim'} differs from {path}")
    lost = about.compression
    mean, basis = np.zeros(0), np.zeros((0, 0))
    if lost.method == "pca":
        from safetensors.numpy import load_file

        check_projection(Path(like), about)
        saved = load_file(Path(like) / PROJECTION)
        mean, basis = saved["mean"], saved["basis"]
    projection = Projection(
        lost.method, about.dim, lost.retained_variance, mean, basis, about.normalized
    )
    return _write(source, out, projection, about.dtype)


def fit(store: KnowledgeStore, dim: int, method: Method) -> Projection:
    """Mean and covariance of all rows in one pass, and from them the projection."""
    size, rows = store.manifest.dim, len(store)
    if not rows:
        raise InputError(f"{store.path}: has no rows")
    shift_D = store.read_vectors(0, 1)[0].astype(np.float64)  # near the mean: keeps digits
    sum_D, square_D = np.zeros(size), np.zeros(size)
    products_DD = np.zeros((size, size)) if method == "pca" else np.zeros((0, 0))
    # float32 products of at most a few thousand rows at a time, added up in float64: twice as fast
    # as float64 products, and far below the rounding of stored float16.
    exact = np.float64 if store.manifest.dtype == "float32" else np.float32
    for block_ND in blocks(store):
        centred_ND = (block_ND - shift_D).astype(exact)
        sum_D += centred_ND.sum(axis=0, dtype=np.float64)
        square_D += np.square(centred_ND).sum(axis=0, dtype=np.float64)
        if method == "pca":
            products_DD += centred_ND.T @ centred_ND
    mean_D = sum_D / rows
    variance = float((square_D / rows - mean_D**2).sum())
    if method == "truncate":
        kept = float((square_D / rows - mean_D**2)[:dim].sum())
        share = kept / variance if variance > 0 else 1.0
        return Projection(
            method, dim, min(share, 1.0), np.zeros(0), np.zeros((0, 0)), store.manifest.normalized
        )
    products_DD /= rows
    products_DD -= np.outer(mean_D, mean_D)
    values_D, vectors_DD = np.linalg.eigh(products_DD)
    basis_DK = vectors_DD[:, ::-1][:, :dim]
    # The sign of an eigenvector is free: the largest entry is positive.
    largest = basis_DK[np.abs(basis_DK).argmax(axis=0), np.arange(dim)]
    basis_DK = np.ascontiguousarray(basis_DK * np.where(largest < 0, -1.0, 1.0))
    share = float(values_D[::-1][:dim].sum() / variance) if variance > 0 else 1.0
    return Projection(method, dim, min(max(share, 0.0), 1.0), mean_D + shift_D, basis_DK)


def blocks(store: KnowledgeStore, start: int = 0, stop: int | None = None) -> Iterator[np.ndarray]:
    """Vectors of rows start..stop-1 in order, [N, D], at most `BLOCK_BYTES` as float32."""
    stop = len(store) if stop is None else stop
    step = max(1, min(BLOCK_BYTES // (4 * store.manifest.dim), 65_536))
    for block_start in range(start, stop, step):
        yield store.read_vectors(block_start, min(block_start + step, stop))


def _write(
    source: KnowledgeStore, out: str | Path, projection: Projection, dtype: DType
) -> Manifest:
    unit = projection.method == "truncate" and projection.unit
    empty = Compression(
        method=projection.method,
        source_dim=source.manifest.dim,
        sample_rows=0,
        retained_variance=projection.retained,
        neighbour_overlap=0.0,
        cosine_error=0.0,
    )
    manifest = source.manifest.model_copy(
        update={
            "dim": projection.dim,
            "dtype": dtype,
            "normalized": unit,
            "parents": [source.fingerprint],
            "compression": empty,
            "complete": False,
            "parts": [],
        }
    )
    with new_directory(out) as building:
        parts = [
            _write_part(source, index, building, manifest, projection)
            for index in range(len(source.manifest.parts))
        ]
        done = manifest.model_copy(update={"parts": parts, "complete": True})
        checksum = _save_projection(building / PROJECTION, projection)
        small = KnowledgeStore.open(building, manifest=done)
        lost = empty.model_copy(
            update={"projection": checksum, **_measure(source, small, projection)}
        )
        done = done.model_copy(update={"compression": lost})
        verify(building, done)
        write_manifest(building, done)
    return done


def _write_part(
    source: KnowledgeStore, index: int, out: Path, manifest: Manifest, projection: Projection
) -> Part:
    start, stop = int(source.offsets[index]), int(source.offsets[index + 1])
    small_NK = np.concatenate([projection.apply(block) for block in blocks(source, start, stop)])
    table: pa.Table = source._read(index, ["key", "prompt", "answer", "cutoff"])
    columns = {name: table[name].to_pylist() for name in table.column_names}
    return write_part(
        out,
        index,
        manifest,
        columns["key"],
        small_NK,
        columns["prompt"],
        columns["answer"],
        columns["cutoff"],
    )


def _save_projection(file: Path, projection: Projection) -> str | None:
    if projection.method != "pca":
        return None
    from safetensors.numpy import save_file

    try:
        save_file({"mean": projection.mean_D, "basis": projection.basis_DK}, file)
    except Exception as error:  # its own kind of error for a full disk
        raise InputError(f"{file}: cannot be written ({error}); check space") from error
    return file_checksum(file)


def _measure(
    source: KnowledgeStore, small: KnowledgeStore, projection: Projection
) -> dict[str, float]:
    """Neighbour overlap and cosine error on rows spread over the store, from the stored bytes."""
    picks = np.unique(
        np.linspace(0, len(source) - 1, min(SAMPLE_ROWS, len(source))).astype(np.int64)
    )
    before, after = _sample(source, picks), _sample(small, picks)
    restored = projection.restore(after, source.manifest.dim)
    lengths = np.linalg.norm(before, axis=1) * np.linalg.norm(restored, axis=1)
    cosine = (before * restored).sum(axis=1) / np.maximum(lengths, 1e-30)
    count = min(NEIGHBOURS, len(picks) - 1)
    overlap = 1.0
    if count > 0:
        one, other = _nearest(before, count), _nearest(after, count)
        both = [len(np.intersect1d(a, b)) for a, b in zip(one, other, strict=True)]
        overlap = float(np.mean(both)) / count
    return {
        "sample_rows": len(picks),
        "neighbour_overlap": overlap,
        "cosine_error": max(0.0, 1.0 - float(cosine.mean())),
    }


def _sample(store: KnowledgeStore, picks: np.ndarray) -> np.ndarray:
    """Vectors of ascending row numbers, float64 [len(picks), dim], in one pass over the blocks."""
    sampled, at = [], 0
    for block in blocks(store):
        inside = picks[(picks >= at) & (picks < at + len(block))] - at
        sampled.append(block[inside].astype(np.float64))
        at += len(block)
    return np.concatenate(sampled)


def _nearest(rows: np.ndarray, count: int) -> np.ndarray:
    """The `count` nearest other rows of each row by Euclidean distance, in any order."""
    rows = rows - rows.mean(axis=0)
    square = np.square(rows).sum(axis=1)
    distance = square[:, None] + square[None] - 2 * rows @ rows.T
    np.fill_diagonal(distance, np.inf)
    return np.argpartition(distance, count - 1, axis=1)[:, :count]
