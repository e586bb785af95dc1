"""Sequences against slow, obvious ones: strictly earlier, known by then, in order; as logged; appended."""

from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from llm_knowledge.errors import InputError
from tests.helpers.feature_data import SCHEMA, raw_log, write_raw
from tests.helpers.log_data import all_rows
from trainer.data.dataset import open_dataset, validate_dataset
from trainer.data.sources.append import append_parquet
from trainer.data.sources.parquet_log import prepare_parquet

DELAY = 120_000
SEQUENCES = {
    "clicks": {"where": "label", "length": 5, "fields": ["item", "author", "gap"]},
    "seen": {"where": "impression", "length": 3, "fields": ["item", "city"]},
    "buys": {"where": "buy", "known_after": DELAY, "length": 4, "fields": ["item", "gap"]},
    "served": {"columns": {"item": "seq_items", "author": "seq_authors"}, "length": 3},
}


def sequence_log(rows: int = 900, seed: int = 7) -> tuple[dict, dict, dict]:
    """Log, catalogue and schema; events of a user often share a second, apart by milliseconds."""
    log, catalogue = raw_log(rows, seed)
    draw = np.random.default_rng(seed)
    log["user_id"] = draw.integers(0, 9, rows).tolist()
    seconds = np.sort(draw.integers(0, 300, rows)) * 2_000
    log["timestamp"] = np.sort(
        (1_700_000_000 + seconds) * 1_000 + draw.integers(0, 3, rows)
    ).tolist()
    log["bought"] = draw.integers(0, 2, rows).tolist()
    lengths = draw.integers(0, 6, rows)
    log["seq_items"] = [draw.integers(0, 40, n).tolist() or None for n in lengths]
    log["seq_authors"] = [
        [None if a == 0 else int(a) for a in draw.integers(0, 8, n)] for n in lengths
    ]
    schema = deepcopy(SCHEMA) | {
        "labels": {"buy": "bought"},
        "timestamp_unit": "milliseconds",
        "sequences": deepcopy(SEQUENCES),
    }
    return log, catalogue, schema


def prepared(root: Path, log: dict, catalogue: dict, schema: dict) -> Path:
    raw, rules = write_raw(root / "raw", log, catalogue, schema)
    prepare_parquet(raw, root / "data", rules)
    return root / "data"


def authors_of(catalogue: dict) -> dict[int, int | None]:
    return dict(zip(catalogue["sku"], catalogue["written_by"], strict=True))


