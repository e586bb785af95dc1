"""Bad input: one message with the place, nothing written, nothing damaged."""

import errno
import json
import shutil

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from llm_knowledge.errors import InputError
from llm_knowledge.locks import directory_lock
from tests.helpers.log_data import SCHEMA, prepare, random_log, write_log
from trainer.data.dataset import SPLITS, open_dataset, split_files, validate_dataset
from trainer.data.sources import staging as pipeline
from trainer.data.sources.parquet_log import prepare_parquet
from trainer.data.sources.writer import write_sorted


def change(name: str, place: int, value: object):
    def apply(log: dict) -> None:
        log[name] = [value if row == place else x for row, x in enumerate(log[name])]

    return apply


def rename(log: dict) -> None:
    log["user"] = log.pop("user_id")


def as_text(log: dict) -> None:
    log["label"] = [str(value) for value in log["label"]]


BAD_LOGS = {
    "renamed": (rename, ["log.parquet", "'user_id'", "did you mean 'user'"]),
    "missing": (lambda log: log.pop("label"), ["'label'", "missing"]),
    "wrong type": (as_text, ["'label'", "string"]),
    "null id": (change("user_id", 7, None), ["'user_id'", "row 8 ", "null"]),
    "NaN label": (change("label", 3, float("nan")), ["'label'", "row 4 ", "NaN"]),
    "label 2": (change("label", 5, 2), ["'label'", "row 6 ", "not 0 or 1 (2)"]),
    "label half": (change("label", 5, 0.5), ["'label'", "row 6 ", "not 0 or 1 (0.5)"]),
    "unknown scenario": (
        change("scenario_id", 2, 77),
        ["'scenario_id'", "row 3 ", "(77)", "list it"],
    ),
    "milliseconds": (change("timestamp", 1, 1_700_000_000_000), ["row 2 ", "timestamp_unit"]),
}


@pytest.mark.parametrize("case", BAD_LOGS)
def test_bad_log_is_refused_with_place_and_nothing_written(tmp_path, case):
    spoil, words = BAD_LOGS[case]
    log = random_log(200)
    if case in ("NaN label", "label half"):
        log["label"] = [float(value) for value in log["label"]]
    spoil(log)
    with pytest.raises(InputError) as caught:
        prepare(tmp_path, log)
    for word in words:
        assert word in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["raw"]


BAD_SCHEMAS = {
    "unknown field": ({"nmae": "x"}, ["schema.yaml", "nmae"]),
    "fractions": (
        {"split": {"fractions": {"profile": 0.5, "train": 0.5, "valid": 0.1, "test": 0.1}}},
        ["split.fractions", "sum to 1"],
    ),
    "NaN among the fractions": (
        {"split": {"fractions": dict.fromkeys(SPLITS, 0.25) | {"profile": float("nan")}}},
        ["split.fractions", "above 0"],
    ),
    "no scenarios": ({"scenarios": []}, ["schema.yaml", "scenarios", "at least 1"]),
    "empty split": (
        {"split": {"boundaries": [1_700_000_010, 1_700_000_020, 1_800_000_000]}},
        ["test split is empty"],
    ),
    "scenario type": (
        {"scenarios": [{"scenario_id": "1", "name": "a", "description": "b"}]},
        ["'1'", "int64", "quotes"],
    ),
    "no catalogue": ({"catalogue": {"path": "nowhere.parquet"}}, ["nowhere.parquet", "no such"]),
}


@pytest.mark.parametrize("case", BAD_SCHEMAS)
def test_bad_schema_is_refused(tmp_path, case):
    fields, words = BAD_SCHEMAS[case]
    with pytest.raises(InputError) as caught:
        prepare(tmp_path, random_log(200), SCHEMA | fields)
    for word in words:
        assert word in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_schema_that_is_no_yaml_or_absent(tmp_path):
    raw, rules = write_log(tmp_path / "raw", random_log(50))
    rules.write_text("a: [1")
    with pytest.raises(InputError, match="YAML"):
        prepare_parquet(raw, tmp_path / "out", rules)
    with pytest.raises(InputError, match="no such schema"):
        prepare_parquet(raw, tmp_path / "out", tmp_path / "other.yaml")


def test_repeated_catalogue_id_is_named(tmp_path):
    schema = SCHEMA | {"catalogue": {"path": "items.parquet"}}
    raw, rules = write_log(tmp_path / "raw", random_log(200), schema)
    pq.write_table(
        pa.table({"item_id": [4, 4], "title": ["a", "b"]}), tmp_path / "raw/items.parquet"
    )
    with pytest.raises(InputError, match="4 stands 2 times"):
        prepare_parquet(raw, tmp_path / "out", rules)


