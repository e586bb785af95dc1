"""A log whose label depends on columns that are no roles, with the best AUC that there is."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from trainer.data.sources.parquet_log import prepare_parquet

AUTHORS, TAGS, CITIES = 8, 12, 6
SCHEMA = {
    "name": "shop",
    "scenarios": [
        {"scenario_id": 1, "name": "Feed", "description": "What is new."},
        {"scenario_id": 2, "name": "Search", "description": "What was asked for."},
    ],
    "catalogue": {"path": "items.parquet", "item_id": "sku", "title": "title"},
    "features": {
        "age": {"kind": "number"},
        "city": {"kind": "id"},
        "tags": {"kind": "ids", "weights": "tag_scores"},
        "words": {"kind": "ids", "separator": ","},
        "author": {"kind": "id", "from": "catalogue", "column": "written_by"},
        "price": {"kind": "number", "from": "catalogue", "timeless": True},
    },
    "ignore": ["debug_*"],
}
SEQUENCES = {
    "clicks": {"where": "label", "length": 6, "fields": ["item", "author", "gap"]},
    "seen": {"where": "impression", "length": 3, "fields": ["city", "item", "gap"]},
}


def raw_log(rows: int = 2_000, seed: int = 0, items: int = 40) -> tuple[dict, dict]:
    """Columns of a log and of its catalogue; every feature column has nulls."""
    draw = np.random.default_rng(seed)
    lengths = draw.integers(0, 4, rows)
    log = {
        "user_id": draw.integers(0, 30, rows).tolist(),
        "item_id": draw.integers(0, items + 2, rows).tolist(),  # two are in no catalogue
        "scenario_id": draw.integers(1, 3, rows).tolist(),
        "timestamp": np.sort(1_700_000_000 + draw.integers(0, 10**6, rows)).tolist(),
        "label": draw.integers(0, 2, rows).tolist(),
        "age": [None if draw.random() < 0.1 else float(draw.normal(40, 12)) for _ in range(rows)],
        "city": [None if c == 0 else f"city {c}" for c in draw.integers(0, CITIES, rows)],
        "tags": [draw.integers(0, TAGS, n).tolist() or None for n in lengths],
        "tag_scores": [draw.random(n).round(3).tolist() or None for n in lengths],
        "words": [",".join(f"w{w}" for w in draw.integers(0, 9, n)) for n in lengths],
        "debug_x": [0] * rows,
    }
    catalogue = {
        "sku": list(range(items)),
        "title": [f"Thing {i}" for i in range(items)],
        "written_by": [None if i % 9 == 0 else i % AUTHORS for i in range(items)],
        "price": [None if i % 7 == 0 else float(i) for i in range(items)],
    }
    return log, catalogue


def write_raw(
    folder: Path, log: dict, catalogue: dict, schema: dict | None = None
) -> tuple[Path, Path]:
    """Returns (log, schema)."""
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(log), folder / "log.parquet")
    pq.write_table(pa.table(catalogue), folder / "items.parquet")
    (folder / "schema.yaml").write_text(yaml.safe_dump(schema or SCHEMA, sort_keys=False))
    return folder / "log.parquet", folder / "schema.yaml"


def prepare_features(root: Path, rows: int = 2_000, seed: int = 0) -> Path:
    """A prepared dataset with one feature of every kind, and two sequences."""
    raw, schema = write_raw(
        root / "raw", *raw_log(rows, seed), schema=SCHEMA | {"sequences": SEQUENCES}
    )
    prepare_parquet(raw, root / "data", schema)
    return root / "data"
