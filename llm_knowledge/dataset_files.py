"""The files of a prepared dataset as both packages read them: its description and the parts of a split."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

from llm_knowledge.errors import InputError

FORMAT_VERSION = 1
SplitName = Literal["profile", "train", "valid", "test"]
SPLITS: tuple[SplitName, ...] = ("profile", "train", "valid", "test")
INTRODUCTION = "introduction"  # the first events of users who are held out of training


def read_description(path: Path | str) -> dict[str, Any]:
    """Reads DATA/dataset.json as it stands; `trainer.data.dataset.DatasetInfo` says what is in it.

    Raises:
        InputError: It is absent, not JSON, or of another format version.
    """
    file = Path(path) / "dataset.json"
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise InputError(
            f"{path}: not a prepared dataset, dataset.json: not found; check the path, or make a dataset "
            "with `prepare` or `simulate`"
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(
            f"{file}: cannot be read as JSON ({error}); prepare the data again"
        ) from None
    version = content.get("format_version") if isinstance(content, dict) else None
    if version != FORMAT_VERSION:
        raise InputError(
            f"{file}: format_version is {version!r}, this program reads {FORMAT_VERSION}; "
            "prepare the data again"
        )
    for field, kind in (("rows", dict), ("scenarios", list)):
        if not isinstance(content.get(field), kind):
            raise InputError(
                f"{file}: field {field!r} is missing or has a wrong type; prepare the data again"
            )
    return dict(content)


def part_files(path: Path | str, split: str) -> list[Path]:
    """Lists the Parquet parts of one split in time order; there may be none."""
    return sorted((Path(path) / split).glob("part-*.parquet"))


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
