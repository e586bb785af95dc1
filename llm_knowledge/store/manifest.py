"""The manifest of a knowledge store: what its vectors are, in one checked JSON file."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from llm_knowledge.errors import InputError
from llm_knowledge.levels import Level

FORMAT_VERSION = 1
NO_CUTOFF = np.iinfo(np.int64).min
DTYPES: dict[str, np.dtype] = {
    "float16": np.dtype("<f2"),
    "float32": np.dtype("<f4"),
    "int8": np.dtype("i1"),
}
JOB_KEY, PART_KEY = b"llm_knowledge.job", b"llm_knowledge.part"
# 64 MiB of vectors in one row group: large reads stay sequential, a narrow range stays cheap.
ROW_GROUP_BYTES = 64 << 20

DType = Literal["float16", "float32", "int8"]
KeyType = Literal["int64", "string"]
# What a store can be whose vectors know nothing of their keys.
CONTROLS = ("shuffled", "random", "constant")


def _optional() -> Any:
    """A field that older manifests lack: left out where it is None, so that their hashes stay."""
    return Field(default=None, exclude_if=lambda value: value is None)


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", protected_namespaces=())


class AnswerInfo(_Strict):
    """Most tokens of the stored answers, and whose hidden state the vectors are."""

    tokens: int
    state: Literal["prompt", "answer"]


class ModelInfo(_Strict):
    """Which frozen model made the vectors; `chat_template` is a hash of what stood around them."""

    name: str
    revision: str | None = None
    weights_hash: str
    max_tokens: int
    precision: str = "float32"
    chat_template: str | None = _optional()
    answer: AnswerInfo | None = _optional()


class TemplateInfo(_Strict):
    """Which prompt template, by name, version and content hash."""

    name: str
    version: int
    hash: str


class Cutoff(_Strict):
    """`per_key`: in the rows; `global`: one time (seconds) for all; `none`: nothing dated.

    With unit "order" numbers are no seconds but places in each user's own order: the log has no clock.
    """

    kind: Literal["per_key", "global", "none"]
    value: int | None = None
    unit: Literal["order"] | None = _optional()


class ProfileInfo(_Strict):
    """How much of a user's past was asked for, see `profiles.ProfileOptions`."""

    per_scenario: int
    total: int
    min_interactions: int | None = _optional()
    cutoff: int | None = _optional()


class Compression(_Strict):
    """How vectors were made smaller, and what that cost, measured on a sample of the rows.

    Attributes:
        method: "pca" (centred, `projection.safetensors` holds it) or "truncate".
        source_dim: length of the source's vectors.
        projection: `blake2b:<hex>` of the projection file, None for "truncate".
        sample_rows: rows that were measured.
        retained_variance: 0..1, variance of the kept dimensions over all rows, before the cast.
        neighbour_overlap: 0..1, share of the 10 nearest rows (Euclidean, within the sample) that
            are the same before and after.
        cosine_error: 1 - mean cosine of a source vector and what the stored one stands for.
    """

    method: Literal["pca", "truncate"]
    source_dim: int
    projection: str | None = None
    sample_rows: int
    retained_variance: float
    neighbour_overlap: float
    cosine_error: float


class Part(_Strict):
    """One file of the store; `checksum` is `blake2b:<hex>` of its bytes."""

    file: str
    rows: int
    key_min: int | str
    key_max: int | str
    checksum: str


class Manifest(_Strict):
    """Everything that identifies a store. Unknown fields are refused.

    `input_fingerprint` is of what the prompts were made of; `dataset` is `dataset_origin` of the data,
    None in stores of version 0.1 and in those made by hand.
    """

    format_version: int = FORMAT_VERSION
    level: Level
    complete: bool
    model: ModelInfo
    template: TemplateInfo
    pooling: str
    layer: int
    dim: int = Field(ge=1, le=2**24)
    dtype: DType
    key_type: KeyType
    rows: int
    cutoff: Cutoff
    input_fingerprint: str
    dataset: str | None = _optional()
    parents: list[str] = []
    normalized: bool
    note: str = ""
    profile: ProfileInfo | None = _optional()
    compression: Compression | None = _optional()
    parts: list[Part] = []
    versions: dict[str, str] = {}

    @property
    def control(self) -> str | None:
        """Which control's vectors these are, of `CONTROLS`; None for knowledge.

        `shuffled_store` says so in the note, and a compressed copy keeps it.
        """
        kind, *rest = self.note.split(" control, seed ")
        return kind if rest and kind in CONTROLS else None

    @property
    def job(self) -> str:
        """Fingerprint of what was asked for (model, template, data), also in every part's footer."""
        # What is known before a part is written; what a compression cost is not.
        late = {"complete", "parts", "versions", "rows", "cutoff", "compression", "dataset"}
        about = self.model_dump(exclude=late)
        if self.compression is not None:
            about["compression"] = self.compression.method
        return fingerprint_of(about)


def fingerprint_of(value: Any) -> str:
    """Hex digest (32 characters) of a JSON-able value, independent of key order."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()


def file_checksum(path: Path) -> str:
    """`blake2b:<hex>` of the bytes of a file.

    Raises:
        InputError: It cannot be read.
    """
    try:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16))
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error})") from error
    return f"blake2b:{digest.hexdigest()}"


def part_name(index: int) -> str:
    """File name of part `index`."""
    return f"part-{index:05d}.parquet"


def read_manifest(path: str | Path) -> Manifest:
    """Reads and checks `manifest.json`.

    Raises:
        InputError: no directory, no manifest, not JSON, unknown or missing fields, another format.
    """
    file = Path(path) / "manifest.json"
    if file.exists() and not file.is_file():  # a pipe would never end
        raise InputError(
            f"{file}: is no regular file; extract again, or put the store back from a copy"
        )
    try:
        return Manifest.model_validate_json(file.read_bytes())
    except FileNotFoundError as error:
        raise InputError(
            f"{file}: not found; this is no knowledge store, make one with `knowledge extract`"
        ) from error
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{file}: cannot be read ({error})") from error
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"]) or "the file"
        raise InputError(
            f"{file}: {field}: {first['msg']}; the manifest is damaged or was written "
            f"by another version"
        ) from error
