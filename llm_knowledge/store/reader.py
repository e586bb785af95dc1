"""The knowledge store: a directory of Parquet parts and a manifest.

Layout: `manifest.json` and `part-00000.parquet ...` with the columns `key` (int64 or string),
`vector` (fixed-size binary, dim x itemsize bytes, little endian), `scale` (float32, int8 stores
only), `prompt` (string), `answer` (string or null), `cutoff` (int64 seconds or null). Keys
are unique and sorted over all parts, so a row number is the rank of its key. A row may be joined
with an event only if the event's timestamp is greater than the row's cut-off.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from llm_knowledge.errors import InputError
from llm_knowledge.store.manifest import (
    DTYPES,
    FORMAT_VERSION,
    JOB_KEY,
    NO_CUTOFF,
    Manifest,
    file_checksum,
    fingerprint_of,
    read_manifest,
)

PROJECTION = "projection.safetensors"  # mean and basis of a store compressed by PCA


def open_part(file: Path) -> pq.ParquetFile:
    """Opens a part; a missing or broken file is an InputError that names it."""
    if file.exists() and not file.is_file():
        raise InputError(
            f"{file}: is no regular file; extract again, or put the store back from a copy"
        )
    try:
        return pq.ParquetFile(file, memory_map=True, page_checksum_verification=True)
    except FileNotFoundError as error:
        raise InputError(f"{file}: the part is missing; extract again to restore it") from error
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise InputError(f"{file}: not a readable Parquet file ({error})") from error


def check_footer(file: Path, handle: pq.ParquetFile, manifest: Manifest, rows: int) -> None:
    """Compares a part's footer with the manifest: rows, vector width, the job's fingerprint."""
    schema, meta = handle.schema_arrow, handle.metadata
    if meta.num_rows != rows:
        raise InputError(f"{file}: has {meta.num_rows} rows, the manifest says {rows}")
    for column in ("key", "vector", "prompt", "answer", "cutoff"):
        if column not in schema.names:
            raise InputError(f"{file}: column {column!r} is missing; it has {schema.names}")
    types = {
        "key": pa.int64() if manifest.key_type == "int64" else pa.string(),
        "prompt": pa.string(),
        "answer": pa.string(),
        "cutoff": pa.int64(),
    }
    for column, kind in types.items():
        if (type_found := schema.field(column).type) != kind:
            raise InputError(
                f"{file}: column {column!r} is {type_found}, must be {kind}; extract again"
            )
    vector = schema.field("vector")
    width = manifest.dim * DTYPES[manifest.dtype].itemsize
    said = {_text(k): _text(v) for k, v in (vector.metadata or {}).items()}
    if vector.type != pa.binary(width) or said.get("dim") != str(manifest.dim):
        raise InputError(
            f"{file}: column 'vector' is {vector.type} with dim {said.get('dim')}, the "
            f"manifest says {width} bytes, dim {manifest.dim}"
        )
    job = _text((schema.metadata or {}).get(JOB_KEY, b""))
    if job != manifest.job:
        raise InputError(
            f"{file}: row 0: made by another model, template or input (fingerprint "
            f"{job or 'absent'}, the manifest has {manifest.job})"
        )


def _text(written: bytes) -> str:
    """What a footer says of itself, which damage may have made no UTF-8."""
    return written.decode("utf-8", "replace")


class KnowledgeStore:
    """Read access to a store. Opening reads the manifest and the footers, never a vector.

    Attributes:
        path: the directory.
        manifest: the checked manifest.
        offsets: int64 [parts + 1], first row number of each part, then the number of rows.
    """

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.path, self.manifest = path, manifest
        self.offsets = np.cumsum([0] + [part.rows for part in manifest.parts], dtype=np.int64)
        self._handle = lru_cache(maxsize=32)(lambda index: open_part(self._file(index)))
        self._keys: np.ndarray | None = None

    def _file(self, index: int) -> Path:
        return self.path / self.manifest.parts[index].file

    @classmethod
    def open(
        cls,
        path: str | Path,
        allow_incomplete: bool = False,
        manifest: Manifest | None = None,
    ) -> KnowledgeStore:
        """Opens a store after cheap checks: manifest, presence, row counts, dim, model of the parts.

        Raises:
            InputError: a check failed, or the store is incomplete and `allow_incomplete` is
            false.
        """
        path = Path(path)
        manifest = manifest or read_manifest(path)
        if manifest.format_version != FORMAT_VERSION:
            raise InputError(
                f"{path}: format_version {manifest.format_version}, this version reads "
                f"{FORMAT_VERSION}"
            )
        if not manifest.complete and not allow_incomplete:
            raise InputError(
                f"{path}: the store is incomplete; run the same `knowledge extract` "
                f"again, it continues where it stopped"
            )
        if manifest.complete and not manifest.parts:
            raise InputError(
                f"{path / 'manifest.json'}: parts: there is none, a complete store has rows; "
                f"extract again"
            )
        if manifest.complete and sum(part.rows for part in manifest.parts) != manifest.rows:
            raise InputError(
                f"{path / 'manifest.json'}: rows: {manifest.rows}, but the parts have "
                f"{sum(part.rows for part in manifest.parts)}"
            )
        for part in manifest.parts:
            file = path / part.file
            if Path(part.file).name != part.file:
                raise InputError(
                    f"{path / 'manifest.json'}: parts: {part.file!r} is not a file name"
                )
            with open_part(file) as handle:
                check_footer(file, handle, manifest, part.rows)
        return cls(path, manifest)

    @property
    def fingerprint(self) -> str:
        """Hash of all that identifies the vectors: what was asked for, and the parts' checksums."""
        return fingerprint_of(self.manifest.model_dump(exclude={"complete", "versions", "dataset"}))

    def __len__(self) -> int:
        return self.manifest.rows

    def _column(self, name: str) -> pa.ChunkedArray:
        kind = {"key": pa.int64() if self.manifest.key_type == "int64" else pa.string()}
        chunks = []
        for index in range(len(self.manifest.parts)):
            chunks += self._read(index, [name])[name].chunks
        return pa.chunked_array(chunks, kind.get(name, pa.int64()))

    def _read(self, index: int, columns: list[str], groups: list[int] | None = None) -> pa.Table:
        try:
            handle = self._handle(index)
            if groups is None:
                groups = list(range(handle.metadata.num_row_groups))
            return handle.read_row_groups(groups, columns=columns, use_threads=False)
        except (pa.ArrowException, OSError) as error:
            raise InputError(f"{self._file(index)}: cannot be read ({error})") from error

    def keys(self) -> np.ndarray:
        """All keys in order: int64 [rows], or an object array of str [rows].

        Raises:
            InputError: they are not unique and sorted, so that no row could be found by its key.
        """
        if self._keys is None:
            column = self._column("key")
            if column.null_count:
                raise InputError(f"{self.path}: a key is null; run `knowledge verify` on the store")
            dtype = np.int64 if self.manifest.key_type == "int64" else object
            keys = column.to_numpy().astype(dtype, copy=False)
            wrong = np.flatnonzero(keys[1:] <= keys[:-1])
            if wrong.size:
                row, same = int(wrong[0]) + 1, keys[wrong[0] + 1] == keys[wrong[0]]
                raise InputError(
                    f"{self._place(row)}: key {keys[row : row + 1].tolist()[0]!r} is "
                    f"{'a duplicate' if same else 'out of order'}; extract again"
                )
            self._keys = keys
        return self._keys

    def _place(self, row: int) -> str:
        """Part and row within it (from 0) of a row of the store, for messages."""
        index = int(np.searchsorted(self.offsets, row, side="right")) - 1
        return f"{self._file(index)}: row {row - self.offsets[index]}"

    def cutoffs(self) -> np.ndarray:
        """Cut-off of each row, int64 seconds [rows]; `NO_CUTOFF` (smallest int64) where null."""
        return pc.fill_null(self._column("cutoff"), int(NO_CUTOFF)).to_numpy()

    def row_of(self, keys: Sequence[int] | Sequence[str] | np.ndarray) -> np.ndarray:
        """Row numbers of keys, int64 [n]; -1 for a key that the store does not have."""
        stored = self.keys()
        if self.manifest.key_type == "string":
            try:
                rows = pc.index_in(
                    pa.array(keys, pa.string()), value_set=pa.array(stored, pa.string())
                )
            except (pa.ArrowException, TypeError) as error:
                raise InputError(f"{self.path}: keys are strings, got {keys[:1]!r}") from error
            return pc.fill_null(rows, -1).to_numpy(zero_copy_only=False).astype(np.int64)
        asked = np.asarray(keys)
        if asked.size and asked.dtype.kind not in "iu":
            raise InputError(f"{self.path}: keys are int64, got {asked.dtype} {asked[:1]!r}")
        asked = asked.astype(np.int64)
        if not len(stored):
            return np.full(len(asked), -1, np.int64)
        rows = np.searchsorted(stored, asked)
        hit = stored[np.minimum(rows, len(stored) - 1)] == asked
        return np.where(hit, rows, -1).astype(np.int64)

    def read_vectors(self, start: int, stop: int) -> np.ndarray:
        """Vectors of rows start..stop-1: [stop-start, dim] float16, or float32 for other stores.

        Only the parts and row groups that overlap the range are read.

        Raises:
            InputError: a part cannot be read, or a vector has NaN or Inf.
        """
        start, stop = max(0, start), min(stop, int(self.offsets[-1]))
        int8 = self.manifest.dtype == "int8"
        kind = np.float32 if int8 else DTYPES[self.manifest.dtype]
        out = np.empty((max(0, stop - start), self.manifest.dim), kind)
        columns = ["vector", "scale"] if int8 else ["vector"]
        first = int(np.searchsorted(self.offsets, start, side="right")) - 1
        for index in range(first, len(self.manifest.parts)):
            row = int(self.offsets[index])
            if row >= stop:
                break
            meta = self._handle(index).metadata
            for group in range(meta.num_row_groups):
                rows = meta.row_group(group).num_rows
                low, high = max(start, row), min(stop, row + rows)
                if low < high:
                    table = self._read(index, columns, [group])
                    values = decode_vectors(table, self.manifest)[low - row : high - row]
                    # One sum per row: not finite as soon as one of its numbers is not.
                    bad = np.flatnonzero(~np.isfinite(values.sum(axis=1, dtype=np.float32)))
                    if bad.size:
                        raise InputError(
                            f"{self._place(low + int(bad[0]))}: the vector has NaN or "
                            f"Inf; extract again"
                        )
                    out[low - start : high - start] = values
                row += rows
        return out

    def read_text(self, rows: Sequence[int] | np.ndarray) -> list[dict[str, str | None]]:
        """`{"prompt": ..., "answer": ...}` of the given row numbers, in their order."""
        rows = np.asarray(rows, np.int64)
        if rows.size and (rows.min() < 0 or rows.max() >= self.offsets[-1]):
            raise InputError(f"{self.path}: row numbers must be in 0..{self.offsets[-1] - 1}")
        out: list[dict[str, str | None]] = [{} for _ in range(len(rows))]
        owner = np.searchsorted(self.offsets, rows, side="right") - 1
        for index in np.unique(owner):
            where = np.flatnonzero(owner == index)
            table = self._read(int(index), ["prompt", "answer"])
            texts = table.take(pa.array(rows[where] - self.offsets[index])).to_pylist()
            for position, text in zip(where, texts, strict=True):
                out[position] = text
        return out


