"""Which files of a folder are read, and columns by their exact names."""

import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from launch.main import main
from llm_knowledge.errors import InputError
from tests.helpers.log_data import SCHEMA, all_rows, logged, random_log, write_log
from trainer.data.sources.append import append_parquet
from trainer.data.sources.parquet_log import prepare_parquet

NAMES = ("user_id", "item_id", "scenario_id", "timestamp", "label")


def rows_of(log: dict) -> list[tuple]:
    return sorted(zip(*(list(log[name]) for name in NAMES), strict=True))


def prepared(out: Path, names: tuple[str, ...] = NAMES) -> list[tuple]:
    return sorted(tuple(row[name] for name in names) for row in all_rows(out))


@pytest.fixture
def folder(tmp_path: Path) -> tuple[Path, Path, dict]:
    """A folder with one part, the schema, and all rows, of which the second half is not written yet."""
    log = random_log(800)
    table = pa.table(log)
    raw = tmp_path / "log"
    raw.mkdir()
    pq.write_table(table.slice(0, 400), raw / "a.parquet")
    _, schema = write_log(tmp_path / "rules", log)
    return raw, schema, log


# ---------------------------------------------------------------- files


@pytest.mark.parametrize(
    "name",
    [
        "b.parquet",
        "b.PARQUET",
        "b.pq",
        "b.parq",
        "b",
        "part-00001",
        "deep/er/b.parquet",
        "day=1/b.snappy.parquet",
    ],
)
def test_parquet_by_any_name_is_read(
    folder: tuple[Path, Path, dict], tmp_path: Path, name: str
) -> None:
    raw, schema, log = folder
    (raw / name).parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(log).slice(400), raw / name)
    with logged() as messages:
        info = prepare_parquet(raw, tmp_path / "out", schema)
    assert prepared(tmp_path / "out") == rows_of(log)
    assert f"{raw}: 800 rows in 2 files" in "\n".join(messages)
    assert info.source == {"kind": "parquet", "files": 2, "rows": 800}


@pytest.mark.parametrize(
    "name",
    [
        ".ipynb_checkpoints/a-checkpoint.parquet",
        "_temporary/0/part.parquet",
        ".part-0.parquet.crc",
        "_SUCCESS",
        ".b.parquet",
        "_b.parquet",
        "x/.hidden/b.parquet",
    ],
)
def test_hidden_and_temporary_names_are_left_out(
    folder: tuple[Path, Path, dict], tmp_path: Path, name: str
) -> None:
    raw, schema, log = folder
    (raw / name).parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(log).slice(400), raw / name)
    prepare_parquet(raw, tmp_path / "out", schema)
    assert prepared(tmp_path / "out") == rows_of(pa.table(log).slice(0, 400).to_pydict())


@pytest.mark.parametrize(
    "name", ["b.csv", "b.CSV", "b.parquet.gz", "x/b.jsonl", "b.parquet.crdownload"]
)
def test_rows_in_another_form_are_refused(
    folder: tuple[Path, Path, dict], tmp_path: Path, name: str
) -> None:
    raw, schema, _ = folder
    (raw / name).parent.mkdir(parents=True, exist_ok=True)
    (raw / name).write_text("user_id,item_id\n1,2\n")
    with pytest.raises(InputError, match=r"is not Parquet, so its rows would be left out \(1 such"):
        prepare_parquet(raw, tmp_path / "out", schema)


def test_other_files_are_named(folder: tuple[Path, Path, dict], tmp_path: Path) -> None:
    raw, schema, _ = folder
    (raw / "README.md").write_text("what this is")
    with logged() as messages:
        prepare_parquet(raw, tmp_path / "out", schema)
    assert "1 files are not Parquet and not read: README.md" in "\n".join(messages)


def test_linked_files_and_folders_are_read_once(
    folder: tuple[Path, Path, dict], tmp_path: Path
) -> None:
    raw, schema, log = folder
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    pq.write_table(pa.table(log).slice(400), elsewhere / "b.parquet")
    (raw / "linked").symlink_to(elsewhere)
    (raw / "again").symlink_to(elsewhere)
    (elsewhere / "up").symlink_to(raw)
    (raw / "same.parquet").symlink_to(raw / "a.parquet")
    with logged() as messages:
        prepare_parquet(raw, tmp_path / "out", schema)
    assert prepared(tmp_path / "out") == rows_of(log)
    assert "same.parquet: is a link to a file that is read already" in "\n".join(messages)
    (raw / "gone.parquet").symlink_to(tmp_path / "nowhere")
    with pytest.raises(InputError, match=r"gone.parquet: no such file"):
        prepare_parquet(raw, tmp_path / "other", schema)


