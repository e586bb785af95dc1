"""What an extraction does, and its options on a command line."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from llm_knowledge.levels import LEVELS

ENCODER_FIELDS = (
    "model",
    "pooling",
    "layer",
    "dtype",
    "max_tokens",
    "normalize",
    "trust_remote_code",
    "revision",
    "device",
    "batch_tokens",
    "chat_template",
    "prefix_reuse",
    "attention",
    "compilation",
    "backend",
    "answer_tokens",
    "state",
)


EXAMPLE = """example:
  torchrun --nproc-per-node 2 -m llm_knowledge.extraction --data data/movielens \\
      --level all --out knowledge/movielens
"""


@dataclass(frozen=True)
class ExtractConfig:
    """What to extract, from where, with which model.

    With `level="all"` the stores are `out/user`, `out/item` and `out/scenario`. Fields that
    are None take the model's default, see `Encoder`.
    """

    data: Path
    out: Path
    level: str = "user"
    model: str | None = None
    revision: str | None = None
    trust_remote_code: bool = False
    template: str | None = None
    pooling: str = "auto"
    layer: int = -1
    dtype: str = "auto"
    store_dtype: str = "float16"
    normalize: bool | None = None
    max_tokens: int | None = None
    device: str | None = None
    batch_tokens: int | None = None
    chat_template: str = "auto"
    prefix_reuse: str = "auto"
    attention: str = "auto"
    compilation: str = "off"
    backend: str = "transformers"
    answer_tokens: int = 0
    state: str = "prompt"
    chunk: int | None = None
    per_scenario: int = 8
    total: int = 24
    min_interactions: int = 1
    cutoffs: Sequence[str] = ()  # several dated stores, see `dated.cutoff_times`
    cutoff: int | None = None  # of one dated store, seconds
    engine: str = "duckdb"
    spark_master: str | None = None
    memory_limit: str = "2GB"
    timeout_minutes: float = 360.0
    progress: bool = True


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of an extraction to a parser; `config_from` reads them back."""
    add = parser.add_argument
    add("--data", type=Path, required=True, help="prepared dataset directory")
    add("--out", type=Path, required=True, help="store directory, new or to be continued")
    add("--level", choices=(*LEVELS, "all"), default="user", help="default: user")
    add("--model", help="directory or hub name (safetensors only); default: the MiniLM package")
    add("--revision", help="branch, tag or commit of a hub model")
    add("--trust-remote-code", action="store_true", help="run Python code that a model brings")
    add("--template", help="shipped template's name or a YAML file; default: by kind of model")
    add(
        "--pooling",
        choices=("auto", "mean", "paragraphs", "last", "cls"),
        default="auto",
        help="auto: paragraphs (each read on its own, then their mean) for encoders, last token for "
        "decoders, or what a sentence-transformers directory says; cls: first token",
    )
    add(
        "--layer",
        type=int,
        default=-1,
        help="hidden state to take, default -1: the final one, the only one behind the final norm",
    )
    add(
        "--dtype",
        choices=("auto", "float32", "bfloat16"),
        default="auto",
        help="of the model; auto: float32 on a CPU, bfloat16 elsewhere",
    )
    add(
        "--store-dtype",
        choices=("float16", "float32", "int8"),
        default="float16",
        help="of the stored vectors, default: float16",
    )
    add(
        "--normalize",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="scale vectors to length 1; default: for encoders, or as the model's directory says",
    )
    add("--max-tokens", type=int, help="budget of a prompt; default: 256 encoder, 1024 decoder")
    add("--device", help="cpu, cuda, cuda:0, ...; default: an accelerator if there is one")
    add("--batch-tokens", type=int, help="computed tokens in a batch; default: 2048 CPU, 65536 GPU")
    add(
        "--chat-template",
        choices=("auto", "off"),
        default="auto",
        help="auto: a prompt is one user message, for decoders that bring a template",
    )
    add(
        "--prefix-reuse",
        choices=("auto", "off"),
        default="auto",
        help="auto: compute what all prompts begin with once, for decoders",
    )
    add(
        "--backend",
        choices=("transformers", "vllm"),
        default="transformers",
        help="what runs the model; vllm is a package of its own; default: transformers",
    )
    add(
        "--answer-tokens",
        type=int,
        default=0,
        help="most tokens of an answer to store beside the vector; default: 0, none",
    )
    add(
        "--state",
        choices=("prompt", "answer"),
        default="prompt",
        help="the vector is of the prompt, or of the last step of the generation",
    )
    add(
        "--attention",
        default="auto",
        choices=("auto", "packed", "sdpa", "eager", "flash_attention_2", "flash_attention_3"),
        help="auto: packed (no padding) on a CPU, sdpa elsewhere",
    )
    add(
        "--compile",
        dest="compilation",
        default="off",
        choices=("off", "default", "reduce-overhead", "max-autotune"),
        help="mode of torch.compile; reduce-overhead takes CUDA graphs; default: off",
    )
    add(
        "--chunk",
        type=int,
        help="keys of one part file; default: 256, fewer (to 64) for a small log",
    )
    add("--per-scenario", type=int, default=8, help="liked and disliked items of each scenario")
    add("--total", type=int, default=24, help="liked and disliked items over all scenarios")
    add(
        "--min-interactions",
        type=int,
        default=1,
        help="users with fewer events get no prompt, the model a default vector; default: 1",
    )
    add(
        "--cutoffs",
        nargs="+",
        default=[],
        metavar="TIME",
        help="one dated store per cut-off, side by side in --out: seconds, dates (what happened before "
        "that day enters), or 'day' for every day of the training window",
    )
    add(
        "--engine",
        choices=("duckdb", "spark"),
        default="duckdb",
        help="what builds the profiles: embedded, or Spark (requirements/spark.txt, Java)",
    )
    add("--spark-master", metavar="URL", help="of the Spark cluster; default: local mode")
    add("--memory-limit", default="2GB", help="of the engine that builds the profiles")
    add("--timeout-minutes", type=float, default=360.0, help="how long workers wait for each other")
    add("--no-progress", dest="progress", action="store_false", help="no progress bar")


def config_from(args: argparse.Namespace) -> ExtractConfig:
    """The configuration that the options of `add_arguments` describe."""
    names = [name for name in ExtractConfig.__annotations__ if hasattr(args, name)]
    return ExtractConfig(**{name: getattr(args, name) for name in names})