def decode_vectors(table: pa.Table, manifest: Manifest) -> np.ndarray:
    """Column `vector` of a table as [rows, dim] float16 or float32 (int8 times `scale`)."""
    dtype, dim = DTYPES[manifest.dtype], manifest.dim
    blocks = [np.empty((0, dim), dtype)]
    for chunk in table["vector"].chunks:
        count, offset = len(chunk) * dim, chunk.offset * dim * dtype.itemsize
        blocks.append(np.frombuffer(chunk.buffers()[1], dtype, count, offset).reshape(-1, dim))
    values = blocks[1] if len(blocks) == 2 else np.concatenate(blocks)
    if manifest.dtype == "int8":
        return values.astype(np.float32) * table["scale"].to_numpy()[:, None]
    return values


# ---------------------------------------------------------------------------------------------
# verify


def verify(path: str | Path, manifest: Manifest | None = None) -> None:
    """Reads every byte of a store and checks it against its manifest (or one not written yet).

    Raises:
        InputError: incomplete, part missing, checksum, another model's part, wrong dimension,
        NaN/Inf,
            duplicate or unsorted keys, cut-offs that contradict the manifest. Names the part, and
            the row (counted within the part, from 0) where there is one.
    """
    path = Path(path)
    manifest = manifest or read_manifest(path)
    for part in manifest.parts:
        file = path / part.file
        if not file.is_file():
            raise InputError(f"{file}: the part is missing; extract again to restore it")
        checksum = file_checksum(file)
        if checksum != part.checksum:
            raise InputError(
                f"{file}: its bytes changed: checksum {checksum}, the manifest says "
                f"{part.checksum}; delete the part and extract again"
            )
    check_projection(path, manifest)
    store = KnowledgeStore.open(path, manifest=manifest)
    previous: int | str | None = None
    for index, part in enumerate(manifest.parts):
        file = path / part.file
        table = store._read(index, store._handle(index).schema_arrow.names)
        previous = _check_keys(file, table["key"], previous)
        if (table["key"][0].as_py(), previous) != (part.key_min, part.key_max):
            raise InputError(
                f"{file}: the key range differs from {part.key_min!r}.."
                f"{part.key_max!r} in the manifest"
            )
        _check_vectors(file, table, manifest)
        _check_cutoffs(file, table["cutoff"], manifest)