def obvious(log: dict, authors: dict, number: int, name: str) -> dict[str, list]:
    """A sequence of one event, by looking at every other one."""
    rule = SEQUENCES[name]
    user, moment = log["user_id"][number], log["timestamp"][number]
    steps = []
    for other in range(len(log["label"])):
        if log["user_id"][other] != user:
            continue
        if name == "buys":
            known = log["timestamp"][other] // 1_000 + DELAY < moment // 1_000
        else:
            known = log["timestamp"][other] < moment
        is_step = {"label": log["label"], "buy": log["bought"]}.get(rule["where"])
        if known and (is_step is None or is_step[other]):
            steps.append(
                (
                    log["timestamp"][other],
                    log["item_id"][other],
                    log["scenario_id"][other],
                    log["label"][other],
                    other,
                )
            )
    chosen = [step[-1] for step in sorted(steps)[-rule["length"] :]]
    values: dict[str, Any] = {
        "item": [log["item_id"][n] for n in chosen],
        "author": [authors.get(log["item_id"][n]) for n in chosen],
        "city": [log["city"][n] for n in chosen],
        "gap": [moment // 1_000 - log["timestamp"][n] // 1_000 for n in chosen],
    }
    return {f"sequence_{name}_{field}": values[field] for field in rule["fields"]}


def keyed(rows: list[dict]) -> dict[tuple, dict]:
    return {(row["feature_age"], row["item_id"], row["timestamp"]): row for row in rows}


def of_event(rows: dict[tuple, dict], log: dict, number: int) -> dict:
    second = log["timestamp"][number] // 1_000
    return rows[(log["age"][number], log["item_id"][number], second)]


def test_sequences_are_the_obvious_ones(tmp_path: Path) -> None:
    log, catalogue, schema = sequence_log()
    log["age"] = [float(n) for n in range(len(log["label"]))]  # tells events apart
    data = prepared(tmp_path, log, catalogue, schema)
    info = validate_dataset(data)
    assert info.sequences["buys"].text == f"events with buy, known after {DELAY} s"
    assert list(info.sequences["clicks"].fields.items()) == [
        ("item", "int64"), ("author", "int64"), ("gap", "int64"),
    ]  # fmt: skip
    rows, longest = keyed(all_rows(data)), dict.fromkeys(SEQUENCES, 0)
    for number in range(len(log["label"])):
        row = of_event(rows, log, number)
        for name in ("clicks", "seen", "buys"):
            for column, wanted in obvious(log, authors_of(catalogue), number, name).items():
                if column.endswith(("item", "gap")) or name == "clicks":
                    assert row[column] == wanted, (number, column)
                longest[name] = max(longest[name], len(row[column]))
        assert row["sequence_clicks_item"] == row["history"][-5:]
        assert row["sequence_served_item"] == (log["seq_items"][number] or [])[-3:]
        assert row["sequence_served_author"] == log["seq_authors"][number][-3:]
    assert (longest["clicks"], longest["seen"], longest["buys"]) == (5, 3, 4)


def test_no_later_event_changes_a_sequence(tmp_path: Path) -> None:
    log, catalogue, schema = sequence_log()
    log["age"] = [float(n) for n in range(len(log["label"]))]
    before = keyed(all_rows(prepared(tmp_path / "before", log, catalogue, schema)))
    cut = log["timestamp"][500]
    draw = np.random.default_rng(1)
    other = deepcopy(log)
    for number, moment in enumerate(log["timestamp"]):
        if moment > cut:
            other["item_id"][number] = int(draw.integers(0, 40))
            other["user_id"][number] = int(draw.integers(0, 9))
            other["label"][number], other["bought"][number] = 1, 1
            other["city"][number] = "elsewhere"
    after = keyed(all_rows(prepared(tmp_path / "after", other, catalogue, schema)))
    assert before.keys() != after.keys()
    for number, moment in enumerate(log["timestamp"]):
        if moment <= cut:
            one, two = of_event(before, log, number), of_event(after, log, number)
            names = [column for column in one if column.startswith("sequence_")]
            assert len(names) == 9
            assert [one[column] for column in names] == [two[column] for column in names]


def test_an_appended_day_has_the_sequences_of_preparing_all_at_once(tmp_path: Path) -> None:
    log, catalogue, schema = sequence_log()
    cut = 600
    while log["timestamp"][cut] // 1_000 == log["timestamp"][cut - 1] // 1_000:
        cut += 1
    # The newest second before the day holds steps that only their order in the files tells apart.
    whole = prepared(tmp_path / "whole", log, catalogue, schema)
    first = {name: values[:cut] for name, values in log.items()}
    second = {name: values[cut:] for name, values in log.items()}
    base = prepared(tmp_path / "first", first, catalogue, schema)
    raw, rules = write_raw(tmp_path / "second", second, catalogue, schema)
    append_parquet(raw, base, tmp_path / "both", rules)

    def sorted_rows(data: Path) -> list[str]:
        return sorted(repr(row | {"split": None}) for row in all_rows(data))

    assert sorted_rows(tmp_path / "both") == sorted_rows(whole)
    assert open_dataset(tmp_path / "both").sequences == open_dataset(whole).sequences
    day = [row for row in all_rows(whole) if row["timestamp"] * 1_000 >= log["timestamp"][cut]]
    assert max(gap for row in day[:50] for gap in row["sequence_buys_gap"]) > DELAY
    schema["sequences"]["clicks"]["length"] = 6
    raw, rules = write_raw(tmp_path / "second", second, catalogue, schema)
    with pytest.raises(
        InputError, match=r"sequence 'clicks' is .*'length': 6, .* declare the same"
    ):
        append_parquet(raw, base, tmp_path / "other", rules)


BAD = {
    "no such label": ({"where": "order"}, "x.where: 'order' is none of label, impression, buy"),
    "no such field": ({"where": "label", "fields": ["town"]}, "field 'town' is none of item, gap"),
    "a list as field": ({"where": "label", "fields": ["tags"]}, "field 'tags' is none of item"),
    "neither": ({"length": 3}, "give where, to make it of a label, or columns"),
    "both": ({"where": "label", "columns": {"item": "seq_items"}}, "give where"),
    "fields as logged": ({"columns": {"item": "seq_items"}, "fields": ["gap"]}, "go with where"),
    "a field twice": ({"where": "label", "fields": ["gap", "gap"]}, "names one twice"),
    "no length": ({"where": "label", "length": 0}, "greater than or equal to 1"),
    "an option of another kind": ({"where": "label", "pooling": "sum"}, "x.pooling: Extra inputs"),
    "no such column": ({"columns": {"item": "seq_item"}}, "'seq_item' .* did you mean 'seq_items'"),
    "no list": ({"columns": {"item": "city"}}, r"column 'city' \(field item of sequence x\) is string"),
    "another type": ({"columns": {"item": "seq_words"}}, "must be a list of int64, as item ids are"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_sequences_are_refused(tmp_path: Path, case: str) -> None:
    sequence, says = BAD[case]
    log, catalogue, schema = sequence_log(60)
    log["seq_words"] = [["a"]] * 60
    raw, rules = write_raw(
        tmp_path / "raw", log, catalogue, schema | {"sequences": {"x": sequence}}
    )
    with pytest.raises(InputError, match=says):
        prepare_parquet(raw, tmp_path / "out", rules)


@pytest.mark.parametrize(
    ("column", "value", "says"),
    [
        ("seq_authors", [1], "another number of steps than column 'seq_items'"),
        ("seq_items", [1, None], "a step without an item"),
        ("seq_gaps", [5, -1], "a gap that is null or below 0"),
    ],
)
def test_bad_steps_are_named_by_file_column_and_row(
    tmp_path: Path, column: str, value: list, says: str
) -> None:
    log, catalogue, schema = sequence_log(60)
    log["seq_items"], log["seq_authors"] = [[1, 2]] * 60, [[3, None]] * 60
    log["seq_gaps"] = [[9, 0]] * 60
    log[column] = [*log[column][:11], value, *log[column][12:]]
    columns = {"item": "seq_items", "author": "seq_authors", "gap": "seq_gaps"}
    schema["sequences"] = {"served": {"columns": columns, "length": 1}}
    raw, rules = write_raw(tmp_path / "raw", log, catalogue, schema)
    with pytest.raises(InputError, match=rf"log\.parquet: column '{column}', row 12 .*{says}"):
        prepare_parquet(raw, tmp_path / "out", rules)
    table = pa.table(log | {column: [*log[column][:11], log[column][0], *log[column][12:]]})
    pq.write_table(table, tmp_path / "raw" / "log.parquet")
    prepare_parquet(raw, tmp_path / "out", rules)
    assert {tuple(row["sequence_served_gap"]) for row in all_rows(tmp_path / "out")} == {(0,)}


def test_sequences_without_a_clock_are_in_order(tmp_path: Path) -> None:
    log, catalogue, schema = sequence_log(200)
    del schema["timestamp_unit"]
    del schema["sequences"]["buys"]
    schema["columns"] = {"timestamp": "none"}
    raw, rules = write_raw(tmp_path / "raw", log, catalogue, schema)
    with pytest.raises(InputError, match="clicks: the log has no clock, so there is no gap"):
        prepare_parquet(raw, tmp_path / "out", rules)
    schema["sequences"]["clicks"]["fields"] = ["item"]
    raw, rules = write_raw(tmp_path / "raw", log, catalogue, schema)
    prepare_parquet(raw, tmp_path / "out", rules)
    rows = all_rows(tmp_path / "out")
    assert all(row["sequence_clicks_item"] == row["history"][-5:] for row in rows)
    assert max(len(row["sequence_seen_item"]) for row in rows) == 3
