"""Options of the commands on stores; no heavy import, so that help is instant."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_compress_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of a compression to a parser."""
    add = parser.add_argument
    add("store", type=Path, help="complete knowledge store")
    add("--out", type=Path, required=True, help="new store directory")
    add("--dim", type=int, required=True, help="dimensions to keep")
    add(
        "--method",
        choices=("pca", "truncate"),
        default="pca",
        help="pca, or the first dimensions, for Matryoshka models; default: pca",
    )
    add("--dtype", choices=("float16", "int8"), default="float16", help="default: float16")


def add_refresh_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of a refresh to a parser."""
    add = parser.add_argument
    add("store", type=Path, help="complete knowledge store, left as it is")
    add("--data", type=Path, required=True, help="prepared dataset directory, as it is now")
    add("--out", type=Path, required=True, help="new store directory")
    add("--remove", nargs="+", default=[], metavar="KEY", help="keys to forget")
    add("--remove-file", type=Path, help="text file with one key to forget per line")
    add(
        "--child",
        nargs=2,
        type=Path,
        action="append",
        default=[],
        metavar=("OLD", "NEW"),
        help="compressed child of the store, and the directory of its successor",
    )
    add(
        "--cutoff",
        type=int,
        metavar="SECONDS",
        help="newest event that enters, for a dated successor; default: as the store was made",
    )
    add("--model", help="as for extract: the model that made the store; default: the packaged one")
    add("--template", help="as for extract, for a store of a template of your own")
    add("--trust-remote-code", action="store_true", help="run Python code that a model brings")
    add("--device", help="cpu, cuda, cuda:0, ...; default: an accelerator if there is one")
    add("--batch-tokens", type=int, help="padded tokens in a batch")
    add("--memory-limit", default="2GB", help="of the database that builds the profiles")
