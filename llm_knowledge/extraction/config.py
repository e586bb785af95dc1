"""What an extraction does, and its options on a command line."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, Literal

from llm_knowledge.encoding.options import EncoderOptions
from llm_knowledge.levels import Level
from llm_knowledge.options import Options, add_options, option

# Fields that name the model of a store again, and what it runs with.
MODEL_FIELDS = (
    "model",
    "trust_remote_code",
    "device",
    "batch_tokens",
    "memory_limit",
)

EXAMPLE = """example:
  torchrun --nproc-per-node 2 -m llm_knowledge.extraction --data data/movielens \\
      --level all --out knowledge/movielens
"""


class ExtractConfig(EncoderOptions):
    """What to extract, from where, with which model.

    With `level="all"` the stores are `out/user`, `out/item` and `out/scenario`. Fields that are None take
    the model's default, see `EncoderOptions`.
    """

    data: Path = option(..., "prepared dataset directory")
    out: Path = option(..., "store directory, new or to be continued")
    level: Literal[Level, "all"] = option("user", "default: user")
    template: str | None = option(
        None, "shipped template's name or a YAML file; default: by kind of model"
    )
    store_dtype: Literal["float16", "float32", "int8"] = option(
        "float16", "of the stored vectors, default: float16"
    )
    chunk: int | None = option(
        None, "keys of one part file; default: 256, fewer (to 64) for a small log", gt=0
    )
    per_scenario: int = option(8, "liked and disliked items of each scenario", gt=0)
    total: int = option(24, "liked and disliked items over all scenarios", gt=0)
    min_interactions: int = option(
        1, "users with fewer events get no prompt, the model a default vector; default: 1", gt=0
    )
    cutoffs: tuple[str, ...] = option(
        (),
        "one dated store per cut-off, side by side in --out: seconds, dates (what happened before that day "
        "enters), or 'day' for every day of the training window",
        metavar="TIME",
    )
    engine: Literal["duckdb", "spark"] = option(
        "duckdb",
        "what builds the profiles: embedded, or Spark (requirements/spark.txt, Java)",
    )
    spark_master: str | None = option(
        None, "of the Spark cluster; default: local mode", metavar="URL"
    )
    memory_limit: str = option("2GB", "of the engine that builds the profiles")
    timeout_minutes: float = option(360.0, "how long workers wait for each other", gt=0)
    progress: bool = option(True, "no progress bar", name="--no-progress")
    cutoff: int | None = None  # of one dated store, seconds; `cutoffs` makes several

    def encoder_options(self) -> dict[str, Any]:
        """Those of the encoder that reads the prompts."""
        return {name: getattr(self, name) for name in EncoderOptions.model_fields}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of an extraction to a parser; `config_from` reads them back."""
    add_options(parser, ExtractConfig)


def config_from(options: argparse.Namespace) -> ExtractConfig:
    """The configuration that the options of `add_arguments` describe."""
    return ExtractConfig.parsed(options)


class RefreshOptions(Options):
    """What a refresh is told besides `MODEL_FIELDS`, which are declared as those of an extraction."""

    store: Path = option(..., "complete knowledge store, left as it is", positional=True)
    data: Path = option(..., "prepared dataset directory, as it is now")
    out: Path = option(..., "new store directory")
    remove: tuple[str, ...] = option((), "keys to forget", metavar="KEY")
    remove_file: Path | None = option(None, "text file with one key to forget per line")
    child: tuple[tuple[Path, Path], ...] = option(
        (),
        "compressed child of the store, and the directory of its successor",
        metavar=("OLD", "NEW"),
    )
    cutoff: int | None = option(
        None,
        "newest event that enters, for a dated successor; default: as the store was made",
        metavar="SECONDS",
    )
    template: str | None = option(
        None, "YAML file of the template of your own that made the store; default: the shipped one"
    )


def add_refresh_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of a refresh to a parser."""
    add_options(parser, RefreshOptions)
    add_options(parser, ExtractConfig, MODEL_FIELDS)
