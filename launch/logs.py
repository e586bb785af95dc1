"""Logging of a command: standard loggers, one line per event on stderr, ranks told apart."""

import logging
import os
import sys
import warnings
from typing import TextIO

LEVELS = ("debug", "info", "warning", "error")
PACKAGES = ("launch", "trainer", "embeddings", "llm_knowledge")


def set_up_logging(level: str = "info") -> None:
    """Shows what our packages log from `level` on, and of other libraries what somebody can act on.

    Of several ranks, rank 0 says what concerns all: the others show warnings and errors only, unless
    `level` is "debug".
    """
    rank, world = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")
    number = logging.getLevelName(level.upper())
    if rank != "0" and level != "debug":
        number = max(number, logging.WARNING)
    handler = _StderrHandler()
    of_rank = f"[{rank}/{world}] " if world != "1" else ""
    handler.setFormatter(_Formatter(f"%(asctime)s {of_rank}%(message)s", "%Y-%m-%dT%H:%M:%S"))
    for package in PACKAGES:
        logger = logging.getLogger(package)
        logger.setLevel(number)
        logger.handlers = [handler]
        logger.propagate = False
    _silence_libraries()


def _silence_libraries() -> None:
    """Leaves out what libraries say of every run and nobody can mend.

    A command decides this for its process; importing a module of ours changes no filter and no logger.
    """
    for noisy in ("torchrec", "torch.fx._symbolic_trace"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    logging.getLogger().addFilter(_about_a_mistake)
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed|torchrec")
    for beginning in (
        # The CPU kernel of data-parallel tables is differentiable, though registered in an old way.
        "fbgemm::dense_embedding_codegen_lookup_function",
        "Please use DTensor instead",  # said at every look at a sharded tensor
        "Sparse invariant checks",  # of the plain tables that profiles measure beside ours
    ):
        warnings.filterwarnings("ignore", message=beginning)


def _about_a_mistake(record: logging.LogRecord) -> bool:
    # Said of every data-parallel table, which has no sharding spec by design.
    return "Sharding spec not found" not in str(record.msg)


class _StderrHandler(logging.StreamHandler):
    """Writes to what `sys.stderr` is now, which callers of `main` may have redirected."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)

    @property
    def stream(self) -> TextIO:  # type: ignore[override]
        return sys.stderr


class _Formatter(logging.Formatter):
    """Names the level of what is more than information."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        if record.levelno >= logging.WARNING:
            record.message = f"{record.levelname.lower()}: {record.message}"
        return super().formatMessage(record)
