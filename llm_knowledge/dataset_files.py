"""The files of a prepared dataset as both packages read them: its description and the parts of a split."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

from llm_knowledge.errors import InputError
from llm_knowledge.json_files import read_json

FORMAT_VERSION = 1
SplitName = Literal["profile", "train", "valid", "test"]
SPLITS: tuple[SplitName, ...] = ("profile", "train", "valid", "test")
INTRODUCTION = "introduction"  # the first events of users who are held out of training


def read_description(path: Path | str) -> dict[str, Any]:
    """Reads DATA/dataset.json as it stands; `trainer.data.dataset.DatasetInfo` says what is in it.

    Raises:
        InputError: It is absent, not JSON, or of another format version.
    """
    file, remedy = Path(path) / "dataset.json", "prepare the data again"
    if not file.exists():
        raise InputError(
            f"{path}: not a prepared dataset, dataset.json: not found; check the path, or make a dataset "
            "with `prepare` or `simulate`"
        )
    content = read_json(file, {}, remedy)
    if content.get("format_version") != FORMAT_VERSION:
        raise InputError(
            f"{file}: format_version is {content.get('format_version')!r}, this program reads "
            f"{FORMAT_VERSION}; {remedy}"
        )
    return read_json(file, {"rows": dict, "scenarios": list}, remedy)


def footer_checksum(file: Path) -> str:
    """`blake2b:<hex>` of a Parquet file's footer, which says where its pages lie and what is in them.

    Raises:
        OSError: It cannot be read.
    """
    with file.open("rb") as content:
        content.seek(max(file.stat().st_size - 8, 0))
        length = int.from_bytes(content.read(4), "little")
        content.seek(max(file.stat().st_size - 8 - length, 0))
        return f"blake2b:{hashlib.blake2b(content.read(), digest_size=16).hexdigest()}"


def check_footers(path: Path | str, files: Iterable[Path], footers: dict[str, str]) -> None:
    """Compares footers with those that were written; readers of Parquet can crash on a damaged one.

    Args:
        path: The dataset.
        files: Some of its files.
        footers: Of dataset.json: path below the dataset to checksum; empty in datasets from before it.

    Raises:
        InputError: Names the file that is damaged, was replaced, or is foreign.
    """
    for file in files if footers else ():
        if not file.exists():
            raise InputError(f"{file}: no such file; copy the dataset again, or prepare it again")
        if not file.is_file():
            raise InputError(f"{file}: is no regular file; give a Parquet file")
        if footers.get(file.relative_to(path).as_posix()) != footer_checksum(file):
            raise InputError(
                f"{file}: its footer is not the one that was written: the file is truncated, damaged or was "
                "replaced; copy it again, or prepare the data again"
            )


def check_pages(file: Path) -> None:
    """Reads a whole Parquet file with its pages' checksums and keeps nothing.

    Raises:
        InputError: A page is damaged.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(file, page_checksum_verification=True) as parquet:
            for _ in parquet.iter_batches():
                pass
    except (pa.ArrowException, OSError) as error:
        reason = (str(error).splitlines() or ["unreadable"])[0]
        raise InputError(f"{file}: damaged ({reason}); copy or write it again") from None


def part_files(path: Path | str, split: str) -> list[Path]:
    """Lists the Parquet parts of one split in time order; there may be none.

    Raises:
        InputError: One is no regular file: to read a pipe would never end.
    """
    files = sorted((Path(path) / split).glob("part-*.parquet"))
    for file in files:
        if not file.is_file():
            raise InputError(
                f"{file}: is no regular file; copy the dataset again, or prepare it again"
            )
    return files


def split_files(path: Path | str, split: str) -> list[Path]:
    """Parquet parts of one split in time order.

    Raises:
        InputError: unknown split name, or the split has no part.
    """
    if split not in (*SPLITS, INTRODUCTION):
        raise InputError(f"unknown split {split!r}; there are {', '.join(SPLITS)}")
    files = part_files(path, split)
    if not files:
        raise InputError(f"{Path(path) / split}: the split has no part-*.parquet file")
    return files


def dataset_fingerprint(path: Path | str) -> str:
    """Identifies a dataset's content, wherever it lies: its description, its parts and their sizes."""
    digest = hashlib.sha256((Path(path) / "dataset.json").read_bytes())
    for split in SPLITS:
        for file in split_files(path, split):
            digest.update(f"\0{split}/{file.name} {file.stat().st_size}".encode())
    return digest.hexdigest()[:32]


def dataset_origin(path: Path | str) -> str:
    """Fingerprint of the first dataset of a chain: the same whatever has been appended since.

    Raises:
        InputError: See `read_description`.
    """
    parents = read_description(path).get("parents") or []
    return str(parents[0]["fingerprint"]) if parents else dataset_fingerprint(path)