def test_a_folder_of_spark_is_read(folder: tuple[Path, Path, dict], tmp_path: Path) -> None:
    raw, schema, log = folder
    (raw / "a.parquet").unlink()
    spark = raw / "events.parquet"
    spark.mkdir()
    pq.write_table(pa.table(log), spark / "part-00000-1b.c000.snappy.parquet")
    (spark / "_SUCCESS").write_text("")
    (spark / ".part-00000-1b.c000.snappy.parquet.crc").write_text("crc")
    for number, path in enumerate((raw, spark)):
        prepare_parquet(path, tmp_path / f"out-{number}", schema)
        assert prepared(tmp_path / f"out-{number}") == rows_of(log)


@pytest.mark.parametrize("name", ["b.parquet", ""])
def test_a_pipe_is_refused_and_never_waited_for(
    folder: tuple[Path, Path, dict], tmp_path: Path, name: str
) -> None:
    raw, schema, _ = folder
    pipe = raw / name if name else tmp_path / "pipe.parquet"
    os.mkfifo(pipe)
    with pytest.raises(InputError, match="is no regular file"):
        prepare_parquet(raw if name else pipe, tmp_path / "out", schema)
    os.mkfifo(tmp_path / "schema.yaml")
    with pytest.raises(InputError, match="is no regular file"):
        prepare_parquet(raw, tmp_path / "out", tmp_path / "schema.yaml")


# ---------------------------------------------------------------- columns


@pytest.mark.parametrize("role", NAMES)
@pytest.mark.parametrize("place", ["before", "behind"])
def test_the_exactly_named_column_is_read(tmp_path: Path, role: str, place: str) -> None:
    """Its twin differs in case and holds other values, which would pass every check."""
    log = random_log(400)
    wrong = list(log[role])[::-1] if role != "label" else [1 - value for value in log[role]]
    twins = {role.title(): wrong, role.upper(): wrong}
    whole = twins | log if place == "before" else log | twins
    raw, schema = write_log(tmp_path / "raw", whole)
    prepare_parquet(raw, tmp_path / "out", schema)
    assert prepared(tmp_path / "out") == rows_of(log)


def test_exact_names_in_further_labels_catalogue_and_a_new_day(tmp_path: Path) -> None:
    log = random_log(400)
    log["Bought"] = [1 - value for value in log["label"]]
    log["bought"] = list(log["label"])
    items = {
        "ITEM_ID": list(range(60))[::-1],
        "item_id": list(range(60)),
        "Title": ["wrong"] * 60,
        "title": [f"right {n}" for n in range(60)],
        "Tags": [["wrong"]] * 60,
        "tags": [["a"]] * 60,
    }
    rules = SCHEMA | {
        "labels": {"purchase": "bought"},
        "split": {"rule": "global_time"},
        "catalogue": {"path": "items.pq", "categories": "tags"},
    }
    raw, schema = write_log(tmp_path / "raw", log, rules)
    pq.write_table(pa.table(items), tmp_path / "raw/items.pq")
    prepare_parquet(raw, tmp_path / "out", schema)
    later = log | {"timestamp": [time + 1_000 for time in log["timestamp"]]}
    later = {"LABEL": [1 - value for value in log["label"]]} | later
    day, _ = write_log(tmp_path / "day", later, rules)
    append_parquet(day, tmp_path / "out", tmp_path / "next", schema)
    for out, expected in (("out", [log]), ("next", [log, later])):
        assert prepared(tmp_path / out) == sorted(row for part in expected for row in rows_of(part))
        assert all(row["label_purchase"] == row["label"] for row in all_rows(tmp_path / out))
        for item in pq.read_table(tmp_path / out / "items.parquet").to_pylist():
            assert item["title"] == f"right {item['item_id']}"
            assert item["categories"] == ["a"]


def test_parts_may_differ_in_their_other_columns_and_their_order(tmp_path: Path) -> None:
    log = pa.table(random_log(600))
    raw = tmp_path / "log"
    raw.mkdir()
    _, schema = write_log(tmp_path / "rules", random_log(10))
    for number, names in enumerate(
        (log.column_names, log.column_names[::-1], ["label", *NAMES[:4]])
    ):
        part = log.slice(200 * number, 200).select(names)
        if number == 1:
            part = part.add_column(0, "Label", pa.array([7] * 200)).append_column(
                "x", pa.array([[]] * 200)
            )
        pq.write_table(part, raw / f"{number}.parquet")
    prepare_parquet(raw, tmp_path / "out", schema)
    assert prepared(tmp_path / "out") == rows_of(log.to_pydict())


