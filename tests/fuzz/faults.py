"""What may be wrong with a log, its schema or its catalogue: each fault must be refused with one message."""

from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from tests.fuzz.logs import ROLES, Log, dump

# Faults of what the log means, put in before it is written.


def add_scenario_twice(draw: Random, log: Log) -> None:
    log.schema["scenarios"].append(dict(draw.choice(log.schema["scenarios"])))


def scenario_of_the_other_kind(draw: Random, log: Log) -> None:
    entry = draw.choice(log.schema["scenarios"])
    entry["scenario_id"] = 3 if log.kinds["scenario_id"] == "string" else "three"


def no_scenarios(draw: Random, log: Log) -> None:
    log.schema["scenarios"] = draw.choice([[], None, {}, "all"])


def unknown_field(draw: Random, log: Log) -> None:
    where = draw.choice([log.schema, log.schema["split"], log.schema["columns"]])
    where[draw.choice(["colour", "rulez", "Timestamp_unit", 7, None, True])] = draw.choice(
        [1, "x", None]
    )


def wrong_fractions(draw: Random, log: Log) -> None:
    log.schema["split"] = {
        "rule": log.rule.name,
        "fractions": draw.choice([
            {"profile": 1.0}, {"profile": 0.5, "train": 0.5, "valid": 0.1, "test": 0.1}, [0.4, 0.4, 0.1, 0.1],
            {"profile": -0.2, "train": 1.0, "valid": 0.1, "test": 0.1}, "half", None, {},
            {"profile": float("nan"), "train": 0.4, "valid": 0.1, "test": 0.1},
        ]),
    }  # fmt: skip


def wrong_boundaries(draw: Random, log: Log) -> None:
    bounds = draw.choice(
        [[3, 2, 1], [1, 2], [1, 1, 2], ["a", 2, 3], [1, 2, 3.5], [1, 2, 10**30], 5]
    )
    log.schema["split"] = {"rule": "global_time", "boundaries": bounds}


def wrong_rule(draw: Random, log: Log) -> None:
    log.schema["split"] = draw.choice([
        {"rule": "random"}, {"rule": None}, [], "per_user_time", 3,
        {"rule": "global_time", "held_out_users": 0.2},
        {"rule": "per_user_time", "boundaries": [1, 2, 3]},
        {"rule": "per_user_time", "held_out_users": 1.0},
        {"rule": "per_user_time", "held_out_users": 0.6, "held_out_valid_users": 0.5},
        {"rule": "per_user_time", "held_out_users": -0.1},
    ])  # fmt: skip


def wrong_unit(draw: Random, log: Log) -> None:
    log.schema["timestamp_unit"] = draw.choice(["hours", "s", None, 5, ["seconds"]])


def missing_column(draw: Random, log: Log) -> None:
    role = draw.choice(ROLES)
    log.schema["columns"] = {**log.columns, role: "no such column"}


def missing_label(draw: Random, log: Log) -> None:
    log.schema["labels"] = draw.choice(
        [{"buy": "no such column"}, {"Buy!": "x"}, ["buy"], {"": "x"}]
    )


def unlisted_scenario(draw: Random, log: Log) -> None:
    seen = draw.choice(log.rows)["scenario_id"]
    kept = [s for s in log.schema["scenarios"] if s["scenario_id"] != seen]
    log.schema["scenarios"] = kept


MEANINGS: list[Callable[[Random, Log], None]] = [
    add_scenario_twice, scenario_of_the_other_kind, no_scenarios, unknown_field, wrong_fractions,
    wrong_boundaries, wrong_rule, wrong_unit, missing_column, missing_label, unlisted_scenario,
]  # fmt: skip


# Faults of what was written, put in afterwards.


def _files(paths: dict[str, Path]) -> list[Path]:
    raw = paths["raw"]
    if not raw.is_dir():
        return [raw]
    found = sorted(raw.rglob("part-*"))
    return [f for f in found if not any(p.startswith((".", "_")) for p in f.relative_to(raw).parts)]


def _rewrite(draw: Random, paths: dict[str, Path], change: Callable[[pa.Table], pa.Table]) -> None:
    """Changes one file that has rows; reads it without what a folder's name may add."""
    for file in draw.sample(_files(paths), len(_files(paths))):
        with pq.ParquetFile(file) as parquet:
            table = parquet.read()
        if table.num_rows:
            pq.write_table(change(table), file)
            return