def check_projection(path: Path, manifest: Manifest) -> None:
    """The projection file of a store compressed by PCA is the one that made its vectors.

    Raises:
        InputError: it is missing or changed.
    """
    compression = manifest.compression
    if compression is None or compression.method != "pca":
        return
    file = path / PROJECTION
    if not file.is_file():
        raise InputError(f"{file}: is missing; compress the store again")
    checksum = file_checksum(file)
    if checksum != compression.projection:
        raise InputError(
            f"{file}: its bytes changed: checksum {checksum}, the manifest says "
            f"{compression.projection}; compress the store again"
        )


def _check_keys(file: Path, column: pa.ChunkedArray, previous: int | str | None) -> int | str:
    """Strictly increasing keys, also against the last key of the part before; returns the last."""
    keys = column.to_pylist()
    for row, key in enumerate(keys):
        if key is None:
            raise InputError(f"{file}: row {row}: the key is null")
        if previous is not None and key <= previous:
            what = "a duplicate of" if key == previous else "out of order after"
            raise InputError(f"{file}: row {row}: key {key!r} is {what} {previous!r}")
        previous = key
    if previous is None:
        raise InputError(f"{file}: has no rows")
    return previous


def _check_vectors(file: Path, table: pa.Table, manifest: Manifest) -> None:
    values = decode_vectors(table, manifest).astype(np.float32)
    bad = np.flatnonzero(~np.isfinite(values).all(axis=1))
    if bad.size:
        raise InputError(f"{file}: row {bad[0]}: the vector has NaN or Inf")
    if manifest.normalized:
        bad = np.flatnonzero(np.abs(np.linalg.norm(values, axis=1) - 1) > 0.02)
        if bad.size:
            length = np.linalg.norm(values[bad[0]])
            raise InputError(
                f"{file}: row {bad[0]}: the vector has length {length:.3f}, the manifest "
                f"says normalized"
            )


def _check_cutoffs(file: Path, column: pa.ChunkedArray, manifest: Manifest) -> None:
    cutoffs = pc.fill_null(column, int(NO_CUTOFF)).to_numpy()
    if manifest.cutoff.kind == "none":
        bad = np.flatnonzero(cutoffs != NO_CUTOFF)
    elif manifest.cutoff.kind == "global":
        bad = np.flatnonzero(cutoffs != manifest.cutoff.value)
    else:
        return
    if bad.size:
        raise InputError(
            f"{file}: row {bad[0]}: cut-off {cutoffs[bad[0]]}, the manifest says "
            f"{manifest.cutoff.kind} {manifest.cutoff.value}"
        )
