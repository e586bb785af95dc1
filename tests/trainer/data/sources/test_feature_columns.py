"""Feature columns on their way into a dataset: raw values kept, unread columns named, bad input refused."""

import json
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from llm_knowledge.errors import InputError
from tests.helpers.feature_data import SCHEMA, raw_log, write_raw
from tests.helpers.log_data import all_rows, logged, prepare, random_log
from trainer.data.dataset import validate_dataset
from trainer.data.sources.append import append_parquet
from trainer.data.sources.parquet_log import prepare_parquet


def test_raw_values_are_kept(tmp_path: Path) -> None:
    log, catalogue = raw_log(600)
    log["timestamp"] = list(range(1_700_000_000, 1_700_000_600))
    raw, schema = write_raw(tmp_path / "raw", log, catalogue)
    prepare_parquet(raw, tmp_path / "out", schema)
    info = validate_dataset(tmp_path / "out")
    assert list(info.features) == list(SCHEMA["features"])
    assert info.features["tags"].weights == "tag_scores"
    items = {sku: number for number, sku in enumerate(catalogue["sku"])}
    for row in all_rows(tmp_path / "out"):
        n = row["timestamp"] - 1_700_000_000
        item = items.get(row["item_id"])
        assert row["feature_age"] == log["age"][n]
        assert row["feature_city"] == log["city"][n]
        assert row["feature_tags"] == log["tags"][n]
        assert row["weights_tags"] == (log["tag_scores"][n] and pytest.approx(log["tag_scores"][n]))
        assert row["feature_words"] == [word for word in log["words"][n].split(",") if word]
        for name, column in (("author", "written_by"), ("price", "price")):
            assert row[f"feature_{name}"] == (None if item is None else catalogue[column][item])


def test_a_log_without_features_has_the_description_of_before(tmp_path: Path) -> None:
    out = prepare(tmp_path, random_log(200))
    assert "features" not in json.loads((out / "dataset.json").read_text())
    names = pq.read_schema(out / "train" / "part-00000.parquet").names
    assert names == ["user_id", "item_id", "scenario_id", "timestamp", "label", "history"]


def test_a_column_that_nothing_reads_is_named_once(tmp_path: Path) -> None:
    log, catalogue = raw_log(400)
    schema = deepcopy(SCHEMA) | {"ignore": ["debug_*"]}
    del schema["features"]["city"]
    log["extra"], log["debug_y"] = log["age"], log["age"]
    raw, rules = write_raw(tmp_path / "raw", log, catalogue, schema)
    with logged() as messages:
        prepare_parquet(raw, tmp_path / "out", rules)
    said = [message for message in messages if "nothing reads" in message]
    assert len(said) == 1
    assert "log.parquet: columns that nothing reads: city, extra; declare" in said[0]
    raw, rules = write_raw(tmp_path / "raw", log, catalogue, schema | {"strict": True})
    with pytest.raises(InputError, match=r"columns that nothing reads: city, extra"):
        prepare_parquet(raw, tmp_path / "strict", rules)
    assert not (tmp_path / "strict").exists()


def put(column: str, row: int, value: object) -> Callable[[dict, dict, dict], None]:
    return lambda log, catalogue, schema: log[column].__setitem__(row, value)


def declare(name: str, **changes: object) -> Callable[[dict, dict, dict], None]:
    return lambda log, catalogue, schema: schema["features"].update({name: changes})


def replace_column(column: str, value: object) -> Callable[[dict, dict, dict], None]:
    return lambda log, catalogue, schema: log.update({column: [value] * len(log[column])})