def _replace(table: pa.Table, name: str, array: pa.Array) -> pa.Table:
    return table.set_column(table.schema.get_field_index(name), name, array)


def null_somewhere(draw: Random, log: Log, paths: dict[str, Path]) -> None:
    name = draw.choice([*log.columns.values(), *log.labels.values()])

    def change(table: pa.Table) -> pa.Table:
        values = table[name].to_pylist()
        values[draw.randrange(len(values))] = None
        kind = table.schema.field(name).type
        return _replace(table, name, pa.array(values, kind))

    _rewrite(draw, paths, change)


def wrong_label(draw: Random, log: Log, paths: dict[str, Path]) -> None:
    name = draw.choice([log.columns["label"], *log.labels.values()])

    def change(table: pa.Table) -> pa.Table:
        values = [float(value) for value in table[name].to_pylist()]
        values[draw.randrange(len(values))] = draw.choice(
            [2, -1, 0.5, float("nan"), float("inf"), 1e300]
        )
        return _replace(table, name, pa.array(values, pa.float64()))

    _rewrite(draw, paths, change)


def wrong_type(draw: Random, log: Log, paths: dict[str, Path]) -> None:
    role = draw.choice(ROLES)
    arrays: dict[str, list[Any]] = {
        "user_id": [1.5, [1], b"x", {"a": 1}],
        "item_id": [1.5, True, [1], None],
        "scenario_id": [1.5, True, b"x"],
        "timestamp": ["2020-01-01", 1.7e9, True, [1]],
        "label": ["1", "yes", [1], {"a": 1}],
    }
    value = draw.choice(arrays[role])
    _rewrite(
        draw,
        paths,
        lambda table: _replace(table, log.columns[role], pa.array([value] * len(table))),
    )


def cut_short(draw: Random, log: Log, paths: dict[str, Path]) -> None:
    file = draw.choice(_files(paths))
    whole = file.read_bytes()
    file.write_bytes(whole[: draw.randrange(len(whole))])


def not_parquet(draw: Random, log: Log, paths: dict[str, Path]) -> None:
    text = [
        b"",
        b"PAR1",
        b"PAR1PAR1",
        b"user,item\n1,2\n",
        b"\0" * 5000,
        b"PAR1" + b"\xff" * 400 + b"PAR1",
    ]
    draw.choice(_files(paths)).write_bytes(draw.choice(text))


def nothing_there(draw: Random, log: Log, paths: dict[str, Path]) -> None:
    for file in _files(paths):
        file.unlink()


def schema_is_no_schema(draw: Random, log: Log, paths: dict[str, Path]) -> None:
    texts = [
        "", "[]", "3", "null", "a: [", "\t", "{", "- a\n- b", "name: &a [*a]", "!!python/object:os.system {}",
        "[" * 3000, "\x00", "? ? ?", "%YAML 9", "a: |\n  x\n y", "name: a\nname: b",
    ]  # fmt: skip
    paths["schema"].write_text(draw.choice(texts), encoding="utf-8")


def schema_is_not_text(draw: Random, log: Log, paths: dict[str, Path]) -> None:
    file = paths["schema"]
    file.write_bytes(draw.choice([b"\xff\xfe\x00", b"name: \xe9", bytes(range(256))]))


def schema_is_absent(draw: Random, log: Log, paths: dict[str, Path]) -> None:
    paths["schema"].unlink()
    if draw.random() < 0.5:
        paths["schema"].mkdir()


def schema_with_a_wrong_value(draw: Random, log: Log, paths: dict[str, Path]) -> None:
    content = yaml.safe_load(paths["schema"].read_text(encoding="utf-8"))
    name = draw.choice(["columns", "split", "scenarios"])
    content[name] = draw.choice([3, "x", [[]], {"a": {}}, [None], [{"scenario_id": 1}]])
    paths["schema"].write_text(dump(content), encoding="utf-8")


def column_twice(draw: Random, log: Log, paths: dict[str, Path]) -> None:
    name = draw.choice(list(log.columns.values()))
    _rewrite(draw, paths, lambda table: table.append_column(name, table[name]))


WRITTEN: list[Callable[[Random, Log, dict[str, Path]], None]] = [
    null_somewhere, wrong_label, wrong_type, cut_short, not_parquet, nothing_there, schema_is_no_schema,
    schema_is_not_text, schema_is_absent, schema_with_a_wrong_value, column_twice,
]  # fmt: skip
