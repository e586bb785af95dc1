"""Small logs for the tests of data preparation."""

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from trainer.data.dataset import SPLITS, split_files
from trainer.data.sources.parquet_log import prepare_parquet


def read_rows(path: Path, split: str) -> list[dict]:
    return [row for file in split_files(path, split) for row in pq.read_table(file).to_pylist()]


def all_rows(path: Path) -> list[dict]:
    return [row | {"split": split} for split in SPLITS for row in read_rows(path, split)]


def random_log(rows: int = 1_500, users: int = 25, strings: bool = False, seed: int = 1) -> dict:
    """A log with many simultaneous events; one user has a third of it."""
    draw = np.random.default_rng(seed)
    user = np.where(draw.random(rows) < 0.3, 0, draw.integers(0, users, rows))
    log = {
        "user_id": user,
        "item_id": draw.integers(0, 60, rows),
        "scenario_id": draw.integers(1, 3, rows),
        "timestamp": 1_700_000_000 + draw.integers(0, 150, rows),
        "label": draw.integers(0, 2, rows),
    }
    if strings:
        for name in ("user_id", "item_id"):
            log[name] = [f"é{value:03d}" for value in log[name]]
    return {name: list(column) for name, column in log.items()}


SCHEMA = {
    "name": "shop",
    "scenarios": [
        {"scenario_id": 1, "name": "Feed", "description": "What is new."},
        {"scenario_id": 2, "name": "Search", "description": "What was asked for."},
    ],
    "split": {"rule": "per_user_time"},
}


def write_log(
    folder: Path, log: dict, schema: dict = SCHEMA, name: str = "log.parquet"
) -> tuple[Path, Path]:
    folder.mkdir(exist_ok=True)
    pq.write_table(pa.table(log), folder / name)
    (folder / "schema.yaml").write_text(yaml.safe_dump(schema))
    return folder / name, folder / "schema.yaml"


def prepare(tmp_path: Path, log: dict, schema: dict = SCHEMA) -> Path:
    raw, rules = write_log(tmp_path / "raw", log, schema)
    prepare_parquet(raw, tmp_path / "out", rules)
    return tmp_path / "out"


@contextlib.contextmanager
def logged(package: str = "trainer") -> Iterator[list[str]]:
    """Collects what a package logs, from information on."""
    messages: list[str] = []
    logger, handler = logging.getLogger(package), logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    level = logger.level
    logger.setLevel(logging.INFO)
    logger.addHandler(handler)
    try:
        yield messages
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
