"""Times of a raw log: units and zones of each part, the order within a second, and orders without a clock."""

import datetime
from collections import defaultdict
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from llm_knowledge.errors import InputError
from llm_knowledge.profiles.dataset import Dataset
from tests.helpers.log_data import SCHEMA, all_rows, logged, random_log, read_rows, write_log
from trainer.data.dataset import open_dataset
from trainer.data.sources.append import append_parquet
from trainer.data.sources.parquet_log import prepare_parquet

UNITS = {"seconds": 1, "milliseconds": 10**3, "microseconds": 10**6, "nanoseconds": 10**9}


def histories(log: dict, moments: list[int]) -> dict[tuple, list]:
    """(user, item, moment) to the last 20 positives of strictly earlier moments, by the definition."""
    rows = list(zip(log["user_id"], moments, log["item_id"], log["label"], strict=True))
    return {
        (user, item, moment): [
            i
            for _, i in sorted(
                (m, i) for u, m, i, label in rows if u == user and m < moment and label
            )
        ][-20:]
        for user, moment, item, _ in rows
    }


# ---------------------------------------------------------------- zones and units


@pytest.mark.parametrize("zone", ["UTC", "America/New_York", "Asia/Kolkata"])
def test_parts_with_and_without_zones_and_of_several_units(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, zone: str
) -> None:
    monkeypatch.setenv("TZ", zone)
    log = random_log(600)
    kinds = [
        pa.timestamp("s"),
        pa.timestamp("us", "UTC"),
        pa.timestamp("ms", "America/New_York"),
        pa.timestamp("ns"),
        pa.timestamp("us"),
        pa.timestamp("ns", "Asia/Kolkata"),
    ]
    raw = tmp_path / "log"
    raw.mkdir()
    for number, kind in enumerate(kinds):
        part = pa.table(log).slice(100 * number, 100)
        times = part["timestamp"].cast(pa.timestamp("s")).cast(kind)
        pq.write_table(part.set_column(3, "timestamp", times), raw / f"{number}.parquet")
    _, schema = write_log(tmp_path / "rules", log)
    prepare_parquet(raw, tmp_path / "out", schema)
    found = sorted(
        (row["user_id"], row["timestamp"], row["item_id"]) for row in all_rows(tmp_path / "out")
    )
    assert found == sorted(zip(log["user_id"], log["timestamp"], log["item_id"], strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("data", UNITS)
@pytest.mark.parametrize("rows", ["all", "one", "a part"])
def test_numbers_of_another_unit_are_refused(
    tmp_path: Path, unit: str, data: str, rows: str
) -> None:
    log = random_log(90)
    of_other = {"all": range(90), "one": [40], "a part": range(60, 90)}[rows]
    log["timestamp"] = [
        time * (UNITS[data] if row in of_other else UNITS[unit])
        for row, time in enumerate(log["timestamp"])
    ]
    _, schema = write_log(tmp_path / "rules", log, SCHEMA | {"timestamp_unit": unit})
    raw = tmp_path / "log"
    raw.mkdir()
    for part in range(3):
        pq.write_table(pa.table(log).slice(30 * part, 30), raw / f"{part}.parquet")
    if unit == data:
        prepare_parquet(raw, tmp_path / "out", schema)
        assert {row["timestamp"] for row in all_rows(tmp_path / "out")} == set(
            random_log(90)["timestamp"]
        )
        return
    first = of_other[0]
    place = rf"{first // 30}.parquet: column 'timestamp', row {first % 30 + 1} .*timestamp_unit in the schema"
    with pytest.raises(InputError, match=place) as caught:
        prepare_parquet(raw, tmp_path / "out", schema)
    assert f"{len(of_other)} such rows" in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("value", [0, -1, 19_000, 28_000_000])
@pytest.mark.parametrize("typed", [False, True])
def test_a_missing_time_is_no_time_of_1970(tmp_path: Path, value: int, typed: bool) -> None:
    """0, -1, days and minutes since 1970 among seconds of today: they would land in profile."""
    log = random_log(200)
    log["timestamp"][17] = value
    if typed:
        log["timestamp"] = pa.array(log["timestamp"]).cast(pa.timestamp("s"))
    raw, schema = write_log(tmp_path / "raw", log)
    with pytest.raises(InputError, match=r"log.parquet: column 'timestamp', row 18 .*before 1973"):
        prepare_parquet(raw, tmp_path / "out", schema)


def test_a_timestamp_type_made_of_the_wrong_unit_is_refused(tmp_path: Path) -> None:
    log = random_log(200)
    late = pa.array([time * 1_000 for time in log["timestamp"]]).cast(pa.timestamp("s"))
    raw, schema = write_log(tmp_path / "raw", log | {"timestamp": late})
    with pytest.raises(InputError, match=r"row 1 .*a time after the year 5000.*make it again"):
        prepare_parquet(raw, tmp_path / "out", schema)


@pytest.mark.parametrize("value", [2**63 - 1, -(2**63), 2**64 - 1])
@pytest.mark.parametrize("role", ["timestamp", "user_id"])
def test_extreme_numbers_are_named(tmp_path: Path, value: int, role: str) -> None:
    log = random_log(200)
    kind = pa.uint64() if value >= 2**63 else pa.int64()
    log[role] = pa.array([*log[role][:8], value, *log[role][9:]], kind)
    for unit in UNITS:
        raw, schema = write_log(tmp_path / "raw", log, SCHEMA | {"timestamp_unit": unit})
        times = pa.array(log["timestamp"])
        if role == "user_id":  # a user is any number that 64 bits with a sign hold
            times = pa.array([time * UNITS[unit] for time in random_log(200)["timestamp"]])
            pq.write_table(pa.table(log | {"timestamp": times}), raw)
            if value < 2**63:
                prepare_parquet(raw, tmp_path / f"out-{unit}", schema)
                continue
        else:
            of_unit = [time * UNITS[unit] for time in random_log(200)["timestamp"]]
            times = pa.array([*of_unit[:8], value, *of_unit[9:]], kind)
            pq.write_table(pa.table(log | {"timestamp": times}), raw)
        with pytest.raises(InputError, match=rf"log.parquet: column '{role}', row 9 .*\({value}\)"):
            prepare_parquet(raw, tmp_path / "other", schema)


def test_small_numbers_are_taken_as_they_are_with_a_warning(tmp_path: Path) -> None:
    log = random_log(200)
    log["timestamp"] = [time - 1_700_000_000 for time in log["timestamp"]]
    raw, schema = write_log(tmp_path / "raw", log)
    with logged() as messages:
        prepare_parquet(raw, tmp_path / "out", schema)
    assert any("name it as columns.order" in message for message in messages)
    assert sorted(row["timestamp"] for row in all_rows(tmp_path / "out")) == sorted(
        log["timestamp"]
    )


# ---------------------------------------------------------------- within a second


@pytest.mark.slow
@pytest.mark.parametrize(
    "form", ["milliseconds", "microseconds", "nanoseconds", "us", "ns", "ms, zone"]
)
def test_order_within_a_second_is_kept(tmp_path: Path, form: str) -> None:
    log = random_log(1_500)
    draw = np.random.default_rng(5)
    # Quarters of a second: many events of a user share a second, some a moment.
    moments = [
        4 * time + int(quarter)
        for time, quarter in zip(log["timestamp"], draw.integers(0, 4, 1_500), strict=True)
    ]
    schema = SCHEMA
    if form in UNITS:
        log["timestamp"] = [moment * (UNITS[form] // 4) for moment in moments]
        schema = SCHEMA | {"timestamp_unit": form}
    else:
        zone = "America/New_York" if "zone" in form else None
        times = pa.array([moment * 250_000_000 for moment in moments]).cast(pa.timestamp("ns"))
        log["timestamp"] = times.cast(pa.timestamp(form[:2])).cast(pa.timestamp(form[:2], zone))
    log["item_id"] = list(range(1_500))  # so that each row is told apart
    raw, rules = write_log(tmp_path / "raw", log, schema)
    prepare_parquet(raw, tmp_path / "out", rules)
    expected, rows = histories(log, moments), all_rows(tmp_path / "out")
    assert len(rows) == 1_500
    for row in rows:
        assert row["timestamp"] == moments[row["item_id"]] // 4
        assert row["history"] == expected[row["user_id"], row["item_id"], moments[row["item_id"]]]
    for split in ("train", "valid", "test"):
        order = [moments[row["item_id"]] for row in read_rows(tmp_path / "out", split)]
        assert order == sorted(order)
    # A second is in one split of a user whole: a vector of the profile window is never as late as an event.
    splits = defaultdict(set)
    for row in rows:
        splits[row["user_id"], row["timestamp"]].add(row["split"])
    assert all(len(names) == 1 for names in splits.values())


def test_appending_keeps_the_order_within_a_second(tmp_path: Path) -> None:
    log = random_log(1_500)
    log["item_id"] = list(np.random.default_rng(3).permutation(1_500))
    draw = np.random.default_rng(5).integers(0, 4, 1_500)
    log["timestamp"] = [
        1_000 * time + 250 * int(q) for time, q in zip(log["timestamp"], draw, strict=True)
    ]
    rules = SCHEMA | {"timestamp_unit": "milliseconds", "split": {"rule": "global_time"}}
    night = sorted(log["timestamp"])[900] // 1_000 * 1_000

    def between(low: int, high: int) -> dict:
        keep = [n for n, time in enumerate(log["timestamp"]) if low <= time < high]
        return {name: [values[n] for n in keep] for name, values in log.items()}

    raw, schema = write_log(tmp_path / "one", between(0, night), rules)
    prepare_parquet(raw, tmp_path / "base", schema)
    day, _ = write_log(tmp_path / "two", between(night, 10**15), rules)
    append_parquet(day, tmp_path / "base", tmp_path / "out", schema)
    expected = histories(log, log["timestamp"])
    moment = dict(zip(log["item_id"], log["timestamp"], strict=True))
    rows = all_rows(tmp_path / "out")
    assert len(rows) == 1_500
    for row in rows:
        key = row["user_id"], row["item_id"], moment[row["item_id"]]
        assert row["history"] == expected[key]


# ---------------------------------------------------------------- an order without a clock


def ordered_log() -> tuple[dict, list[int]]:
    """A log without times, and the place of each row in its user's own rows."""
    log = random_log(600)
    del log["timestamp"]
    seen: dict[int, int] = defaultdict(int)
    places = []
    for user in log["user_id"]:
        places.append(seen[user])
        seen[user] += 1
    return log, places


@pytest.mark.parametrize("files", [1, 3])
def test_the_order_of_rows_is_an_order(tmp_path: Path, files: int) -> None:
    log, places = ordered_log()
    log["item_id"] = list(range(600))
    rules = SCHEMA | {"columns": {"timestamp": "none"}}
    del rules["split"]
    _, schema = write_log(tmp_path / "rules", log, rules)
    raw = tmp_path / "log"
    raw.mkdir()
    for number in range(files):
        part = pa.table(log).slice(600 // files * number, 600 // files)
        if number == 1:
            part = part.select(part.column_names[::-1])
        pq.write_table(part, raw / f"{number}.parquet", row_group_size=37)
    prepare_parquet(raw, tmp_path / "out", schema)
    info, expected = open_dataset(tmp_path / "out"), histories(log, places)
    assert (info.timestamps, info.split.rule) == ("order", "per_user_time")
    assert "in their order" in info.split.text
    rows = all_rows(tmp_path / "out")
    assert len(rows) == 600
    for row in rows:
        assert row["timestamp"] == places[row["item_id"]]
        assert row["history"] == expected[row["user_id"], row["item_id"], row["timestamp"]]
    with pytest.raises(InputError, match="has no clock"):
        Dataset.open(tmp_path / "out").files("user", cutoff=5)


def test_a_column_is_an_order(tmp_path: Path) -> None:
    log, places = ordered_log()
    log = log | {"order": [7 * place // 2 for place in places], "item_id": list(range(600))}
    shuffled = pa.table(log).take(np.random.default_rng(0).permutation(600))
    rules = SCHEMA | {"columns": {"order": "order"}}
    raw, schema = write_log(tmp_path / "raw", shuffled.to_pydict(), rules)
    prepare_parquet(raw, tmp_path / "out", schema)
    expected = histories(log, log["order"])
    for row in all_rows(tmp_path / "out"):
        assert row["timestamp"] == log["order"][row["item_id"]]
        assert row["history"] == expected[row["user_id"], row["item_id"], row["timestamp"]]
    assert open_dataset(tmp_path / "out").timestamps == "order"
    for change, words in (
        ({"columns": {"order": "order", "timestamp": "t"}}, "a clock or an order without one"),
        ({"split": {"rule": "global_time"}}, "has no time that all users share"),
        ({"timestamp_unit": "seconds"}, "the log has no clock"),
    ):
        schema.write_text(yaml.safe_dump(rules | change))
        with pytest.raises(InputError, match=words):
            prepare_parquet(raw, tmp_path / "other", schema)


def test_times_are_shown_as_the_file_has_them(tmp_path: Path) -> None:
    log = random_log(200)
    times = [datetime.datetime.fromtimestamp(time, datetime.UTC) for time in log["timestamp"]]
    times[4] = datetime.datetime(1970, 1, 1, tzinfo=datetime.UTC)
    raw, schema = write_log(tmp_path / "raw", log | {"timestamp": times})
    with pytest.raises(InputError, match=r"row 5 .*\(1970-01-01 00:00:00"):
        prepare_parquet(raw, tmp_path / "out", schema)
