"""Random logs, catalogues and schemas that are valid, and the many ways in which they may be written."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from tests.fuzz.oracle import SPLITS, Row, Rule

ROLES = ("user_id", "item_id", "scenario_id", "timestamp", "label")
NAMES = (
    "user", "uid", "Item", "ITEM_ID", "szene", "время", "ts", "is click", "a.b", 'quo"te', "it's",
    "select", "from", "filename ", "file", "row", "é", "日本", "x" * 70, "1", "%s", "{0}", "a,b", "a;b",
    "block", "place", "history", "split", "event", "count(*)", "--", "label_", "\\n",
)  # fmt: skip
WORDS = ("a", "B", "é", "日本", "0", "00", "007", "-1", "1e3", "nan", "NULL", "null", "true", " ", "'", '"',
         "x y", "user%d", "\t", "ß", "🙂", "a" * 300, "{x}", "..", "\\")  # fmt: skip
UNITS = {"seconds": 1_000_000, "milliseconds": 1_000, "microseconds": 1}


@dataclass
class Log:
    """A log as it is meant, before it is written.

    Attributes:
        rows: Its events.
        rule: How they are split.
        columns: Role to the name of its column.
        labels: Further labels: name to column.
        kinds: "int64" or "string" of user, item and scenario.
        schema: What the schema file says.
        catalogue: Its entries, or None.
        unit: Of integer times; None: they are of a timestamp type.
    """

    rows: list[Row]
    rule: Rule
    columns: dict[str, str]
    labels: dict[str, str]
    kinds: dict[str, str]
    schema: dict[str, Any]
    catalogue: list[Row] | None = None
    unit: str | None = "seconds"
    extra: dict[str, list[Any]] = field(default_factory=dict)


def random_log(draw: Random) -> Log:
    """A log of one to some hundred rows."""
    kinds = {role: draw.choice(["int64", "string"]) for role in ROLES[:3]}
    count = draw.choice([1, 30, 60, 100, 100, 200, 200, 300])
    users = _ids(draw, kinds["user_id"], draw.choice([1, 2, 5, 20]))
    items = _ids(draw, kinds["item_id"], draw.choice([1, 3, 10, 40]))
    scenarios = _ids(draw, kinds["scenario_id"], draw.choice([1, 2, 4]), small=True)
    names = draw.sample(NAMES, len(ROLES) + 2) if draw.random() < 0.5 else [*ROLES, "buy", "share"]
    columns = dict(zip(ROLES, names, strict=False))
    labels = {
        name: column
        for name, column in zip(["buy", "share"], names[5:], strict=True)
        if draw.random() < 0.2
    }
    unit = draw.choice([*UNITS, None])
    start = draw.choice([1_700_000_000, 1_600_000_000, 1_234_567_890, 1_500_000_000])
    spread = draw.choice([1, 20, 1_000, 100_000, 10_000_000])
    base = [start + draw.randrange(spread) for _ in range(draw.choice([4, 100, 400, 400]))]
    finest = {"seconds": 1_000_000, "milliseconds": 1_000}.get(unit or "", 1)
    within = draw.random() < 0.4  # the second, which orders a user's events
    rows = []
    for _ in range(count):
        row: Row = {
            "user_id": draw.choice(users),
            "item_id": draw.choice(items),
            "scenario_id": draw.choice(scenarios),
            "microseconds": draw.choice(base) * 1_000_000
            + within * draw.randrange(1_000_000) // finest * finest,
            "label": draw.randrange(2),
        }
        rows.append(row | {f"label_{name}": draw.randrange(2) for name in labels})
    rule = _rule(draw, rows)
    log = Log(rows, rule, columns, labels, kinds, {}, None, unit)
    log.schema = _schema(draw, log, scenarios)
    if draw.random() < 0.3:
        log.catalogue = _catalogue(draw, kinds["item_id"], items)
        log.schema["catalogue"] = {"path": "items.parquet", "categories": "categories"}
    return log


def _ids(draw: Random, kind: str, count: int, small: bool = False) -> list[Any]:
    if kind == "int64":
        choices: list[Callable[[], int]] = [lambda: draw.randrange(-5, 50)]
        if not small:
            choices += [
                lambda: draw.randrange(10**6),
                lambda: draw.choice([2**31, 2**63 - 1, -(2**63), 0, -1]),
            ]
        return [draw.choice(choices)() for _ in range(count)]
    return [
        draw.choice(WORDS) + draw.choice(["", draw.choice(WORDS), str(draw.randrange(30))])
        for _ in range(count)
    ]


def _rule(draw: Random, rows: list[Row]) -> Rule:
    fractions = dict(
        zip(
            SPLITS,
            draw.choice([(0.4, 0.4, 0.1, 0.1), (0.25, 0.25, 0.25, 0.25), (0.1, 0.7, 0.1, 0.1)]),
            strict=True,
        )
    )
    if draw.random() < 0.5:
        held_out, valid = (draw.choice([0.0, 0.0, 0.0, 0.3, 0.45]) for _ in range(2))
        return Rule("per_user_time", fractions, None, held_out, valid)
    bounds = None
    if draw.random() < 0.4:
        times = sorted({row["microseconds"] // 1_000_000 for row in rows})
        inside = range(times[0] + 1, max(times[-1], times[0] + 4) + 1)
        bounds = sorted(draw.sample(inside, 3))
    return Rule("global_time", fractions, bounds)


def _schema(draw: Random, log: Log, scenarios: list[Any]) -> dict[str, Any]:
    rule = log.rule
    split: dict[str, Any] = {"rule": rule.name}
    if rule.boundaries is not None:
        split["boundaries"] = rule.boundaries
    else:
        split["fractions"] = rule.fractions
    for name in ("held_out_users", "held_out_valid_users"):
        if getattr(rule, name):
            split[name] = getattr(rule, name)
    listed = list(
        dict.fromkeys([*scenarios, "never seen" if isinstance(scenarios[0], str) else 999])
    )
    schema: dict[str, Any] = {
        "name": "fuzz",
        "columns": log.columns,
        "scenarios": [
            {
                "scenario_id": s,
                "name": f"Name {n}",
                "description": draw.choice(["Words.", "é", "x"]),
            }
            for n, s in enumerate(listed)
        ],
        "split": split,
        "positive_name": "liked",
        "negative_name": "not liked",
    }
    if log.labels:
        schema["labels"] = log.labels
    if log.unit is not None:
        schema["timestamp_unit"] = log.unit
    return schema


def _catalogue(draw: Random, kind: str, items: list[Any]) -> list[Row]:
    ids = {item for item in items if draw.random() < 0.8} | set(_ids(draw, kind, 3))
    return [
        {
            "item_id": item,
            "title": draw.choice(["A title", "é", None, "", "x" * 500]),
            "categories": draw.choice([None, [], ["a"], ["a", "b"], ["a", "", "b"]]),
        }
        for item in sorted(ids, key=str)
    ]


# ---------------------------------------------------------------- how it is written


def write_log(draw: Random, log: Log, folder: Path) -> dict[str, Path]:
    """Writes log, schema and catalogue in one of many ways that mean the same.

    Returns:
        The paths of "raw" and "schema".
    """
    folder.mkdir()
    table = log_table(draw, log)
    raw = folder / "raw"
    if draw.random() < 0.4:
        raw = folder / draw.choice(["log.parquet", "a log.parquet", "é.parquet", "[1].parquet"])
        write_table(draw, table, raw)
    else:
        bounds = sorted(draw.choices(range(len(log.rows) + 1), k=draw.choice([0, 1, 4])))
        for number, (start, stop) in enumerate(
            zip([0, *bounds], [*bounds, len(log.rows)], strict=True)
        ):
            suffix = draw.choice([".parquet", ".parquet", ".pq", ".PARQUET"])
            file = raw / draw.choice(["", "", "day=1", "a/b"]) / f"part-{number}{suffix}"
            file.parent.mkdir(parents=True, exist_ok=True)
            write_table(draw, table.slice(start, stop - start), file)
        if draw.random() < 0.3:  # what Spark, Jupyter and kills leave behind is no part of a log
            left = raw / draw.choice(
                [
                    ".ipynb_checkpoints/part-0.parquet",
                    "_SUCCESS",
                    ".part-0.parquet.crc",
                    "_temporary/0/part-9.parquet",
                    ".x.parquet",
                ]
            )
            left.parent.mkdir(exist_ok=True, parents=True)
            write_table(draw, table, left)
    schema = folder / "schema.yaml"
    schema.write_text(dump(log.schema), encoding="utf-8")
    if log.catalogue is not None:
        write_catalogue(draw, log, folder / "items.parquet")
    return {"raw": raw, "schema": schema}


class _Quoted(yaml.SafeDumper):
    """Writes every string in quotes: what is a number without them depends on who reads it."""


_Quoted.add_representer(
    str, lambda dumper, text: dumper.represent_scalar("tag:yaml.org,2002:str", text, style='"')
)


def dump(content: Any) -> str:
    return yaml.dump(content, Dumper=_Quoted)


def log_table(draw: Random, log: Log) -> pa.Table:
    """The log as an Arrow table, its columns shuffled, of any types that mean the same."""
    arrays = {
        log.columns[role]: id_array(draw, log.kinds[role], [row[role] for row in log.rows])
        for role in ROLES[:3]
    }
    arrays[log.columns["timestamp"]] = time_array(draw, log)
    arrays[log.columns["label"]] = _label_array(draw, [row["label"] for row in log.rows])
    for name, column in log.labels.items():
        arrays[column] = _label_array(draw, [row[f"label_{name}"] for row in log.rows])
    if draw.random() < 0.3:
        arrays["something else"] = pa.array([None] * len(log.rows), pa.string())
    if (
        draw.random() < 0.2
    ):  # a name that differs from the label's by case alone, and says the opposite
        other = log.columns["label"].swapcase()
        if other.casefold() == log.columns["label"].casefold() and other not in arrays:
            arrays[other] = pa.array([1 - row["label"] for row in log.rows], pa.int8())
    names = list(arrays)
    draw.shuffle(names)
    return pa.table({name: arrays[name] for name in names})


def id_array(draw: Random, kind: str, values: list[Any]) -> pa.Array:
    if kind == "string":
        array = pa.array(values, draw.choice([pa.string(), pa.string(), pa.large_string()]))
        return array.dictionary_encode() if draw.random() < 0.2 else array
    low, high = min(values, default=0), max(values, default=0)
    types = [pa.int64(), pa.int64()]
    types += [pa.int32()] if low >= -(2**31) and high < 2**31 else []
    types += [pa.uint32()] if low >= 0 and high < 2**32 else []
    types += [pa.int8()] if low >= -128 and high < 128 else []
    return pa.array(values, draw.choice(types))


def time_array(draw: Random, log: Log) -> pa.Array:
    times = [row["microseconds"] for row in log.rows]
    if log.unit is not None:
        return pa.array([time // UNITS[log.unit] for time in times], pa.int64())
    zone = draw.choice([None, "UTC"])
    factors = {"s": 1_000_000, "ms": 1_000, "us": 1, "ns": 1}
    unit = draw.choice([u for u, f in factors.items() if not any(time % f for time in times)])
    factor = factors[unit]
    values = [time // factor * (1_000 if unit == "ns" else 1) for time in times]
    return pa.array(values, pa.int64()).cast(pa.timestamp(unit, tz=zone))


def _label_array(draw: Random, values: list[int]) -> pa.Array:
    kind = draw.choice([pa.int8(), pa.int64(), pa.float32(), pa.float64(), pa.bool_()])
    return pa.array(values, pa.int64()).cast(kind)


def write_table(draw: Random, table: pa.Table, file: Path) -> None:
    pq.write_table(
        table,
        file,
        row_group_size=draw.choice([None, None, 1, 7]),
        compression=draw.choice(["snappy", "none", "zstd", "gzip"]),
        use_dictionary=draw.random() < 0.5,
        write_statistics=draw.random() < 0.7,
        data_page_version=draw.choice(["1.0", "2.0"]),
    )


def write_catalogue(draw: Random, log: Log, file: Path) -> None:
    assert log.catalogue is not None
    entries = log.catalogue
    categories: pa.Array = pa.array([e["categories"] for e in entries], pa.list_(pa.string()))
    if draw.random() < 0.5:
        joined = ["|".join(e["categories"]) if e["categories"] else None for e in entries]
        categories = pa.array(joined, pa.string())
    table = {
        "item_id": id_array(draw, log.kinds["item_id"], [e["item_id"] for e in entries]),
        "title": pa.array([e["title"] for e in entries], pa.string()),
        "categories": categories,
    }
    write_table(draw, pa.table(table), file)
