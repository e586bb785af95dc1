"""Planted effects: a label that one feature decides, of every kind, learnt with it and chance without.

    python -m benchmarks.planted --work planted --rows 40000 --out benchmarks/results/planted.json

A log is prepared, so that counters, sequences and tables as of a date are there. Then every row's label is
drawn anew, with a chance that its own features give, and the log is prepared again: the best AUC is that of
the chance itself. Users and items say nothing of the label, so a model without the feature has chance.
"""

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from trainer.config.run import load_config
from trainer.data.dataset import SPLITS, split_files
from trainer.data.sources.column_profile import auc
from trainer.data.sources.parquet_log import prepare_parquet
from trainer.training.loop import train

USERS, ITEMS, CITIES, TAGS, AUTHORS, SHELVES, LEVELS = 300, 200, 20, 12, 10, 40, 6
START, DAY, DAYS = 1_700_000_000, 86_400, 20


@dataclass(frozen=True)
class Effect:
    """One planted effect.

    Attributes:
        use: The run's options of the features that it needs, by name.
        logit: Columns of the prepared rows to the logit of each, before it is scaled.
    """

    use: dict[str, dict[str, Any]]
    logit: Callable[[dict[str, list]], np.ndarray]


def _effects_of(count: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=count)


def _id(rows: dict[str, list]) -> np.ndarray:
    return _effects_of(CITIES, 1)[rows["feature_city"]]


def _ids(rows: dict[str, list]) -> np.ndarray:
    effects = _effects_of(TAGS, 2)
    return np.array([effects[tags].sum() for tags in rows["feature_tags"]])


def _weights(rows: dict[str, list]) -> np.ndarray:
    effects = _effects_of(TAGS, 3)
    pairs = zip(rows["feature_scored"], rows["weights_scored"], strict=True)
    return np.array([effects[tags] @ np.array(weights) if tags else 0.0 for tags, weights in pairs])


def _log(rows: dict[str, list]) -> np.ndarray:
    return np.log1p(rows["feature_price"])


def _buckets(rows: dict[str, list]) -> np.ndarray:
    return np.where(np.abs(np.array(rows["feature_angle"]) - 0.5) < 0.25, 1.0, -1.0)


def _cross(rows: dict[str, list]) -> np.ndarray:
    signs = np.sign(_effects_of(CITIES * LEVELS, 4)).reshape(CITIES, LEVELS)
    return signs[rows["feature_city"], rows["feature_device"]]


def _counter(rows: dict[str, list]) -> np.ndarray:
    rates = np.array(rows["feature_shelf_rate"], dtype=float)
    return np.where(np.isnan(rates), np.nanmean(rates), rates)


def _sequence(rows: dict[str, list]) -> np.ndarray:
    pairs = zip(rows["sequence_buys_author"], rows["feature_author"], strict=True)
    return np.array([float(steps.count(author)) for steps, author in pairs])


def _table(rows: dict[str, list]) -> np.ndarray:
    levels = np.array([LEVELS if one is None else one for one in rows["feature_tier"]])
    return np.append(_effects_of(LEVELS, 5), 0.0)[levels]


EFFECTS = {
    "id": Effect({"city": {}}, _id),
    "ids": Effect({"tags": {"pooling": "sum"}}, _ids),
    "weights": Effect({"scored": {"pooling": "sum"}}, _weights),
    "number by log": Effect({"price": {"transform": "log", "scale": "standard"}}, _log),
    "number by buckets": Effect({"angle": {"buckets": 16}}, _buckets),
    "cross": Effect({"place": {"cross": ["city", "device"]}}, _cross),
    "counter": Effect({"shelf_rate": {"scale": "standard"}}, _counter),
    "sequence by attention": Effect(
        {"author": {}, "buys": {"pooling": "attention", "fields": ["author"]}}, _sequence
    ),
    "table as of a date": Effect({"tier": {}}, _table),
}

SCHEMA: dict[str, Any] = {
    "name": "planted",
    "scenarios": [{"scenario_id": 0, "name": "All", "description": "All."}],
    "labels": {"buy": "bought"},
    "users": {"path": "users.parquet", "user_id": "user_id", "since": "since"},
    "features": {
        "row": {"kind": "id"},
        "city": {"kind": "id"},
        "device": {"kind": "id"},
        "tags": {"kind": "ids"},
        "scored": {"kind": "ids", "weights": "scores"},
        "price": {"kind": "number"},
        "angle": {"kind": "number"},
        "author": {"kind": "id"},
        "shelf": {"kind": "id"},
        "tier": {"kind": "id", "from": "users"},
    },
    "counters": {"shelf_rate": {"of": "buy", "by": ["shelf"], "window_days": 1, "smoothing": 5}},
    "sequences": {"buys": {"where": "buy", "length": 10, "fields": ["author"]}},
    "split": {"fractions": {"profile": 0.1, "train": 0.7, "valid": 0.05, "test": 0.15}},
}


