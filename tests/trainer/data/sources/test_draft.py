"""Drafted schemas: what is guessed of a log, what is warned of, and that prepare takes a draft as it is."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from launch.main import main
from tests.helpers.log_data import all_rows
from trainer.data.dataset import open_dataset

DAY = 86_400_000


def a_log(rows: int = 900) -> dict:
    draw = np.random.default_rng(3)
    label = draw.integers(0, 2, rows)
    return {
        "customer": draw.integers(0, 40, rows).tolist(),
        "sku": [f"s{i}" for i in draw.integers(0, 30, rows)],
        "tab": draw.integers(0, 2, rows).tolist(),
        "time_ms": np.sort(1_700_000_000_000 + draw.integers(0, 30 * DAY, rows)).tolist(),
        "is_click": label.tolist(),
        "is_like": draw.integers(0, 2, rows).tolist(),
        "Age": [None if a < 25 else float(a) for a in draw.normal(40, 12, rows)],
        "city": [f"c{c}" for c in draw.integers(0, 5, rows)],
        "play_time": (label * draw.uniform(5, 60, rows) + draw.uniform(0, 3, rows)).tolist(),
        "outcome": [None if one == 0 else "done" for one in label],
        "version": [7] * rows,
        "words": ["|".join(f"w{w}" for w in draw.integers(0, 6, 3)) for _ in range(rows)],
        "tags": [draw.integers(0, 9, n).tolist() for n in draw.integers(0, 4, rows)],
        "broken": [float("nan"), *draw.random(rows - 1).tolist()],
        "note": [f"said {n} #\n: {{" for n in range(rows)],
        "yes": draw.integers(0, 4, rows).tolist(),
    }


def a_catalogue() -> dict:
    return {
        "sku": [f"s{i}" for i in range(30)],
        "title": [f"Thing {i}" for i in range(30)],
        "author_id": [None if i % 7 == 0 else i % 4 for i in range(30)],
        "rating": [i / 7 for i in range(30)],
    }


def draft(folder: Path, log: dict, *options: str) -> tuple[str, dict]:
    pq.write_table(pa.table(log), folder / "log.parquet")
    file = folder / "schema.yaml"
    file.unlink(missing_ok=True)
    words = ["schema", "--raw", str(folder / "log.parquet"), "--out", str(file), *options]
    assert main(words) == 0
    return file.read_text(), yaml.safe_load(file.read_text())


def line_of(text: str, name: str) -> str:
    (line,) = [line for line in text.splitlines() if line.strip(" -").startswith(name)]
    return line


def test_prepare_takes_a_draft_as_it_is(tmp_path: Path) -> None:
    pq.write_table(pa.table(a_catalogue()), tmp_path / "items.parquet")
    users = {"customer": list(range(40)), "tier": [i % 3 for i in range(40)],
             "since": [1_690_000_000_000] * 40, "income": [i / 3 for i in range(40)]}  # fmt: skip
    pq.write_table(pa.table(users), tmp_path / "users.parquet")
    tables = [
        "--catalogue",
        str(tmp_path / "items.parquet"),
        "--users",
        str(tmp_path / "users.parquet"),
    ]
    _, schema = draft(tmp_path, a_log(), *tables)
    assert schema["columns"] == {
        "user_id": "customer", "item_id": "sku", "scenario_id": "tab", "timestamp": "time_ms",
        "label": "is_click",
    }  # fmt: skip
    assert schema["timestamp_unit"] == "milliseconds"
    assert [one["scenario_id"] for one in schema["scenarios"]] == [0, 1]
    assert schema["labels"] == {"is_like": "is_like"}
    assert schema["features"] == {
        "age": {"kind": "number", "column": "Age"},
        "city": {"kind": "id"},
        "words": {"kind": "ids", "separator": "|"},
        "tags": {"kind": "ids"},
        "yes": {"kind": "id"},
        "author_id": {"kind": "id", "from": "catalogue"},
        "tier": {"kind": "id", "from": "users"},
        "income": {"kind": "number", "from": "users"},
    }
    assert set(schema["ignore"]) == {"play_time", "outcome", "version", "broken", "note", "rating"}
    assert schema["users"] == {"path": "users.parquet", "user_id": "customer", "since": "since"}
    assert main(["prepare", "parquet", "--raw", str(tmp_path / "log.parquet"), "--out",
                 str(tmp_path / "data"), "--schema", str(tmp_path / "schema.yaml")]) == 0  # fmt: skip
    info = open_dataset(tmp_path / "data")
    assert set(info.features) == set(schema["features"])
    rows = all_rows(tmp_path / "data")
    assert len(rows) == 900
    assert {row["feature_income"] for row in rows} == {i / 3 for i in {r["user_id"] for r in rows}}


def test_a_draft_says_what_it_saw_and_warns(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    text, _ = draft(tmp_path, a_log())
    assert "AUC 1.00); a leak" in line_of(text, "outcome")
    assert "tells is_click by itself" in line_of(text, "play_time")
    assert "WARNING: constant; int64, 1 distinct, 7 to 7" in line_of(text, "version")
    assert "WARNING: 1 rows with NaN" in line_of(text, "broken")
    missing = sum(age is None for age in a_log()["Age"])
    assert f"{missing / 900:.2%} null, 25" in line_of(text, "age")
    assert "string, 5 distinct, e.g. c" in line_of(text, "city")
    assert "almost every row has a text of its own" in line_of(text, "note")
    capsys.readouterr()
    assert main(["schema", "--raw", str(tmp_path / "log.parquet")]) == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    assert printed == yaml.safe_load(text)


def test_times_of_two_units_and_of_none_are_warned_of(tmp_path: Path) -> None:
    log = a_log(50)
    log["time_ms"][0] //= 1_000
    text, schema = draft(tmp_path, log)
    assert schema["timestamp_unit"] == "milliseconds"
    assert f"the oldest time, {log['time_ms'][0]}, looks like another unit" in text
    text, schema = draft(tmp_path, log | {"time_ms": list(range(50))})
    assert "timestamp_unit" not in schema
    assert "0 to 49 are times in no unit since 1970" in text


def test_what_cannot_be_guessed_is_to_be_filled_in(tmp_path: Path) -> None:
    log = {"a": [1, 2, 3], "b": ["x", "y", "z"]}
    text, schema = draft(tmp_path, log)
    assert set(schema["columns"].values()) == {"FILL_ME_IN"}
    assert text.count("WARNING: no column looks like it") == 5
    log = {name: [] for name in log}
    pq.write_table(pa.table(log), tmp_path / "log.parquet")
    assert main(["schema", "--raw", str(tmp_path / "log.parquet")]) == 2
