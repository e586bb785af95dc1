"""Options of the commands on stores; no heavy import, so that help is instant."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from llm_knowledge.options import Options, option


class CompressOptions(Options):
    """What a compression is told, see `store.compress`."""

    store: Path = option(..., "complete knowledge store", positional=True)
    out: Path = option(..., "new store directory")
    dim: int = option(..., "dimensions to keep")
    method: Literal["pca", "truncate"] = option(
        "pca", "pca, or the first dimensions, for Matryoshka models; default: pca"
    )
    dtype: Literal["float16", "int8"] = option("float16", "default: float16")


class ShuffleOptions(Options):
    """What a control of a store is made with, see `store.writer.write_control`."""

    store: Path = option(..., "store directory", positional=True)
    out: Path = option(..., "directory to create")
    control: Literal["shuffled", "random", "constant"] = option(
        "shuffled",
        "the same vectors at other keys (default), Gaussian ones of the same mean and spread, or their mean "
        "for every key",
    )
    seed: int = option(0, "of the permutation or noise (default: 0)")


class InspectOptions(Options):
    """What is looked at, see `store.inspect`."""

    store: Path = option(..., "store directory", positional=True)
    key: str | None = option(None, "look at this key")
