"""Writing a knowledge store: parts and manifest appear by rename; a shuffled control store."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from llm_knowledge.errors import InputError
from llm_knowledge.files import (
    check_new_directory,
    new_directory,
    new_file,
    remove_abandoned,
    write_text,
)
from llm_knowledge.locks import LOCK, directory_lock
from llm_knowledge.store.manifest import (
    CONTROLS,
    DTYPES,
    JOB_KEY,
    PART_KEY,
    DType,
    Manifest,
    Part,
    file_checksum,
    part_name,
    read_manifest,
)
from llm_knowledge.store.reader import NO_CUTOFF, KnowledgeStore

# 64 MiB of vectors in one row group: large reads stay sequential, a narrow range stays cheap.
ROW_GROUP_BYTES = 64 << 20


def write_manifest(path: str | Path, manifest: Manifest) -> None:
    """Writes `manifest.json` by rename: a reader sees the old or the new one, never half."""
    path = Path(path)
    write_text(path / "manifest.json", manifest.model_dump_json(indent=1) + "\n")


def write_part(
    path: str | Path,
    index: int,
    manifest: Manifest,
    keys: Sequence[int] | Sequence[str] | np.ndarray,
    vectors: np.ndarray,
    prompts: Sequence[str],
    answers: Sequence[str | None] | None = None,
    cutoffs: Sequence[int | None] | None = None,
) -> Part:
    """Writes one part by rename and returns its entry for the manifest.

    Args:
        path: the store's directory, which exists.
        index: number of the part; part i's keys lie before part i+1's.
        manifest: level, dim, dtype and key type of the store, and the job's fingerprint.
        keys: [rows] strictly increasing, not empty.
        vectors: [rows, dim] float; stored as `manifest.dtype`.
        prompts: [rows] the text that the model read.
        answers: [rows] generated text, or None.
        cutoffs: [rows] seconds of the newest event in the prompt, None where no event is in it.

    Raises:
        InputError: wrong shape, or NaN/Inf (also after the cast to float16), with part and row.
    """
    path, name, rows = Path(path), part_name(index), len(keys)
    vectors = np.asarray(vectors)
    if rows == 0 or vectors.shape != (rows, manifest.dim):
        raise InputError(
            f"{path / name}: vectors have shape {vectors.shape}, expected "
            f"[{rows} > 0, {manifest.dim}]"
        )
    raw, scale = _to_bytes(vectors, manifest.dtype, path / name)
    table = _part_table(manifest, index, keys, raw, scale, prompts, answers, cutoffs)
    group = max(1, min(65_536, ROW_GROUP_BYTES // max(1, raw.shape[1])))
    with new_file(path / name) as temporary:
        pq.write_table(
            table,
            temporary,
            row_group_size=group,
            compression="zstd",
            compression_level=1,
            use_dictionary=False,
            write_page_checksum=True,
            write_statistics=["key", "cutoff"],
        )
        checksum = file_checksum(temporary)
    low, high = table["key"][0].as_py(), table["key"][-1].as_py()
    return Part(file=name, rows=rows, key_min=low, key_max=high, checksum=checksum)


def _to_bytes(
    vectors: np.ndarray, dtype: DType, where: Path
) -> tuple[np.ndarray, np.ndarray | None]:
    """Casts [rows, dim] floats to (uint8 [rows, dim*itemsize], float32 scale [rows] or None)."""
    scale = None
    _refuse_not_finite(vectors, where)
    if dtype == "int8":
        scale = np.maximum(np.abs(vectors).max(axis=1), 1e-12).astype(np.float32) / 127
        cast = np.rint(vectors / scale[:, None]).clip(-127, 127).astype(np.int8)
    else:
        with np.errstate(over="ignore"):
            cast = vectors.astype(DTYPES[dtype])
        _refuse_not_finite(cast, where)
    return np.ascontiguousarray(cast).view(np.uint8), scale


def _refuse_not_finite(vectors: np.ndarray, where: Path) -> None:
    bad = np.flatnonzero(~np.isfinite(vectors).all(axis=1))
    if bad.size:
        raise InputError(
            f"{where}: row {bad[0]}: the vector has NaN or Inf as {vectors.dtype}; "
            f"store float32, or normalize, or check the model"
        )


def _part_table(
    manifest: Manifest,
    index: int,
    keys: Sequence[int] | Sequence[str] | np.ndarray,
    raw: np.ndarray,
    scale: np.ndarray | None,
    prompts: Sequence[str],
    answers: Sequence[str | None] | None,
    cutoffs: Sequence[int | None] | None,
) -> pa.Table:
    rows, width = raw.shape
    key_type = pa.int64() if manifest.key_type == "int64" else pa.string()
    vector = pa.FixedSizeBinaryArray.from_buffers(
        pa.binary(width), rows, [None, pa.py_buffer(raw.tobytes())]
    )
    meta = {"dim": str(manifest.dim), "dtype": manifest.dtype}
    columns: list[tuple[pa.Field, pa.Array]] = [
        (pa.field("key", key_type, nullable=False), pa.array(keys, key_type)),
        (pa.field("vector", pa.binary(width), nullable=False, metadata=meta), vector),
        (pa.field("prompt", pa.string()), pa.array(prompts, pa.string())),
        (pa.field("answer", pa.string()), pa.array(answers or [None] * rows, pa.string())),
        (pa.field("cutoff", pa.int64()), pa.array(cutoffs or [None] * rows, pa.int64())),
    ]
    if scale is not None:
        columns.insert(2, (pa.field("scale", pa.float32(), nullable=False), pa.array(scale)))
    schema = pa.schema(
        [field for field, _ in columns],
        metadata={JOB_KEY: manifest.job.encode(), PART_KEY: str(index).encode()},
    )
    return pa.Table.from_arrays([array for _, array in columns], schema=schema)


@contextmanager
def resumed_directory(path: str | Path, manifest: Manifest) -> Iterator[Path]:
    """As `new_directory`, but what a killed run of the same job has written is there again.

    It stays if the block is interrupted or the disk is full, and goes if the block refuses its
    input.

    Raises:
        InputError: as `new_directory`; another run of this job is going on.
    """
    path = Path(os.path.abspath(path))
    check_new_directory(path)
    building = path.with_name(f".{path.name}.partial")
    keep = False
    with directory_lock(building):
        try:
            remove_abandoned(building)
            if not _is_of_job(building, manifest):
                for file in building.iterdir():
                    if file.name != LOCK:
                        shutil.rmtree(file) if file.is_dir() else file.unlink()
                write_manifest(building, manifest)
            yield building
            (building / LOCK).unlink()
            os.replace(building, path)
        except OSError as error:
            keep = True
            raise InputError(
                f"{path}: cannot be written ({error}); check space and rights"
            ) from error
        except BaseException as error:
            full = isinstance(error, InputError) and isinstance(error.__cause__, OSError)
            keep = full or not isinstance(error, Exception)
            raise
        finally:
            if not keep or not any(building.glob("part-*.parquet")):
                shutil.rmtree(building, ignore_errors=True)


def _is_of_job(path: Path, manifest: Manifest) -> bool:
    try:
        return read_manifest(path).job == manifest.job
    except InputError:
        return False


def write_store(
    path: str | Path,
    manifest: Manifest,
    keys: Sequence[int] | Sequence[str] | np.ndarray,
    vectors: np.ndarray,
    prompts: Sequence[str | None] | None = None,
    answers: Sequence[str | None] | None = None,
    cutoffs: Sequence[int | None] | None = None,
    rows_per_part: int = 65_536,
) -> Manifest:
    """Writes a whole store from memory into a new directory; rows may come in any order.

    Args:
        path: a directory that does not exist yet or is empty; it appears whole, by rename.
        manifest: as wanted; `rows`, `parts` and `complete` are filled in here.
        keys: [rows] unique int or str.
        vectors: [rows, dim] float.
        prompts: [rows], by default empty strings.
        answers: [rows] or None.
        cutoffs: [rows] seconds or None.
        rows_per_part: rows of one file.

    Raises:
        InputError: the directory is in use, or `write_part` refuses a row.
    """
    order = sorted(range(len(keys)), key=keys.__getitem__)
    parts, int64 = [], manifest.key_type == "int64"
    with new_directory(path) as building:
        for index, start in enumerate(range(0, len(order), rows_per_part)):
            take = order[start : start + rows_per_part]
            pick = lambda column, take=take: column and [column[i] for i in take]  # noqa: E731
            text = pick(prompts) or [""] * len(take)
            take_keys = np.array([keys[i] for i in take], np.int64 if int64 else object)
            part = (building, index, manifest, take_keys, np.asarray(vectors)[take])
            parts.append(write_part(*part, text, pick(answers), pick(cutoffs)))
        done = manifest.model_copy(update={"rows": len(order), "parts": parts, "complete": True})
        write_manifest(building, done)
    return done


def shuffled_store(
    path: str | Path, out: str | Path, seed: int, control: str = "shuffled"
) -> Manifest:
    """Writes a control store: the same keys and cut-offs, vectors that know nothing of their keys.

    shuffled: permuted between the keys; no key keeps its own when there are two rows or more, and a
    prompt moves with its vector, since it is the text that the vector was made of. random: Gaussian
    with the mean and standard deviation of the store's vectors, per dimension. constant: the mean of
    the store's vectors for every key, so that a model has the capacity and nothing to tell keys apart.
    Prompts of random and constant vectors are empty. Needs memory for all vectors and texts of the
    store.

    Raises:
        InputError: The store is incomplete, or the control is unknown.
    """
    if control not in CONTROLS:
        raise InputError(f"control {control!r} is unknown; choose one of {', '.join(CONTROLS)}")
    source = KnowledgeStore.open(path)
    manifest = source.manifest
    order = np.random.default_rng(seed).permutation(manifest.rows)
    giver = np.empty_like(order)
    giver[order] = np.roll(order, 1)  # one cycle through all rows: no fixed point
    text = source.read_text(giver)
    cutoffs = [None if c == NO_CUTOFF else int(c) for c in source.cutoffs()]
    dtype: DType = "float32" if manifest.dtype == "int8" else manifest.dtype
    manifest = manifest.model_copy(
        update={
            "parents": [source.fingerprint],
            "note": f"{control} control, seed {seed}",
            "dtype": dtype,
        }
    )
    vectors = source.read_vectors(0, manifest.rows)[giver]
    prompts, answers = [row["prompt"] for row in text], [row["answer"] for row in text]
    if control != "shuffled":
        prompts, answers = [""] * manifest.rows, [None] * manifest.rows
        mean, std = vectors.mean(0, dtype=np.float32), vectors.std(0, dtype=np.float32)
        noise = np.random.default_rng([seed, 1]).standard_normal(vectors.shape, dtype=np.float32)
        drawn = mean + (noise * std if control == "random" else np.zeros_like(noise))
        if manifest.normalized:
            drawn /= np.linalg.norm(drawn, axis=1, keepdims=True)
        vectors = drawn.astype(vectors.dtype)
    return write_store(out, manifest, source.keys(), vectors, prompts, answers, cutoffs)
