"""A new day behind a prepared dataset, and training that goes on with what it has not seen."""

import json
import os
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import trainer.training.loop
from embeddings.ids import Vocabulary
from launch.main import main
from llm_knowledge.dataset_files import dataset_fingerprint
from llm_knowledge.errors import InputError
from tests.drills.input_drill import note_rows, trained
from tests.helpers.log_data import SCHEMA, random_log, read_rows, write_log
from tests.helpers.training_data import make_config
from trainer.checkpoint.directory import checkpoints, read_state
from trainer.data.dataset import SPLITS, open_dataset, split_files, validate_dataset
from trainer.data.fingerprint import new_training_rows
from trainer.data.sources import append
from trainer.data.sources.append import append_parquet
from trainer.data.sources.parquet_log import prepare_parquet
from trainer.training.loop import train

BEGIN, NIGHT = 1_700_000_000, 1_700_000_100  # the log of tests.helpers.log_data lasts 150 seconds
RULES = SCHEMA | {"split": {"rule": "global_time"}}


def day(low: int, high: int, strings: bool = False) -> dict:
    log = random_log(strings=strings)
    keep = [low <= time < high for time in log["timestamp"]]
    return {
        name: [value for value, kept in zip(values, keep, strict=True) if kept]
        for name, values in log.items()
    }


@pytest.fixture(params=[False, True], ids=["integers", "strings"])
def days(tmp_path: Path, request: pytest.FixtureRequest) -> tuple[Path, Path, Path, Path]:
    """(first day prepared, raw second day, raw of both, schema)."""
    raw, schema = write_log(tmp_path / "raw", day(0, NIGHT, request.param), RULES)
    prepare_parquet(raw, tmp_path / "one", schema)
    second, _ = write_log(tmp_path / "two", day(NIGHT, 2**40, request.param), RULES)
    both, _ = write_log(tmp_path / "both", day(0, 2**40, request.param), RULES)
    return tmp_path / "one", second, both, schema


def test_appending_gives_the_rows_of_preparing_all_at_once(
    days: tuple[Path, Path, Path, Path], tmp_path: Path
) -> None:
    one, second, both, _ = days
    before = {split: read_rows(one, split) for split in SPLITS}
    # A user, an item and a title come with the second day.
    table = pq.read_table(second).to_pylist()
    late = type(table[0]["user_id"])(10**6), type(table[0]["item_id"])(10**6)
    table[-1] |= {"user_id": late[0], "item_id": late[1]}
    items = {"item_id": [late[1]], "title": ["Late"], "categories": ["New"]}
    catalogue = {"path": "items.parquet", "item_id": "item_id", "title": "title"}
    write_log(tmp_path / "two", items, RULES, "items.parquet")
    log = {name: [row[name] for row in table] for name in table[0]}
    second, schema = write_log(tmp_path / "two", log, RULES | {"catalogue": catalogue})

    info = append_parquet(second, one, tmp_path / "out", schema)
    assert validate_dataset(tmp_path / "out") == info
    assert {split: read_rows(one, split) for split in SPLITS} == before
    assert os.stat(split_files(one, "profile")[0]).st_nlink == 2  # nothing was copied

    first_day = day(0, NIGHT, isinstance(late[0], str))
    log = {name: first_day[name] + log[name] for name in log}
    assert info.split.boundaries is not None
    rules = RULES | {"split": {"rule": "global_time", "boundaries": info.split.boundaries}}
    both, schema = write_log(tmp_path / "both", log, rules)
    whole = prepare_parquet(both, tmp_path / "whole", schema)
    for split in SPLITS:
        assert read_rows(tmp_path / "out", split) == read_rows(tmp_path / "whole", split), split
    assert (info.rows, info.users, info.items) == (whole.rows, whole.users, whole.items)
    found = pq.read_table(tmp_path / "out/items.parquet").to_pylist()
    assert {"item_id": late[1], "title": "Late", "categories": []} in found
    assert [row["item_id"] for row in found] == sorted(row["item_id"] for row in found)


def test_every_day_of_several_is_found_again(days: tuple[Path, Path, Path, Path]) -> None:
    one, second, _, schema = days
    two, three = one.with_name("appended"), one.with_name("appended-again")
    append_parquet(second, one, two, schema)
    third = pq.read_table(second).to_pydict()
    third["timestamp"] = [time + 1000 for time in third["timestamp"]]
    raw, _ = write_log(one.with_name("three"), third, RULES)
    info = append_parquet(raw, two, three, schema)
    for earlier in (one, two):
        parts, rows = new_training_rows(info, three, dataset_fingerprint(earlier))
        files = split_files(three, "train")[:parts]
        assert [row for file in files for row in pq.read_table(file).to_pylist()] == read_rows(
            earlier, "train"
        )
        assert rows == open_dataset(earlier).rows["train"]
    with pytest.raises(InputError, match="was not made by appending to"):
        new_training_rows(info, three, "another")


