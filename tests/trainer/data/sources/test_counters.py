"""Counters against a slow, obvious one: strictly earlier, known by then, nothing of one's own moment."""

from copy import deepcopy
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from llm_knowledge.errors import InputError
from tests.helpers.feature_data import SCHEMA, raw_log, write_raw
from tests.helpers.log_data import all_rows
from trainer.data.dataset import validate_dataset
from trainer.data.sources import counters as counters_module
from trainer.data.sources.append import append_parquet
from trainer.data.sources.counters import add_counters
from trainer.data.sources.log_schema import LogSchema
from trainer.data.sources.parquet_log import prepare_parquet
from trainer.data.sources.writer import connect

DAY = 86_400
COUNTERS = {
    "user_rate": {"of": "label", "by": ["user"]},
    "item_count": {"of": "impression", "by": ["item"]},
    "item_likes": {"of": "label", "by": ["item"], "value": "count", "window_days": 2},
    "user_week": {"of": "impression", "by": ["user"], "window_days": 1},
    "late": {"of": "buy", "by": ["user", "scenario"], "known_after": DAY, "smoothing": 2.5},
    "late_week": {"of": "buy", "by": ["item"], "known_after": 3_600, "window_days": 1},
    "user_city": {"of": "label", "by": ["user", "city"]},
    "user_tag": {"of": "label", "by": ["user", "tags"], "value": "count"},
}
RULES = {
    "scenarios": SCHEMA["scenarios"],
    "labels": {"buy": "bought"},
    "features": {"city": {"kind": "id"}, "tags": {"kind": "ids"}},
    "counters": COUNTERS,
}


def random_events(seed: int) -> list[dict]:
    draw = np.random.default_rng(seed)
    count = int(draw.integers(1, 40))
    some = lambda n: int(draw.integers(0, n))  # noqa: E731
    return [
        {
            "user_id": some(3), "item_id": f"i{some(4)}", "scenario_id": 1 + some(2),
            # Few moments, so that events meet in one, and sit at the ends of windows and delays.
            "timestamp": 10**9 + int(draw.choice([some(4), 3_600 + some(3), some(4) * DAY])),
            "fraction": some(2), "label": some(2), "label_buy": some(2),
            "feature_city": [None, "a", "b"][some(3)],
            "feature_tags": [None, [], [1], [2, 1, 2], [3]][some(5)],
        }
        for _ in range(count)
    ]  # fmt: skip


def keys_of(event: dict, by: list[str]) -> set[tuple] | None:
    """The keys that an event has, several of a list; None where one is missing."""
    keys: set[tuple] = {()}
    for part in by:
        value = event[f"{part}_id" if part in ("user", "item", "scenario") else f"feature_{part}"]
        values = set(value or []) if part == "tags" else {value} - {None}
        keys = {(*key, one) for key in keys for one in values}
    return keys or None


def known(event: dict, other: dict, delay: int) -> bool:
    if delay:
        return other["timestamp"] + delay < event["timestamp"]
    return (other["timestamp"], other["fraction"]) < (event["timestamp"], event["fraction"])


def obvious(events: list[dict], event: dict, counter: dict) -> float | None:
    """The counter of one event, by looking at every other one."""
    keys, delay = keys_of(event, counter["by"]), counter.get("known_after", 0)
    if keys is None:
        return None
    of = {"label": "label", "buy": "label_buy"}.get(counter["of"])
    past = [one for one in events if known(event, one, delay)]
    total = [one[of] if of else 1 for one in past]
    window = counter.get("window_days", 10**6) * DAY
    inside = [one for one in past if one["timestamp"] + window >= event["timestamp"]]
    # A list meets an event once per id that both have.
    times = [len(keys & (keys_of(one, counter["by"]) or set())) for one in inside]
    positives = sum(n * (one[of] if of else 1) for n, one in zip(times, inside, strict=True))
    if counter["of"] == "impression" or counter.get("value") == "count":
        return positives
    if not total:
        return None
    smoothing = counter.get("smoothing", 10.0)
    return (positives + smoothing * sum(total) / len(total)) / (sum(times) + smoothing)


def computed(events: list[dict], folder: Path) -> list[dict]:
    folder.mkdir()
    con = connect(folder, "200MB")
    form = {"feature_city": pa.string(), "feature_tags": pa.list_(pa.int64())}
    table = pa.table(
        {name: pa.array([one[name] for one in events], form.get(name)) for name in events[0]}
    )
    table = table.append_column("number", pa.array(range(len(events))))
    pq.write_table(table, folder / "events.parquet")
    sql = add_counters(
        con, f"'{folder / 'events.parquet'}'", LogSchema.model_validate(RULES), folder
    )
    return con.execute(f"SELECT * FROM {sql} ORDER BY number").to_arrow_table().to_pylist()