BAD: dict[str, tuple[Callable[[dict, dict, dict], object], str]] = {
    "a feature of no column": (
        declare("agee", kind="number"),
        r"log\.parquet: column 'agee' \(for feature agee\) is missing; did you mean 'age'",
    ),
    "NaN": (put("age", 6, float("nan")), r"log\.parquet: column 'age', row 7 .*NaN"),
    "infinity": (put("age", 6, float("inf")), r"log\.parquet: column 'age', row 7 .*infinite"),
    "text in a number": (
        replace_column("age", "old"),
        r"'age' \(feature age\) is string, kind number must be integers, floats",
    ),
    "a number as id": (declare("age", kind="id"), r"'age' .* is double, kind id must be"),
    "a list of lists": (
        replace_column("tags", [[1]]),
        r"'tags' .* is list<.*list<.*, kind ids must be a list of integers or text",
    ),
    "a null in a list": (put("tags", 3, [1, None]), r"'tags', row 4 .*a list with a null"),
    "a weight too many": (put("tag_scores", 3, [0.1] * 9), r"'tag_scores', row 4 .*as many weights"),
    "a catalogue's statistic": (
        lambda log, catalogue, schema: schema["features"]["price"].pop("timeless"),
        "timeless: true",
    ),
    "sampled negatives": (
        lambda log, catalogue, schema: schema.update(negatives={"per_positive": 2}),
        "features: not supported yet together with negatives.per_positive",
    ),
    "a taken name": (declare("user", kind="id", column="city"), "the name is taken"),
    "features of no catalogue": (lambda log, c, schema: schema.pop("catalogue"), "has no catalogue"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_columns_are_refused(tmp_path: Path, case: str) -> None:
    change, says = BAD[case]
    (log, catalogue), schema = raw_log(300), deepcopy(SCHEMA)
    change(log, catalogue, schema)
    raw, rules = write_raw(tmp_path / "raw", log, catalogue, schema)
    with pytest.raises(InputError, match=says):
        prepare_parquet(raw, tmp_path / "out", rules)
    assert not (tmp_path / "out").exists()


def test_a_column_in_one_part_only_is_refused(tmp_path: Path) -> None:
    log, catalogue = raw_log(300)
    _, rules = write_raw(tmp_path / "raw", log, catalogue)
    folder = tmp_path / "parts"
    folder.mkdir()
    pq.write_table(pa.table(log), folder / "a.parquet")
    pq.write_table(pa.table(log).drop_columns("city"), folder / "b.parquet")
    with pytest.raises(InputError, match=r"b\.parquet: column 'city' .* is missing"):
        prepare_parquet(folder, tmp_path / "out", rules)
    integers = pa.table(log | {"city": [1] * 300})
    pq.write_table(integers, folder / "b.parquet")
    with pytest.raises(
        InputError, match=r"'city' .* is string in .*a\.parquet, int64 in .*b\.parquet"
    ):
        prepare_parquet(folder, tmp_path / "out", rules)


def test_a_day_with_other_features_is_refused(tmp_path: Path) -> None:
    log, catalogue = raw_log(600)
    raw, rules = write_raw(tmp_path / "raw", log, catalogue)
    prepare_parquet(raw, tmp_path / "one", rules)
    later = log | {"timestamp": [time + 10**7 for time in log["timestamp"]]}
    raw, rules = write_raw(tmp_path / "raw", later, catalogue)
    append_parquet(raw, tmp_path / "one", tmp_path / "two", rules)
    validate_dataset(tmp_path / "two")
    by_time = {time: age for time, age in zip(later["timestamp"], later["age"], strict=True)}
    day = [row for row in all_rows(tmp_path / "two") if row["timestamp"] >= min(by_time)]
    assert len(day) == 600
    unique = [t for t in by_time if later["timestamp"].count(t) == 1]
    assert {r["timestamp"]: r["feature_age"] for r in day if r["timestamp"] in unique} == {
        time: by_time[time] for time in unique
    }
    schema = deepcopy(SCHEMA)
    del schema["features"]["city"]
    raw, rules = write_raw(tmp_path / "raw", later, catalogue, schema)
    with pytest.raises(InputError, match=r"feature 'city' is missing"):
        append_parquet(raw, tmp_path / "one", tmp_path / "three", rules)