def test_truncated_and_garbage_files_are_named(tmp_path):
    raw, rules = write_log(tmp_path / "raw", random_log())
    whole = raw.read_bytes()
    for content in (whole[: len(whole) // 2], b"not parquet at all", b""):
        raw.write_bytes(content)
        with pytest.raises(InputError, match=r"log\.parquet.*truncated"):
            prepare_parquet(raw, tmp_path / "out", rules)


def test_damaged_page_is_named(tmp_path):
    raw, rules = write_log(tmp_path / "raw", random_log())
    content = bytearray(raw.read_bytes())
    content[4:400] = b"\xff" * 396  # the first pages; the footer stays
    raw.write_bytes(bytes(content))
    with pytest.raises(InputError, match=r"log\.parquet"):
        prepare_parquet(raw, tmp_path / "out", rules)
    assert not (tmp_path / "out").exists()


def test_no_input_at_all(tmp_path):
    (tmp_path / "empty").mkdir()
    _, rules = write_log(tmp_path / "raw", random_log(50))
    with pytest.raises(InputError, match=r"no \*\.parquet"):
        prepare_parquet(tmp_path / "empty", tmp_path / "out", rules)
    with pytest.raises(InputError, match="no such file"):
        prepare_parquet(tmp_path / "absent", tmp_path / "out", rules)


def test_existing_output_is_never_touched(tmp_path):
    out = prepare(tmp_path, random_log(200))
    before = {file: file.read_bytes() for file in out.rglob("*") if file.is_file()}
    with pytest.raises(InputError, match="not empty"):
        prepare(tmp_path, random_log(300))
    assert before == {file: file.read_bytes() for file in out.rglob("*") if file.is_file()}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "raw"]


def test_empty_output_folder_is_used_and_abandoned_work_removed(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / ".out.00000000.llm4msr-tmp/scratch").mkdir(parents=True)  # of a killed command
    living = tmp_path / ".out.11111111.llm4msr-tmp"
    living.mkdir()
    with directory_lock(living):
        prepare(tmp_path, random_log(200))
        assert sorted(path.name for path in tmp_path.iterdir()) == [living.name, "out", "raw"]


def test_of_two_that_write_one_dataset_the_slower_is_told_so(tmp_path, monkeypatch):
    """Both found the place empty; the first to end keeps it."""
    (tmp_path / "first").mkdir()
    first = prepare(tmp_path / "first", random_log(200))

    def write_late(*arguments, **options):
        if not (tmp_path / "out").exists():
            shutil.copytree(first, tmp_path / "out")
        return write_sorted(*arguments, **options)

    monkeypatch.setattr(pipeline, "write_sorted", write_late)
    with pytest.raises(InputError, match="out: another command has written it meanwhile"):
        prepare(tmp_path, random_log(300))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["first", "out", "raw"]
    for file in (tmp_path / "out").rglob("*.parquet"):
        assert file.read_bytes() == (first / file.relative_to(tmp_path / "out")).read_bytes()


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EACCES])
def test_no_space_or_permission_while_writing(tmp_path, monkeypatch, number):
    def fail(*args, **kwargs):
        raise OSError(number, "write failed")

    monkeypatch.setattr(pipeline, "write_sorted", fail)
    with pytest.raises(
        InputError, match="no space left" if number == errno.ENOSPC else "Permission"
    ):
        prepare(tmp_path, random_log(200))
    assert [path.name for path in tmp_path.iterdir()] == ["raw"]


def test_output_below_a_file_is_refused(tmp_path):
    raw, rules = write_log(tmp_path / "raw", random_log(200))
    for out in (raw, raw / "below"):
        with pytest.raises(InputError):
            prepare_parquet(raw, out, rules)
    assert pq.read_table(raw).num_rows == 200


# ---------------------------------------------------------------- checks of a prepared dataset


def test_validate_names_what_is_wrong(tmp_path):
    out = prepare(tmp_path, random_log(300))
    info = open_dataset(out)  # of a dataset from before footers had checksums
    (out / "dataset.json").write_text(info.model_dump_json(exclude={"footers"}))
    part = split_files(out, "train")[0]
    whole, table = part.read_bytes(), pq.read_table(part)
    spoiled = {
        "'label' is missing": table.drop_columns("label"),
        "'label' is int64": table.set_column(4, "label", table["label"].cast(pa.int64())),
        "'extra'": table.append_column("extra", table["label"]),
        "dataset.json says": table.slice(1),
    }
    for words, changed in spoiled.items():
        pq.write_table(changed, part)
        with pytest.raises(InputError, match=words):
            validate_dataset(out)
    part.write_bytes(whole[:-10])
    with pytest.raises(InputError, match=r"train/part-00000\.parquet.*truncated"):
        validate_dataset(out)
    part.unlink()
    with pytest.raises(InputError, match="no part"):
        validate_dataset(out)


def test_open_dataset_refuses_other_versions_and_fields(tmp_path):
    out = prepare(tmp_path, random_log(300))
    file = out / "dataset.json"
    content = json.loads(file.read_text())
    for change, words in (({"format_version": 9}, "format_version is 9"), ({"odd": 1}, "odd")):
        file.write_text(json.dumps(content | change))
        with pytest.raises(InputError, match=words):
            open_dataset(out)
    file.write_text("{")
    with pytest.raises(InputError, match="JSON"):
        open_dataset(out)
    with pytest.raises(InputError, match="not a prepared dataset"):
        open_dataset(tmp_path)
    with pytest.raises(InputError, match="unknown split"):
        split_files(out, "dev")


@pytest.mark.parametrize(
    ("ids", "words"),
    [
        ([1, 10**30], "scenario_id"),
        ([1, -(2**63) - 1], "scenario_id"),
        ([1, "two"], "'two' is not int64"),
        ([1, True], "scenario_id"),
        ([1, 1], "listed twice"),
    ],
)
def test_scenarios_that_no_column_can_hold_are_refused(tmp_path, ids, words):
    out = prepare(tmp_path, random_log())
    file = out / "dataset.json"
    facts = json.loads(file.read_text())
    facts["scenarios"] = [{**facts["scenarios"][0], "scenario_id": value} for value in ids]
    file.write_text(json.dumps(facts))
    with pytest.raises(InputError, match=rf"dataset\.json: .*{words}"):
        validate_dataset(out)
