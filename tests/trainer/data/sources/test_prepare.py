"""Split, history, catalogue and files of a prepared log, against the definition."""

from collections import defaultdict
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from llm_knowledge.errors import InputError
from llm_knowledge.profiles.dataset import Dataset, ProfileOptions, profile_batches
from tests.helpers.log_data import SCHEMA, all_rows, prepare, random_log, read_rows, write_log
from trainer.data.dataset import SPLITS, open_dataset, split_files, validate_dataset
from trainer.data.sources import staging as pipeline
from trainer.data.sources import writer
from trainer.data.sources.parquet_log import prepare_parquet
from trainer.data.sources.staging import hold_out


def brute_history(log: dict) -> dict[tuple, list]:
    """History by the definition: (user, time) to the last 20 strictly earlier positives."""
    rows = list(
        zip(*(log[name] for name in ("user_id", "timestamp", "item_id", "label")), strict=True)
    )
    return {
        (user, time): [
            item
            for _, item in sorted(
                (t, i) for u, t, i, label in rows if u == user and t < time and label
            )
        ][-20:]
        for user, time, _, _ in rows
    }


@pytest.mark.slow
@pytest.mark.parametrize("strings", [False, True])
@pytest.mark.parametrize("rule", ["per_user_time", "global_time"])
def test_history_rows_and_order_match_brute_force(tmp_path, monkeypatch, strings, rule):
    monkeypatch.setattr(pipeline, "BLOCK_ROWS", 200)  # several blocks of users
    log = random_log(strings=strings)
    out = prepare(tmp_path, log, SCHEMA | {"split": {"rule": rule}})
    rows, expected = all_rows(out), brute_history(log)
    assert max(len(history) for history in expected.values()) == 20
    for row in rows:
        assert row["history"] == expected[row["user_id"], row["timestamp"]]
    names = ("user_id", "item_id", "scenario_id", "timestamp", "label")
    got = sorted(tuple(row[name] for name in names) for row in rows)
    assert got == sorted(zip(*(log[name] for name in names), strict=True))
    for split in SPLITS:
        order = [(r["timestamp"], r["user_id"], r["item_id"]) for r in read_rows(out, split)]
        assert order == sorted(order)
    info = validate_dataset(out)
    assert info.users == len(set(log["user_id"]))
    assert info.items == len(set(log["item_id"]))
    assert sum(info.rows.values()) == len(log["label"])


def test_per_user_splits_never_overlap_in_time(tmp_path):
    out = prepare(tmp_path, random_log())
    spans = defaultdict(lambda: defaultdict(list))
    for row in all_rows(out):
        spans[row["user_id"]][row["split"]].append(row["timestamp"])
    assert len(spans) == 25
    for by_split in spans.values():
        present = [by_split[split] for split in SPLITS if by_split[split]]
        assert all(max(a) < min(b) for a, b in pairwise(present))


def test_global_splits_follow_boundaries_and_fractions(tmp_path):
    log = random_log()
    out = prepare(tmp_path, log, SCHEMA | {"split": {"rule": "global_time"}})
    info = open_dataset(out)
    ordered = sorted(log["timestamp"])
    assert info.split.boundaries == [ordered[round(share * 1_500)] for share in (0.4, 0.8, 0.9)]
    limits = [0, *info.split.boundaries, 10**12]
    for split, low, high in zip(SPLITS, limits, limits[1:], strict=False):
        assert all(low <= row["timestamp"] < high for row in read_rows(out, split))


def test_given_boundaries_are_first_seconds_of_their_split(tmp_path):
    cuts = [1_700_000_050, 1_700_000_100, 1_700_000_120]
    split = {"rule": "global_time", "boundaries": cuts}
    out = prepare(tmp_path, random_log(), SCHEMA | {"split": split})
    firsts = [min(row["timestamp"] for row in read_rows(out, name)) for name in SPLITS[1:]]
    assert firsts == cuts