def raw_columns(rows: int, seed: int) -> dict[str, Any]:
    """A log whose label says nothing yet; shelves sell at another rate every day."""
    draw = np.random.default_rng(seed)
    times = np.sort(draw.integers(0, DAYS * DAY, rows))
    shelf = draw.integers(0, SHELVES, rows)
    rates = draw.beta(0.7, 0.7, (DAYS, SHELVES))[times // DAY, shelf]
    lengths = draw.integers(0, 5, rows)
    return {
        "row": np.arange(rows),
        "user_id": draw.integers(0, USERS, rows),
        "item_id": draw.integers(0, ITEMS, rows),
        "scenario_id": np.zeros(rows, dtype=int),
        "timestamp": START + times,
        "label": draw.integers(0, 2, rows),
        "bought": (draw.random(rows) < rates).astype(int),
        "city": draw.integers(0, CITIES, rows),
        "device": draw.integers(0, LEVELS, rows),
        "tags": [draw.integers(0, TAGS, n).tolist() for n in lengths],
        "scored": [draw.integers(0, TAGS, n).tolist() for n in lengths],
        "scores": [draw.normal(size=n).round(3).tolist() for n in lengths],
        "price": draw.lognormal(3, 2, rows),
        "angle": draw.random(rows),
        "author": draw.integers(0, AUTHORS, rows),
        "shelf": shelf,
    }


def user_columns(seed: int) -> dict[str, Any]:
    """Users whose tier changes every second day; nothing of it holds before the third."""
    draw = np.random.default_rng(seed)
    days = np.arange(2, DAYS, 2)
    return {
        "user_id": np.repeat(np.arange(USERS), len(days)),
        "since": START + np.tile(days, USERS) * DAY,
        "tier": draw.integers(0, LEVELS, USERS * len(days)),
    }


def prepared(folder: Path, log: dict[str, Any], seed: int) -> Path:
    """Writes the log and its schema, and prepares them."""
    folder.mkdir(parents=True)
    pq.write_table(pa.table(log), folder / "log.parquet")
    pq.write_table(pa.table(user_columns(seed)), folder / "users.parquet")
    (folder / "schema.yaml").write_text(yaml.safe_dump(SCHEMA))
    prepare_parquet(folder / "log.parquet", folder / "data", folder / "schema.yaml")
    return folder / "data"


def columns_of(data: Path, *splits: str) -> dict[str, list]:
    """Columns of some splits, in the order of the files."""
    files = [file for split in splits for file in split_files(data, split)]
    return pa.concat_tables([pq.read_table(file) for file in files]).to_pydict()


def plant(work: Path, name: str, base: Path, log: dict[str, Any], seed: int) -> tuple[Path, float]:
    """Draws the labels of one effect and prepares the log; its best test AUC."""
    rows = columns_of(base, *SPLITS)
    logit = EFFECTS[name].logit(rows)
    logit = 2 * (logit - logit.mean()) / logit.std()
    draw = np.random.default_rng([seed, list(EFFECTS).index(name)])
    chance = np.empty(len(logit))
    chance[rows["feature_row"]] = 1 / (1 + np.exp(-logit))
    labels = draw.random(len(chance)) < chance
    data = prepared(work / name.replace(" ", "-"), log | {"label": labels.astype(int)}, seed)
    test = columns_of(data, "test")["feature_row"]
    return data, auc(labels[test], chance[test])


def trained_auc(data: Path, run: Path, use: dict[str, Any], seed: int, epochs: int) -> float:
    """Trains a plain backbone and scores test."""
    train(
        load_config(
            None,
            {
                "data": {"path": str(data), "train_splits": ["profile", "train"]},
                "model": {"backbone": "dnn", "hidden": [32, 16], "dropout": 0.0,
                          "meta": {"enabled": False}},
                "tables": {"dim": 8, "learning_rate": 0.05, "init_std": 0.3},
                "features": {"width": 16, "history": False, "use": use},
                "name": "planted",
                "output": str(run),
                "train": {"epochs": epochs, "global_batch_size": 256,
                          "learning_rate": 0.005, "seed": seed},
            },
        )
    )  # fmt: skip
    files = sorted((run / "predictions" / "test").glob("*.parquet"))
    rows = pa.concat_tables([pq.read_table(file) for file in files])
    return auc(rows["label"].to_numpy() > 0, rows["prediction"].to_numpy())


def main() -> None:
    """Plants every effect, trains with and without the feature, prints and writes what came out."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--work", type=Path, required=True, help="folder to create")
    parser.add_argument("--rows", type=int, default=40_000)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--effects", nargs="+", choices=list(EFFECTS), default=list(EFFECTS))
    parser.add_argument("--out", type=Path, help="JSON file to write")
    options = parser.parse_args()
    log = raw_columns(options.rows, options.seed)
    base = prepared(options.work / "base", log, options.seed)
    results = {}
    for name in options.effects:
        began = time.perf_counter()
        data, best = plant(options.work, name, base, log, options.seed)
        arms = {"with": EFFECTS[name].use, "without": {}}
        scores = {
            arm: trained_auc(data, data.parent / arm, use, options.seed, options.epochs)
            for arm, use in arms.items()
        }
        results[name] = {"best": best, **scores, "seconds": time.perf_counter() - began}
        line = ", ".join(f"{key} {value:.4f}" for key, value in results[name].items())
        print(f"{name}: {line}", flush=True)
    if options.out is not None:
        settings = {"rows": options.rows, "epochs": options.epochs, "seed": options.seed}
        options.out.write_text(
            json.dumps({"settings": settings, "effects": results}, indent=2) + "\n"
        )


if __name__ == "__main__":
    main()