@pytest.mark.parametrize(
    "extra",
    [
        "filename",
        "Filename",
        "file_row_number",
        "number",
        "c0",
        "C1",
        "",
        "second",
        "fraction",
        "raw",
    ],
)
@pytest.mark.parametrize("bad", [False, True])
def test_columns_of_any_name_are_no_hindrance(tmp_path: Path, extra: str, bad: bool) -> None:
    log = {extra: ["x"] * 300} | random_log(300)
    if bad:
        log["label"][123] = 5
    raw, schema = write_log(tmp_path / "raw", log)
    if bad:
        with pytest.raises(
            InputError, match=r"log.parquet: column 'label', row 124 .*not 0 or 1 \(5\)"
        ):
            prepare_parquet(raw, tmp_path / "out", schema)
    else:
        prepare_parquet(raw, tmp_path / "out", schema)
        assert prepared(tmp_path / "out") == rows_of(log)


def test_a_column_that_is_there_twice(tmp_path: Path) -> None:
    log = random_log(300)
    _, schema = write_log(tmp_path / "raw", log)
    names, columns = [*log, "x", "x"], [*log.values(), [1] * 300, [2] * 300]
    file = tmp_path / "twice.parquet"
    pq.write_table(pa.Table.from_arrays([pa.array(c) for c in columns], names=names), file)
    prepare_parquet(file, tmp_path / "out", schema)  # of one that nothing reads
    assert prepared(tmp_path / "out") == rows_of(log)
    names, columns = [*log, "label"], [*log.values(), [1] * 300]
    pq.write_table(pa.Table.from_arrays([pa.array(c) for c in columns], names=names), file)
    with pytest.raises(InputError, match=r"'label' \(for label\) is there 2 times"):
        prepare_parquet(file, tmp_path / "other", schema)


def test_the_bad_row_of_the_right_file_is_named(tmp_path: Path) -> None:
    log = random_log(9_000)
    log["user_id"][7_654] = None
    table, raw = pa.table(log), tmp_path / "log"
    raw.mkdir()
    _, schema = write_log(tmp_path / "rules", random_log(10))
    for number in range(3):
        part = table.slice(3_000 * number, 3_000)
        pq.write_table(part, raw / f"{number}.parquet", row_group_size=500)
    with pytest.raises(
        InputError, match=r"2.parquet: column 'user_id', row 1655 .*null; 1 such rows"
    ):
        prepare_parquet(raw, tmp_path / "out", schema)


# ---------------------------------------------------------------- content that DuckDB cannot read


def test_no_rows(tmp_path: Path) -> None:
    log = pa.table(random_log(10)).slice(0, 0)
    for rule in ("global_time", "per_user_time"):
        raw, schema = write_log(
            tmp_path / rule, log.to_pydict(), SCHEMA | {"split": {"rule": rule}}
        )
        pq.write_table(log, raw)
        with pytest.raises(InputError, match="the log has no rows"):
            prepare_parquet(raw, tmp_path / "out", schema)


def test_invalid_utf8_and_encodings_that_duckdb_does_not_know(tmp_path: Path) -> None:
    log = random_log(300)
    raw, schema = write_log(tmp_path / "raw", log)
    table = pa.table(log)
    pq.write_table(
        table, raw, use_dictionary=False, column_encoding={"item_id": "BYTE_STREAM_SPLIT"}
    )
    with pytest.raises(
        InputError, match=r"log.parquet: DuckDB cannot read it: .*BYTE_STREAM_SPLIT"
    ):
        prepare_parquet(raw, tmp_path / "out", schema)
    bad = np.array([b"ab", b"\xff\xfe"] * 150, dtype=object)
    buffers = pa.array(bad, pa.binary()).buffers()
    text = pa.Array.from_buffers(pa.string(), 300, buffers)
    pq.write_table(table.set_column(0, "user_id", text), raw)
    with pytest.raises(InputError, match=r"log.parquet: DuckDB cannot read it: .*UTF-?8"):
        prepare_parquet(raw, tmp_path / "out", schema)
    assert not (tmp_path / "out").exists()


def test_a_path_that_is_no_text_in_this_locale(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As Python gives it under LC_ALL=C without its UTF-8 mode, or where a name is not UTF-8."""
    raw = str(tmp_path / "l\udcc3\udcb6g.parquet")
    assert main(["prepare", "parquet", "--raw", raw, "--out", str(tmp_path / "out")]) == 2
    assert "is not text in this locale; set LC_ALL=C.UTF-8" in capsys.readouterr().err


def test_errors_of_the_catalogue_name_the_catalogue(tmp_path: Path) -> None:
    rules = SCHEMA | {"catalogue": {"path": "items.parquet"}}
    raw, schema = write_log(tmp_path / "raw", random_log(300), rules)
    items = pa.table({"item_id": pa.array([1, 2**63], pa.uint64()), "title": ["a", "b"]})
    pq.write_table(items, tmp_path / "raw/items.parquet")
    with pytest.raises(InputError, match=r"raw/items.parquet: a value does not fit"):
        prepare_parquet(raw, tmp_path / "out", schema)
