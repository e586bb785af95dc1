"""Tiny datasets and run directories for the tests of evaluation, comparison and report."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml

SCENARIOS = ["comedy", "drama"]


def sigmoid(x):
    return 1 / (1 + np.exp(-np.asarray(x)))


def write_rows(path: Path, rows: dict, parts: int = 1) -> None:
    path.mkdir(parents=True, exist_ok=True)
    table = pa.table(rows)
    step = -(-table.num_rows // parts)
    for part in range(parts):
        pq.write_table(table.slice(part * step, step), path / f"part-{part:05d}.parquet")


def _events(
    rng: np.random.Generator, split: str, time: int, users: int, per_user: int, items: int
) -> dict[str, pa.Array]:
    """The columns of a split; who likes what is planted, and the same in every dataset."""
    user = np.repeat(np.arange(users), per_user)
    scenario = rng.integers(0, 2, len(user))
    if split in ("profile", "train"):
        scenario[user % 10 == 1] = 0
        keep = (user % 10 != 0) | (split == "profile")
        user, scenario = user[keep], scenario[keep]
    n = len(user)
    taste = np.random.default_rng(99).normal(size=users)[user]
    label = (rng.random(n) < sigmoid(taste + scenario - 0.5)).astype(np.int8)
    return {
        "user_id": pa.array(user, pa.int64()),
        "item_id": pa.array(rng.integers(0, items, n), pa.int64()),
        "scenario_id": pa.array([SCENARIOS[s] for s in scenario]),
        "timestamp": pa.array(time * 10**6 + np.arange(n), pa.int64()),
        "label": pa.array(label, pa.int8()),
        "history": pa.array([[]] * n, pa.list_(pa.int64())),
    }


def _facts(rows: dict[str, int], users: int, items: int) -> dict:
    """What dataset.json holds."""
    return {
        "format_version": 1,
        "name": "tiny",
        "source": {"kind": "test"},
        "scenarios": [
            {"scenario_id": "comedy", "name": "Comedy nights", "description": "To laugh."},
            {"scenario_id": "drama", "name": "Drama", "description": "To cry."},
        ],
        "user_id_type": "int64",
        "item_id_type": "int64",
        "scenario_id_type": "string",
        "history_length": 20,
        "split": {
            "rule": "per_user_time",
            "fractions": {"profile": 0.4, "train": 0.4, "valid": 0.1, "test": 0.1},
            "boundaries": None,
            "text": "Each user's events in time order: 40/40/10/10 %.",
        },
        "rows": rows,
        "users": users,
        "items": items,
        "negatives": None,
        "positive_name": "liked",
        "negative_name": "disliked",
        "truth": {"bayes_auc": {"overall": 0.8, "comedy": 0.79, "drama": None}},
        "versions": {"python": "3.11"},
    }


def make_dataset(
    root: Path, users: int = 40, per_user: int = 12, seed: int = 0, titles=None
) -> Path:
    """Writes a dataset; users 0, 10, 20 … have no train row, users 1, 11 … none in 'drama'."""
    rng = np.random.default_rng(seed)
    root.mkdir(parents=True, exist_ok=True)
    items = 30
    titles = titles or [f"Film number {i}" for i in range(items)]
    pq.write_table(
        pa.table(
            {
                "item_id": pa.array(range(items), pa.int64()),
                "title": titles,
                "categories": pa.array([["x"]] * items),
            }
        ),
        root / "items.parquet",
    )
    rows = {}
    for time, split in enumerate(("profile", "train", "valid", "test")):
        events = _events(rng, split, time, users, per_user, items)
        write_rows(root / split, events, parts=2)
        rows[split] = len(events["label"])
    (root / "dataset.json").write_text(json.dumps(_facts(rows, users, items)))
    return root


def read_split(dataset: Path, split: str) -> pa.Table:
    return pa.concat_tables(pq.read_table(f) for f in sorted((dataset / split).glob("part-*")))


def make_run(
    path: Path,
    dataset: Path,
    prediction,
    name: str = "star",
    seed: int = 0,
    knowledge=None,
    curves=True,
) -> Path:
    """Writes a run; `prediction` maps the test table to probabilities (float array)."""
    path.mkdir(parents=True, exist_ok=True)
    stores = {"user": None, "scenario": None, "item": None} | (knowledge or {})
    config = {
        "name": name,
        "output": str(path),
        "data": {"path": str(dataset)},
        "knowledge": stores,
        "model": {"backbone": "star", "meta": {"enabled": knowledge is not None}},
        "train": {"seed": seed},
    }
    (path / "config.yaml").write_text(yaml.safe_dump(config))
    (path / "versions.json").write_text(
        json.dumps({"torch": "2.13.0", "hardware": {"cpu": "two cores"}})
    )
    if curves:
        lines = []
        for step in range(0, 200, 10):
            lines.append({"step": step, "epoch": 0, "kind": "train", "loss": 0.7 - step / 1000})
            if step % 50 == 0:
                lines.append(
                    {"step": step, "epoch": 0, "kind": "valid", "valid_auc": 0.6 + step / 2000}
                )
        text = "\n".join(json.dumps(line) for line in lines)
        (path / "metrics.jsonl").write_text(text + '\n{"step": 20')  # a kill mid-line
    for split in ("valid", "test"):
        table = read_split(dataset, split).select(
            ["user_id", "item_id", "scenario_id", "timestamp", "label"]
        )
        values = np.asarray(prediction(table), dtype=np.float32)
        rows = {name: table[name] for name in table.column_names}
        rows["prediction"] = pa.array(values, pa.float32())
        rows["has_knowledge"] = pa.array(np.asarray(table["user_id"]) % 4 != 3)
        order = np.random.default_rng(seed).permutation(len(values))
        shuffled = pa.table(rows).take(pa.array(order))
        write_rows(path / "predictions" / split, {n: shuffled[n] for n in shuffled.column_names}, 2)
    return path


def noisy_truth(dataset: Path, noise: float, seed: int):
    """A predictor that knows the planted taste up to noise of this standard deviation."""

    def predict(table: pa.Table) -> np.ndarray:
        user = np.asarray(table["user_id"])
        taste = np.random.default_rng(99).normal(size=user.max() + 1)[user]
        scenario = np.asarray([s == "drama" for s in table["scenario_id"].to_pylist()])
        rng = np.random.default_rng(seed)
        return sigmoid(taste + scenario - 0.5 + noise * rng.normal(size=len(user)))

    return predict
