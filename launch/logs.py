"""Logging of a command: standard loggers, one line per event on stderr, ranks told apart."""

import logging
import os
import sys
from typing import TextIO

LEVELS = ("debug", "info", "warning", "error")
PACKAGES = ("launch", "trainer", "embeddings", "llm_knowledge")


def set_up_logging(level: str = "info") -> None:
    """Shows what our packages log from `level` on; loggers of other libraries are left as they are.

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