@pytest.mark.parametrize("seed", range(25))
def test_counters_are_the_obvious_ones(
    tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(counters_module, "BATCH_ROWS", 7)  # keys go on over the ends of batches
    events = random_events(seed)
    rows = computed(events, tmp_path / "data")
    for name, counter in COUNTERS.items():
        wanted = [obvious(events, event, counter) for event in events]
        assert [row[f"feature_{name}"] for row in rows] == pytest.approx(wanted), name


def test_no_later_event_changes_a_counter(tmp_path: Path) -> None:
    events = random_events(3)
    before = computed(events, tmp_path / "before")
    cut = sorted(one["timestamp"] for one in events)[len(events) // 2]
    draw = np.random.default_rng(0)
    changed = [
        one
        if one["timestamp"] <= cut
        else one | {"label": 1 - one["label"], "label_buy": 1, "user_id": int(draw.integers(0, 3))}
        for one in events
    ]
    after = computed(changed, tmp_path / "after")
    assert changed != events
    for event, one, two in zip(events, before, after, strict=True):
        if event["timestamp"] <= cut:
            assert one == two


# ---------------------------------------------------------------- prepare and append


def counted_log(rows: int = 1_200) -> tuple[dict, dict, dict]:
    log, catalogue = raw_log(rows, seed=7)
    schema = deepcopy(SCHEMA) | {
        "counters": {
            "user_rate": {"of": "label", "by": ["user"]},
            "author_rate": {"of": "label", "by": ["author", "scenario"], "known_after": 5_000},
            "tag_count": {"of": "impression", "by": ["tags"], "window_days": 2},
        },
        "split": {"rule": "global_time"},
    }
    return log, catalogue, schema


def test_prepared_counters_are_features(tmp_path: Path) -> None:
    log, catalogue, schema = counted_log()
    raw, rules = write_raw(tmp_path / "raw", log, catalogue, schema)
    prepare_parquet(raw, tmp_path / "out", rules)
    info = validate_dataset(tmp_path / "out")
    assert info.features["user_rate"].source == "counters"
    assert info.features["user_rate"].column == "rate of label by user; smoothed by 10"
    rows = all_rows(tmp_path / "out")
    for row in rows[::50]:
        past = [one for one in rows if one["timestamp"] < row["timestamp"]]
        own = [one["label"] for one in past if one["user_id"] == row["user_id"]]
        if past:
            prior = sum(one["label"] for one in past) / len(past)
            assert row["feature_user_rate"] == pytest.approx(
                (sum(own) + 10 * prior) / (len(own) + 10)
            )
    assert [p.name for p in (tmp_path / "out").glob("scratch*")] == []


def test_an_appended_day_has_the_counters_of_preparing_all_at_once(tmp_path: Path) -> None:
    log, catalogue, schema = counted_log()
    cut = 800
    while log["timestamp"][cut] == log["timestamp"][cut - 1]:
        cut += 1
    first = {name: values[:cut] for name, values in log.items()}
    second = {name: values[cut:] for name, values in log.items()}
    raw, rules = write_raw(tmp_path / "raw", log, catalogue, schema)
    prepare_parquet(raw, tmp_path / "whole", rules)
    raw, rules = write_raw(tmp_path / "first", first, catalogue, schema)
    prepare_parquet(raw, tmp_path / "base", rules)
    raw, rules = write_raw(tmp_path / "second", second, catalogue, schema)
    append_parquet(raw, tmp_path / "base", tmp_path / "both", rules)

    def sorted_rows(data: Path) -> list[str]:
        return sorted(repr(row | {"split": None}) for row in all_rows(data))

    assert sorted_rows(tmp_path / "both") == sorted_rows(tmp_path / "whole")
    schema["counters"]["user_rate"]["smoothing"] = 3
    raw, rules = write_raw(tmp_path / "second", second, catalogue, schema)
    with pytest.raises(
        InputError, match="feature 'user_rate': column is rate of label by user; smoothed by 3"
    ):
        append_parquet(raw, tmp_path / "base", tmp_path / "other", rules)


BAD = {
    "no such label": ({"of": "buy", "by": ["user"]}, "counters.x.of: 'buy' is none of label, impression"),
    "no such key": ({"by": ["town"]}, "counters.x.by: 'town' is none of user, item, scenario, city"),
    "a number as key": ({"by": ["age"]}, "counters.x.by: 'age' is none of"),
    "two lists": ({"by": ["tags", "words"]}, "at most one key may be of kind ids"),
    "a key twice": ({"by": ["user", "user"]}, "by names a key twice"),
    "no key": ({"by": []}, "counters.x.by"),
    "a rate of impressions": ({"of": "impression", "by": ["user"], "value": "rate"}, "are counted"),
    "a window before anything is known": (
        {"by": ["user"], "window_days": 1, "known_after": DAY}, "before any label in it is known",
    ),
    "a smoothed count": ({"by": ["user"], "value": "count", "smoothing": 3}, "goes with rates only"),
    "an unknown option": ({"by": ["user"], "days": 3}, "counters.x.days: Extra inputs"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_counters_are_refused(tmp_path: Path, case: str) -> None:
    counter, says = BAD[case]
    schema = deepcopy(SCHEMA) | {"counters": {"x": counter}}
    raw, rules = write_raw(tmp_path / "raw", *raw_log(50), schema)
    with pytest.raises(InputError, match=says):
        prepare_parquet(raw, tmp_path / "out", rules)


def test_counters_need_a_clock(tmp_path: Path) -> None:
    schema = deepcopy(SCHEMA) | {
        "counters": {"x": {"by": ["user"]}},
        "columns": {"timestamp": "none"},
    }
    raw, rules = write_raw(tmp_path / "raw", *raw_log(50), schema)
    with pytest.raises(InputError, match="counters: the log has no clock"):
        prepare_parquet(raw, tmp_path / "out", rules)