@pytest.mark.parametrize("days", [False], indirect=True, ids=[""])
def test_what_cannot_be_appended(
    days: tuple[Path, Path, Path, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    one, second, both, schema = days

    def refused(raw: Path, base: Path, rules: Path, message: str) -> None:
        words = ["prepare", "parquet", "--raw", raw, "--schema", rules, "--append-to", base]
        assert main([*map(str, words), "--out", str(tmp_path / "out")]) == 2
        assert message in capsys.readouterr().err
        assert not list(tmp_path.glob("out*"))

    refused(both, one, schema, "is this day in it already? Give only later events")
    refused(second, tmp_path / "raw", schema, "not a prepared dataset")
    other = RULES | {"scenarios": SCHEMA["scenarios"][:1]}
    _, rules = write_log(tmp_path / "other", day(NIGHT, 2**40), other)
    refused(second, one, rules, "scenarios differ from those of")
    _, rules = write_log(tmp_path / "strings", day(NIGHT, 2**40, strings=True), RULES)
    refused(
        rules.with_name("log.parquet"), one, rules, "user_id: is string in the new files, int64"
    )
    few, rules = write_log(tmp_path / "few", day(NIGHT, NIGHT + 1), RULES)
    refused(few, one, rules, "the day has too few events")
    raw, rules = write_log(tmp_path / "raw", day(0, NIGHT), SCHEMA)
    prepare_parquet(raw, tmp_path / "per-user", rules)
    refused(second, tmp_path / "per-user", schema, "is split by per_user_time")

    def crash(*_: object) -> None:
        raise RuntimeError("killed in the middle")

    monkeypatch.setattr(append, "_take_over", crash)
    with pytest.raises(RuntimeError, match="killed in the middle"):
        append_parquet(second, one, tmp_path / "out", schema)
    assert not list(tmp_path.glob("out*"))
    validate_dataset(one)


@pytest.mark.slow
@pytest.mark.parametrize("days", [False], indirect=True, ids=[""])
def test_a_run_goes_on_with_the_rows_it_has_not_seen(
    days: tuple[Path, Path, Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, second, _, schema = days
    options = {"train__epochs": 1, "train__global_batch_size": 40}
    first = train(make_config(one, None, tmp_path / "first", **options))
    config = make_config(
        tmp_path / "two-days", None, tmp_path / "second", train__continue_from=first, **options
    )
    prepare_parquet(tmp_path / "raw/log.parquet", tmp_path / "two-days", schema)
    # The same rows prepared again are the same data, but nothing was appended to them.
    with pytest.raises(InputError, match="was not made by appending"):
        train(config)
    assert not (tmp_path / "second").exists()
    shutil.rmtree(tmp_path / "two-days")
    append_parquet(second, one, tmp_path / "two-days", schema)

    for name in ("build", "seed_step"):  # so that they are put back
        monkeypatch.setattr(trainer.training.loop, name, getattr(trainer.training.loop, name))
    note_rows(tmp_path / "noted-0.jsonl", 0, (-1, None))
    run = train(config)
    seen = [pair for rows in trained(tmp_path, "noted", 0, 10**6).values() for pair in rows]
    known = sum(open_dataset(one).rows[split] for split in ("train", "valid", "test"))
    wanted = read_rows(one, "valid") + read_rows(one, "test")
    wanted += read_rows(tmp_path / "two-days", "train")[known:]
    users, items = (
        Vocabulary.load(run / f"ids/{level}.parquet")
        .lookup(pa.array([row[f"{level}_id"] for row in wanted], pa.int64()))
        .tolist()
        for level in ("user", "item")
    )
    assert sorted(seen) == sorted(zip(users, items, strict=True))
    assert (run / "ids/user.parquet").read_bytes() == (first / "ids/user.parquet").read_bytes()
    assert read_state(checkpoints(run / "checkpoints")[-1]).step == -(-len(wanted) // 40)


@pytest.mark.slow
@pytest.mark.parametrize("days", [False], indirect=True, ids=[""])
def test_a_run_is_not_resumed_on_other_data(
    days: tuple[Path, Path, Path, Path], tmp_path: Path
) -> None:
    one, *_ = days
    config = make_config(one, None, tmp_path / "run", train__epochs=1)
    train(config)
    train(config, resume=True)
    info = json.loads((one / "dataset.json").read_text())
    (one / "dataset.json").write_text(json.dumps(info | {"name": "another"}))
    with pytest.raises(InputError, match=r"has changed since .*run began"):
        train(config, resume=True)
