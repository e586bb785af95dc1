"""Zero-collision ids against plain hashing at the same number of rows: quality and lookups per second.

    OMP_NUM_THREADS=1 python -m benchmarks.large_ids --data FOLDER --out benchmarks/results/large_ids.json

FOLDER holds `sequences.parquet` of kuairand1k-seq: sequences of 800 item ids with a tab each, -1 where
they are shorter. There are no labels and no clock times, so this is made of them:

- time: the place of an event in its user's order, a second each; splits are cut by it, so a model is
  tested on what comes after its training, and 10 % of the time is between validation and the past;
- items: a share of all items by a hash of their ids, so that frequencies stay as they are;
- label 1: the events. Label 0: for each, an item drawn evenly from the distinct items of the same
  65,536 consecutive events. An item that is frequent at the time is likelier to be a positive.

Every arm sees each row once, in the same order. Arms are trained in turn, seed by seed.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from embeddings.ids import HashedIds, HashedKeys
from embeddings.profiling.measure import machine, summary
from embeddings.versions import versions
from embeddings.zero_collision.key_index import distinct
from embeddings.zero_collision.policy import RowOwners, ZeroCollision
from trainer.config.run import load_config
from trainer.data.sources.parquet_log import prepare_parquet
from trainer.evaluation.metrics import write_evaluation
from trainer.training.loop import train

WINDOW = 65_536
TABS = 15  # codes are smaller than this


def write_log(source: Path, out: Path, share: float, seed: int) -> None:
    """Writes the log and its schema, see above."""
    table = pq.read_table(source)
    names = [name.split("#") for name in table["seq_id"].to_pylist()]
    lengths = table["item_ids"].combine_chunks().value_lengths().to_numpy()
    users = np.array([int(name.rsplit("_", 1)[1]) for name, _ in names]).repeat(lengths)
    chunks = np.array([int(chunk) for _, chunk in names]).repeat(lengths)
    place = np.concatenate([np.arange(length) for length in lengths])
    items = table["item_ids"].combine_chunks().flatten().to_numpy()
    tabs = table["tab"].combine_chunks().flatten().to_numpy()
    mixed = HashedKeys(2, salt=99).lookup(pa.array(items)).view(np.uint64)
    kept = (items >= 0) & (mixed < np.uint64(int(share * 2**64)))
    times = 1_600_000_000 + chunks * 800 + place
    order = np.flatnonzero(kept)[np.lexsort((users[kept], times[kept]))]
    users, items, tabs, times = users[order], items[order], tabs[order], times[order]
    rng = np.random.default_rng(seed)
    drawn = np.concatenate(
        [
            rng.choice(np.unique(items[at : at + WINDOW]), len(items[at : at + WINDOW]))
            for at in range(0, len(items), WINDOW)
        ]
    )
    label = np.repeat(np.array([1, 0], dtype=np.int8), len(items))
    columns = {"user_id": users, "scenario_id": tabs, "timestamp": times}
    columns = {name: np.tile(values, 2) for name, values in columns.items()}
    pq.write_table(
        pa.table(columns | {"item_id": np.concatenate([items, drawn]), "label": label}),
        out / "log.parquet",
    )
    schema = {
        "name": "kuairand1k-seq",
        "scenarios": [
            {"scenario_id": tab, "name": f"tab {tab}", "description": f"The tab of code {tab}."}
            for tab in range(TABS)
        ],
        "split": {"rule": "global_time"},
    }
    (out / "schema.yaml").write_text(yaml.safe_dump(schema))


def arms(rows: int) -> dict[str, list[str]]:
    """Settings of the arms at a number of rows per table."""

    def zero_collision(options: str) -> list[str]:
        return [
            "tables.ids=zero_collision",
            f"tables.zero_collision={{user_rows: {rows}, item_rows: {rows}, {options}}}",
        ]

    return {
        "hash": ["tables.ids=hash", f"tables.hash_rows={rows}"],
        "lru": zero_collision("eviction: lru, eviction_interval: 1"),
        "lfu": zero_collision("eviction: lfu, eviction_interval: 1"),
        "lfu, admission 2": zero_collision("eviction: lfu, admission: 2, eviction_interval: 1"),
        "distance_lfu, admission 2": zero_collision(
            "eviction: distance_lfu, admission: 2, eviction_interval: 1"
        ),
    }


def train_arm(data: Path, folder: Path, settings: list[str], seed: int) -> dict[str, float]:
    """Trains one epoch and measures the test split."""
    common = {
        "name": "arm",
        "output": folder,
        "data.path": data,
        "train.epochs": 1,
        "train.global_batch_size": 1024,
        "train.eval_every": 1_000_000,
        "train.checkpoint_every": 1_000_000,
        "train.log_every": 10,
        "train.seed": seed,
        "model.backbone": "shared_bottom",
    }
    config = load_config(None, [f"{key}={value}" for key, value in common.items()] + settings)
    run = train(config)
    overall = write_evaluation(run)["overall"]
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    speeds = [line["samples_per_second"] for line in lines if line["kind"] == "train"]
    positives = overall["positives"] / overall["rows"]
    entropy = -(positives * np.log(positives) + (1 - positives) * np.log(1 - positives))
    ids = json.loads((run / "summary.json").read_text())["ids"]
    return {
        "auc": overall["auc"],
        "ne": overall["logloss"] / entropy,
        "samples_per_second": statistics.median(speeds[1:]),
        **{name: value for name, value in ids.items() if name.startswith("item_")},
    }


def lookups(data: Path, rows: int, rounds: int) -> dict[str, Any]:
    """Ids per second from the log's column to rows, the arms in turn on the same batches, one thread.

    A batch is 4,096 rows' items and histories. torchrec's module gets the same well-mixed keys, without
    their sign and the last two bits, and may evict as often.
    """
    import torch
    from torchrec.modules.mc_modules import LRU_EvictionPolicy, MCHManagedCollisionModule
    from torchrec.sparse.jagged_tensor import JaggedTensor

    torch.set_num_threads(1)
    table = pa.concat_tables(
        [pq.read_table(file) for file in sorted((data / "profile").glob("*.parquet"))]
    )
    hashed, keyed = HashedIds(rows), HashedKeys(rows)
    options = {
        "lru": ZeroCollision(rows, 8, "lru", interval=10),
        "lfu, admission 2": ZeroCollision(rows, 8, "lfu", admission=2, interval=10),
    }
    owners = {name: RowOwners(chosen) for name, chosen in options.items()}
    theirs = MCHManagedCollisionModule(
        zch_size=rows,
        device=torch.device("cpu"),
        eviction_policy=LRU_EvictionPolicy(),
        eviction_interval=10,
        input_hash_size=2**62,
    )
    names = ["hash", *owners, "torchrec MCH, lru"]
    speeds: dict[str, list[float]] = {name: [] for name in names}
    for step in range(rounds):
        piece = table.slice(step * 4096 % (len(table) - 4096), 4096)
        history = piece["history"].combine_chunks().flatten()
        ids = pa.chunked_array([*piece["item_id"].chunks, history]).combine_chunks()
        for name in names[step % len(names) :] + names[: step % len(names)]:
            began = time.perf_counter()
            if name == "hash":
                hashed.lookup(ids)
            elif name in owners:
                keys = keyed.lookup(ids).view(np.uint64)
                asked, inverse, counts = distinct(keys)
                owners[name].assign(asked, counts, step)[0][inverse]
            else:
                mixed = torch.from_numpy((keyed.lookup(ids).view(np.uint64) >> 2).view(np.int64))
                features = {"item": JaggedTensor(mixed, lengths=torch.tensor([len(mixed)]))}
                theirs.evict()
                theirs(theirs.preprocess(features))
            if step >= rounds // 4:  # the first quarter warms up and fills the table
                speeds[name].append(len(ids) / (time.perf_counter() - began))
    ratios = {
        name: summary([a / b for a, b in zip(speeds[name], speeds["hash"], strict=True)])
        for name in names[1:]
    }
    return {
        "ids_per_second": {name: summary(values) for name, values in speeds.items()},
        "ratio_to_hash": ratios,
        "timed_batches": len(speeds["hash"]),
    }


def compare(runs: list[dict[str, Any]], rows: int) -> dict[str, Any]:
    """Means over seeds, and the differences to hashing of the same seed."""
    found = {}
    of_size = [run for run in runs if run["rows"] == rows]
    base = {run["seed"]: run for run in of_size if run["arm"] == "hash"}
    for arm in arms(rows):
        own = [run for run in of_size if run["arm"] == arm]
        found[arm] = {
            key: statistics.fmean(run[key] for run in own)
            for key in own[0]
            if key not in ("arm", "seed", "rows")
        }
        for key in ("auc", "ne"):
            found[arm][f"{key}_differences"] = [run[key] - base[run["seed"]][key] for run in own]
        found[arm]["speed_ratios"] = [
            run["samples_per_second"] / base[run["seed"]]["samples_per_second"] for run in own
        ]
    return found


def main() -> None:
    """Runs everything and writes one JSON file."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with sequences.parquet")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--share", type=float, default=0.03, help="share of the items that is kept")
    parser.add_argument("--rows", type=int, nargs="+", default=[2048, 8192], help="of each table")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=40, help="batches of the lookup timing")
    options = parser.parse_args()
    runs: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        write_log(options.data / "sequences.parquet", root, options.share, seed=0)
        data = root / "data"
        info = prepare_parquet(root / "log.parquet", data, root / "schema.yaml")
        speed = {rows: lookups(data, rows, options.rounds) for rows in options.rows}
        for rows in options.rows:
            for seed in range(options.seeds):
                for arm, settings in arms(rows).items():
                    folder = root / f"{rows}-{seed}-{len(runs)}"
                    found = train_arm(data, folder, settings, seed)
                    runs.append({"rows": rows, "seed": seed, "arm": arm, **found})
                    print(json.dumps(runs[-1]), flush=True)
    report = {
        "machine": machine(),
        "versions": versions(),
        "command": vars(options) | {"data": "FOLDER", "out": options.out.name},
        "events": info.rows,
        "items": info.items,
        "users": info.users,
        "lookups": speed,
        "quality": {rows: compare(runs, rows) for rows in options.rows},
        "runs": runs,
    }
    options.out.write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