def test_time_quantile_is_exact_over_wide_ranges():
    import duckdb

    times = np.random.default_rng(0).integers(-(10**9), 2 * 10**9, 1_001) // 3 * 3
    con = duckdb.connect()
    con.register("events", pa.table({"timestamp": times}))
    for share in (0.0, 0.123, 0.5, 0.999):
        assert pipeline.time_quantile(con, "events", share) == np.sort(times)[round(share * 1_001)]


def test_one_split_cut_never_divides_a_tie():
    users, times = np.zeros(10, dtype=np.int64), np.array([1, 2, 3, 3, 3, 3, 3, 3, 9, 10])
    codes = pipeline.split_per_user(users, times, [0.4, 0.4, 0.1, 0.1])
    assert codes.tolist() == [0, 0, 1, 1, 1, 1, 1, 1, 2, 3]


def test_catalogue_units_and_renamed_columns(tmp_path):
    log = random_log(300)
    log = {
        "uid": log["user_id"],
        "item_id": log["item_id"],
        "tab": log["scenario_id"],
        "when": pa.array([t * 1000 + 999 for t in log["timestamp"]]),
        "click": [float(x) for x in log["label"]],
    }
    schema = SCHEMA | {
        "columns": {"user_id": "uid", "scenario_id": "tab", "timestamp": "when", "label": "click"},
        "timestamp_unit": "milliseconds",
        "catalogue": {"path": "items.parquet", "categories": "tags"},
    }
    raw, rules = write_log(tmp_path / "raw", log, schema)
    items = {"item_id": [0, 1, 999], "title": ["Zero", None, "Unseen"], "tags": ["a|b", None, ""]}
    pq.write_table(pa.table(items), tmp_path / "raw" / "items.parquet")
    prepare_parquet(raw, tmp_path / "out", rules)
    written = {
        row["item_id"]: row for row in pq.read_table(tmp_path / "out/items.parquet").to_pylist()
    }
    assert list(written) == sorted({0, 1, 999} | set(log["item_id"]))
    assert written[0] == {"item_id": 0, "title": "Zero", "categories": ["a", "b"]}
    assert written[1]["title"] == ""
    assert written[2] == {"item_id": 2, "title": "", "categories": []}
    assert written[999]["title"] == "Unseen"
    times = {row["timestamp"] for row in all_rows(tmp_path / "out")}
    assert times == {t // 1000 for t in log["when"].to_pylist()}


def test_folder_of_files_with_odd_names_and_timestamp_type(tmp_path):
    log = random_log(400)
    log["timestamp"] = pa.array(log["timestamp"]).cast(pa.timestamp("s")).cast(pa.timestamp("ns"))
    table = pa.table(log)
    raw = tmp_path / "it's [raw]*"
    raw.mkdir()
    pq.write_table(table.slice(0, 150), raw / "a?.parquet")
    pq.write_table(table.slice(150).select(table.column_names[::-1]), raw / "b.parquet")
    (tmp_path / "schema.yaml").write_text(yaml.safe_dump(SCHEMA))
    info = prepare_parquet(raw, tmp_path / "out", tmp_path / "schema.yaml")
    assert sum(info.rows.values()) == 400
    times = sorted(row["timestamp"] for row in all_rows(tmp_path / "out"))
    assert times == sorted(random_log(400)["timestamp"])


def test_parts_and_row_groups_are_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(writer, "ROWS_PER_PART", 4_096)
    draw = np.random.default_rng(0)
    rows = 30_000
    log = random_log(rows, users=500) | {
        "timestamp": list(1_700_000_000 + draw.integers(0, 10**6, rows))
    }
    out = prepare(tmp_path, log)
    assert len(split_files(out, "train")) > 1
    validate_dataset(out)
    times = [row["timestamp"] for row in read_rows(out, "train")]
    assert times == sorted(times)
    for file in split_files(out, "train"):
        parquet = pq.ParquetFile(file)
        sizes = [parquet.metadata.row_group(n).num_rows for n in range(parquet.num_row_groups)]
        assert max(sizes) <= writer.ROWS_PER_GROUP


@pytest.mark.parametrize(
    ("shares", "split"),
    [("held_out_users: 0.25", "test"), ("held_out_valid_users: 0.25", "valid")],
)
def test_held_out_users_are_read_by_prompts_and_never_trained(
    tmp_path: Path, shares: str, split: str
) -> None:
    rng = np.random.default_rng(0)
    users = np.repeat(np.arange(60), 10)
    log = pa.table(
        {
            "user_id": users,
            "item_id": rng.integers(0, 30, len(users)),
            "scenario_id": rng.choice(["a", "b"], len(users)),
            "timestamp": np.tile(np.arange(10), 60) + 1_600_000_000,
            "label": rng.integers(0, 2, len(users)),
        }
    )
    pq.write_table(log, tmp_path / "log.parquet")
    schema = tmp_path / "schema.yaml"
    schema.write_text(
        "scenarios: [{scenario_id: a, name: A, description: ''}, "
        "{scenario_id: b, name: B, description: ''}]\n"
        f"split: {{rule: per_user_time, {shares}, "
        "fractions: {profile: 0.4, train: 0.3, valid: 0.1, test: 0.2}}\n"
    )
    info = prepare_parquet(tmp_path / "log.parquet", tmp_path / "data", schema)
    validate_dataset(tmp_path / "data")

    def rows(split: str) -> pa.Table:
        files = split_files(tmp_path / "data", split)
        return pa.concat_tables([pq.read_table(file) for file in files])

    def people(split: str) -> set[int]:
        return set(rows(split)["user_id"].to_pylist())

    held_out = people("introduction")
    assert 5 < len(held_out) < 25
    (other,) = {"valid", "test"} - {split}
    assert held_out.isdisjoint(people("profile") | people("train") | people(other))
    assert people(split) == set(range(60))
    assert people("profile") == people(other) == set(range(60)) - held_out
    # Every event is somewhere, once; a held-out user's first 4 of 10 introduce, 6 are test or valid.
    assert info.introduction_rows == 4 * len(held_out)
    later = rows(split)["user_id"].to_numpy()
    assert np.isin(later, list(held_out)).sum() == 6 * len(held_out)
    assert sum(info.rows.values()) + info.introduction_rows == 600
    dataset = Dataset.open(tmp_path / "data")
    batches = list(profile_batches(dataset, "user", ProfileOptions(), 100, tmp_path / "scratch"))
    profiled = pa.Table.from_batches(batches)
    assert set(profiled["key"].to_pylist()) == set(range(60))
    newest = dict(zip(profiled["key"].to_pylist(), profiled["cutoff"].to_pylist(), strict=True))
    assert all(newest[user] == 1_600_000_003 for user in held_out)


def test_those_who_test_stay_the_same_whoever_validates() -> None:
    users, codes = pa.chunked_array([np.arange(1000)]), np.full(1000, 1, dtype=np.int8)
    tested, both = hold_out(users, codes, 0.2), hold_out(users, codes, 0.2, 0.3)
    assert np.array_equal(tested == 3, both == 3)
    assert np.array_equal(hold_out(users, codes, 0.5) == 3, both > 1)
    assert 250 < (both == 2).sum() < 350


@pytest.mark.parametrize(
    ("split", "message"),
    [
        ("rule: global_time, held_out_users: 0.25", "held_out_users goes with rule per_user_time"),
        ("rule: global_time, held_out_valid_users: 0.25", "goes with rule per_user_time"),
        (
            "rule: per_user_time, held_out_users: 0.5, held_out_valid_users: 0.5",
            "nobody to train on",
        ),
    ],
)
def test_held_out_users_need_times_of_their_own_and_leave_others(
    tmp_path: Path, split: str, message: str
) -> None:
    schema = tmp_path / "schema.yaml"
    schema.write_text(f"split: {{{split}}}\n")
    with pytest.raises(InputError, match=message):
        prepare_parquet(tmp_path / "log.parquet", tmp_path / "data", schema)
