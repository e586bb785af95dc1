"""A small prepared dataset with knowledge stores, and configurations that train on it in seconds."""

from pathlib import Path

import duckdb
import numpy as np
import yaml

from llm_knowledge.store.manifest import Cutoff
from llm_knowledge.store.writer import write_store
from tests.helpers.knowledge_data import manifest, random_dataset
from trainer.config.run import RunConfig, load_config

DIM = 8
LEVELS = ("user", "scenario", "item")


def write_stores(data: Path, out: Path, seed: int = 0) -> Path:
    """Random vectors for every user of the profile, every item and every scenario."""
    rng = np.random.default_rng(seed)
    with duckdb.connect() as connection:
        users = connection.execute(
            "SELECT user_id, max(timestamp) FROM read_parquet(?) GROUP BY 1 ORDER BY 1",
            [str(data / "profile/*.parquet")],
        ).fetchall()
        items = connection.execute(
            "SELECT item_id FROM read_parquet(?)", [str(data / "items.parquet")]
        ).fetchall()
    keys = {
        "user": [user for user, _ in users],
        "item": [item for (item,) in items],
        "scenario": ["food", "kitchen"],
    }
    for level, names in keys.items():
        cutoffs = [time for _, time in users] if level == "user" else None
        write_store(
            out / level,
            manifest(
                level=level,
                key_type="string" if isinstance(names[0], str) else "int64",
                cutoff=Cutoff(kind="per_key" if cutoffs else "none"),
            ),
            names,
            rng.normal(size=(len(names), DIM)).astype(np.float32),
            cutoffs=cutoffs,
        )
    return out


def make_inputs(root: Path, users: int = 40, id_type: str = "int64") -> tuple[Path, Path]:
    """Returns (dataset, stores)."""
    (root / "data").mkdir(parents=True)
    data = random_dataset(root / "data", users=users, id_type=id_type)
    return data, write_stores(data, root / "knowledge")


def overrides(data: Path, stores: Path | None, output: Path, **changes: object) -> list[str]:
    """`--set` assignments of a small run; dots in names are written as double underscores."""
    values: dict[str, object] = {
        "name": "tiny",
        "output": output,
        "data.path": data,
        "tables.dim": 4,
        "model.hidden": [8, 4],
        "train.global_batch_size": 64,
        "train.epochs": 2,
        "train.eval_every": 5,
        "train.log_every": 1,
        "train.patience": 100,
        "train.timeout_seconds": 60,
    }
    if stores is not None:
        values |= {f"knowledge.{level}": stores / level for level in LEVELS}
        values |= {"model.meta.enabled": True, "model.meta.item_knowledge": "match"}
    values |= {key.replace("__", "."): value for key, value in changes.items()}
    return [f"{key}={value}" for key, value in values.items()]


def make_config(data: Path, stores: Path | None, output: Path, **changes: object) -> RunConfig:
    """The configuration itself."""
    return load_config(None, overrides(data, stores, output, **changes))


def write_config(config: RunConfig, path: Path) -> Path:
    """Writes a configuration for the command line."""
    path.write_text(yaml.safe_dump(config.model_dump()))
    return path
