"""Bad input through the command line: exit code 2, one message with the place, nothing damaged."""

import errno
import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from launch.main import main
from llm_knowledge import files
from llm_knowledge.store import writer
from llm_knowledge.store.manifest import file_checksum, read_manifest
from llm_knowledge.store.writer import write_manifest
from tests.helpers.log_data import SCHEMA, random_log, write_log
from tests.helpers.paths import ROOT
from tests.helpers.training_data import make_config, make_inputs, write_config
from trainer.checkpoint import writer as checkpoint_writer
from trainer.data.sources import staging as pipeline

Change = Callable[[pa.Table], pa.Table]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `data` and `knowledge`; never written to by a test."""
    root = tmp_path_factory.mktemp("world")
    make_inputs(root)
    return root


@pytest.fixture
def own(world: Path, tmp_path: Path) -> Path:
    """A copy of the world to spoil, with a configuration that trains on it."""
    root = tmp_path / "own"
    shutil.copytree(world, root)
    config = make_config(root / "data", root / "knowledge", tmp_path / "run", train__epochs=1)
    write_config(config, root / "config.yaml")
    return root


def content(*folders: Path) -> dict[str, bytes]:
    """Every file below the folders, whole."""
    found = [file for folder in folders for file in [folder, *folder.rglob("*")]]
    return {str(file): file.read_bytes() for file in found if file.is_file()}


def refuse(capsys: pytest.CaptureFixture[str], *words: object, says: tuple[str, ...]) -> str:
    """Runs a command that must refuse its input; returns what it said."""
    capsys.readouterr()
    assert main([str(word) for word in words]) == 2
    said = capsys.readouterr().err
    assert said.count("error: ") == 1, said
    # Whatever was said before (a notice that work began) is no second message.
    message = said[said.index("llm4msr: error: ") :]
    assert "Traceback" not in said
    for word in says:
        assert word in message, message
    return message


# ---------------------------------------------------------------- a log to prepare


def cell(name: str, row: int, value: object) -> Callable[[dict], None]:
    def change(log: dict) -> None:
        log[name][row] = value

    return change


def rename(log: dict) -> None:
    log["usr_id"] = log.pop("user_id")


def to_text(log: dict) -> None:
    log["timestamp"] = [str(value) for value in log["timestamp"]]


def nan_label(log: dict) -> None:
    log["label"] = [float(value) for value in log["label"]]
    log["label"][3] = float("nan")


RAW_LOGS: dict[str, tuple[Callable[[dict], object], tuple[str, ...]]] = {
    "renamed column": (rename, ("log.parquet", "'user_id'", "did you mean 'usr_id'")),
    "missing column": (lambda log: log.pop("label"), ("log.parquet", "'label'", "missing")),
    "wrong type": (to_text, ("log.parquet", "'timestamp'", "string", "int64")),
    "user ids of a wrong type": (
        lambda log: log.update(user_id=[float(value) for value in log["user_id"]]),
        ("log.parquet", "'user_id'", "float", "int64 or string"),
    ),
    "NaN label": (nan_label, ("log.parquet", "'label'", "row 4 ", "NaN")),
    "label 2": (cell("label", 5, 2), ("log.parquet", "'label'", "row 6 ", "(2)")),
    "null user": (cell("user_id", 0, None), ("log.parquet", "'user_id'", "row 1 ", "null")),
    "unknown scenario": (
        cell("scenario_id", 2, 9),
        ("log.parquet", "'scenario_id'", "row 3 ", "(9)"),
    ),
}


@pytest.mark.parametrize("case", RAW_LOGS)
def test_log_to_prepare(tmp_path: Path, capsys: pytest.CaptureFixture[str], case: str) -> None:
    change, says = RAW_LOGS[case]
    log = random_log(200)
    change(log)
    raw, schema = write_log(tmp_path / "raw", log)
    before = content(tmp_path)
    refuse(capsys, *prepare_words(raw, schema, tmp_path / "out"), says=says)
    assert content(tmp_path) == before
    assert [path.name for path in tmp_path.iterdir()] == ["raw"]


def prepare_words(raw: Path, schema: Path, out: Path) -> list[object]:
    return ["prepare", "parquet", "--raw", raw, "--schema", schema, "--out", out]


def test_log_with_an_empty_split(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bounds = {"split": {"boundaries": [1_700_000_010, 1_700_000_020, 1_800_000_000]}}
    raw, schema = write_log(tmp_path / "raw", random_log(200), SCHEMA | bounds)
    words = prepare_words(raw, schema, tmp_path / "out")
    refuse(capsys, *words, says=("test split is empty", "1800000000"))
    assert not (tmp_path / "out").exists()


def test_truncated_log_and_schema_typo(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    raw, schema = write_log(tmp_path / "raw", random_log(200))
    words = prepare_words(raw, schema, tmp_path / "out")
    whole = raw.read_bytes()
    raw.write_bytes(whole[: len(whole) // 2])
    refuse(capsys, *words, says=("log.parquet", "truncated"))
    raw.write_bytes(whole)
    schema.write_text(schema.read_text().replace("split:", "splits:"))
    refuse(capsys, *words, says=("schema.yaml", "splits"))
    assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------- a prepared dataset to train on


def with_column(name: str, change: Callable[[list], list], kind: pa.DataType | None = None):
    def apply(table: pa.Table) -> pa.Table:
        place, field = table.schema.get_field_index(name), table.schema.field(name)
        field = field.with_type(kind) if kind else field
        return table.set_column(place, field, pa.array(change(table[name].to_pylist()), field.type))

    return apply


def put(row: int, value: object) -> Callable[[list], list]:
    return lambda values: [*values[:row], value, *values[row + 1 :]]


def renamed(table: pa.Table) -> pa.Table:
    return table.rename_columns(["usr_id", *table.column_names[1:]])


# Split, change, what the message names beside the file.
DATASETS: dict[str, tuple[str, Change, tuple[str, ...]]] = {
    "renamed column": ("train", renamed, ("'user_id'", "missing")),
    "missing column": ("valid", lambda t: t.drop_columns("label"), ("'label'", "missing")),
    "wrong type": ("train", with_column("timestamp", lambda v: v, pa.float64()), ("'timestamp'",)),
    "ids of a wrong type": (
        "train",
        with_column("user_id", lambda v: v, pa.float64()),
        ("'user_id'", "double", "int64"),
    ),
    "item ids of a wrong type": (
        "valid",
        with_column("item_id", lambda v: [float(x) for x in v], pa.float64()),
        ("'item_id'", "double", "int64"),
    ),
    "NaN label": (
        "train",
        with_column("label", put(0, float("nan")), pa.float32()),
        ("'label'", "float", "int8"),
    ),
    "null label": ("train", with_column("label", put(4, None)), ("'label'", "row 5 ", "null")),
    "null user": ("test", with_column("user_id", put(1, None)), ("'user_id'", "row 2 ", "null")),
    "label 2": ("test", with_column("label", put(2, 2)), ("'label'", "row 3 ", "(2)")),
    "label -1": ("valid", with_column("label", put(7, -1)), ("'label'", "row 8 ", "(-1)")),
    "unknown scenario": (
        "train",
        with_column("scenario_id", put(3, "moon")),
        ("'scenario_id'", "row 4 ", "'moon'"),
    ),
    "empty split": ("valid", lambda t: t.slice(0, 0), ("no rows",)),
    "rows lost": ("train", lambda t: t.slice(1), ("dataset.json says",)),
}


@pytest.mark.parametrize("case", DATASETS)
def test_dataset_to_train_on(
    own: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], case: str
) -> None:
    split, change, says = DATASETS[case]
    file = own / "data" / split / "part-00000.parquet"
    pq.write_table(change(pq.read_table(file)), file)
    before = content(own)
    words = ("train", "--config", own / "config.yaml")
    refuse(capsys, *words, says=(str(file.parent), *says))
    assert content(own) == before
    assert not (tmp_path / "run").exists()  # refused before anything was written


def test_damage_that_only_reading_finds(
    own: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("train", "--config", own / "config.yaml", "--set")
    file = own / "data/train/part-00000.parquet"
    whole, table = file.read_bytes(), pq.read_table(file)
    # "grotto" lies between the known scenarios: the statistics do not show it.
    pq.write_table(with_column("scenario_id", put(9, "grotto"))(table), file)
    says = (str(file), "'scenario_id'", "row 10 ", "'grotto'")
    refuse(capsys, *words, f"output={tmp_path / 'one'}", says=says)
    pq.write_table(with_column("history", put(9, None))(table), file)
    says = (str(file), "'history'", "row 10 ", "null")
    refuse(capsys, *words, f"output={tmp_path / 'two'}", says=says)
    file.write_bytes(whole[:4] + b"\xff" * 200 + whole[204:])
    settings = ("tables.ids=hash", "--set", "tables.hash_rows=64", "--set")
    refuse(capsys, *words, *settings, f"output={tmp_path / 'three'}", says=(str(file), "damaged"))


def test_damaged_page_found_by_the_vocabulary(
    own: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = own / "data/train/part-00000.parquet"
    whole = file.read_bytes()
    file.write_bytes(whole[:4] + b"\xff" * 200 + whole[204:])
    refuse(capsys, "train", "--config", own / "config.yaml", says=(str(file),))


def test_truncated_and_absent_files_of_a_dataset(
    own: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("train", "--config", own / "config.yaml")
    file = own / "data/test/part-00000.parquet"
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    refuse(capsys, *words, says=(str(file), "truncated"))
    file.unlink()
    refuse(capsys, *words, says=(str(file.parent), "no part-"))
    file.write_bytes(whole)
    (own / "data/dataset.json").write_text("{")
    refuse(capsys, *words, says=("dataset.json", "JSON"))
    (own / "data/dataset.json").unlink()
    refuse(capsys, *words, says=(str(own / "data"), "not a prepared dataset"))
    extract = ("knowledge", "extract", "--data", own / "data", "--out", tmp_path / "k")
    refuse(capsys, *extract, says=("dataset.json", "not found"))
    assert not (tmp_path / "run").exists()
    assert not (tmp_path / "k").exists()


# ---------------------------------------------------------------- knowledge stores


def rewritten(change: Change) -> Callable[[Path], None]:
    """Changes the rows of the one part and lets the manifest know its new checksum."""

    def apply(store: Path) -> None:
        file = store / "part-00000.parquet"
        pq.write_table(change(pq.read_table(file)), file)
        manifest = read_manifest(store)
        part = manifest.parts[0].model_copy(update={"checksum": file_checksum(file)})
        write_manifest(store, manifest.model_copy(update={"parts": [part]}))

    return apply


def narrow(table: pa.Table) -> pa.Table:
    values = [vector[:8] for vector in table["vector"].to_pylist()]
    field = pa.field("vector", pa.binary(8), metadata={"dim": "4", "dtype": "float16"})
    return table.set_column(
        table.schema.get_field_index("vector"), field, pa.array(values, field.type)
    )


def foreign(table: pa.Table) -> pa.Table:
    return table.replace_schema_metadata({**table.schema.metadata, b"llm_knowledge.job": b"x" * 32})


def again(values: list) -> list:
    return [*values[:2], values[1], *values[3:]]


def unfinished(store: Path) -> None:
    write_manifest(store, read_manifest(store).model_copy(update={"complete": False}))


NAN = np.full(8, np.nan, "<f2").tobytes()
PART = "part-00000.parquet"
STORES: dict[str, tuple[Callable[[Path], object], tuple[str, ...]]] = {
    "another dimension": (rewritten(narrow), (PART, "'vector'", "dim 4", "dim 8")),
    "duplicate keys": (
        rewritten(with_column("key", again)),
        (PART, "row 2", "key 1 ", "duplicate"),
    ),
    "NaN": (rewritten(with_column("vector", put(2, NAN))), (PART, "row 2", "NaN")),
    "another model": (rewritten(foreign), (PART, "row 0", "another model")),
    "missing part": (lambda store: (store / PART).unlink(), (PART, "missing")),
    "no manifest": (lambda store: (store / "manifest.json").unlink(), ("manifest.json",)),
    "half a manifest": (
        lambda store: (store / "manifest.json").write_text('{"format_version": 1'),
        ("manifest.json", "JSON"),
    ),
    "truncated part": (
        lambda store: (store / PART).write_bytes((store / PART).read_bytes()[:300]),
        (PART,),
    ),
    "other rows": (rewritten(lambda table: table.slice(1)), (PART, "rows")),
}


@pytest.mark.parametrize("case", STORES)
def test_store(own: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], case: str) -> None:
    change, says = STORES[case]
    store = own / "knowledge/user"
    change(store)
    before = content(own)
    refuse(capsys, "knowledge", "verify", store, says=(str(store), *says))
    refuse(capsys, "train", "--config", own / "config.yaml", says=(str(store), *says))
    out = tmp_path / "shuffled"
    refuse(capsys, "knowledge", "shuffle", store, "--out", out, says=(str(store), *says))
    assert content(own) == before
    assert not out.exists()
    assert not list(tmp_path.glob(".*"))


def test_store_of_another_level_or_unfinished(
    own: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("train", "--config", own / "config.yaml")
    item = f"knowledge.user={own / 'knowledge/item'}"
    refuse(capsys, *words, "--set", item, says=("knowledge.user", "store of level item"))
    unfinished(own / "knowledge/item")
    refuse(capsys, *words, says=(str(own / "knowledge/item"), "incomplete", "extract"))
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_vectors_of_another_model_never_enter_a_store(
    own: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = own / "knowledge/item"
    before = content(own)
    words = ("knowledge", "extract", "--data", own / "data", "--level", "item", "--out", store)
    refuse(capsys, *words, "--device", "cpu", says=(str(store), "another job", "model"))
    refuse(capsys, *words, "--model", own / "absent", says=("absent", "no such directory"))
    assert content(own) == before


# ---------------------------------------------------------------- configuration


SETTINGS: dict[str, tuple[str, tuple[str, ...]]] = {
    "unknown field": ("train.epcohs=3", ("train.epcohs", "did you mean epochs")),
    "unknown section": ("trian.epochs=3", ("trian", "did you mean train")),
    "wrong type": ("train.epochs=many", ("train.epochs", "integer", "'many'")),
    "text for a number": ("train.epochs='3'", ("train.epochs", "'3'")),
    "out of range": ("train.learning_rate=-1", ("train.learning_rate", "greater than 0", "-1")),
    "no such choice": ("model.backbone=starr", ("model.backbone", "'star'", "'starr'")),
    "impossible combination": ("model.meta.enabled=false", ("knowledge.user", "would be ignored")),
    "no store": ("knowledge.item=null", ("knowledge.item must name a store",)),
    "no value": ("train.epochs", ("--set train.epochs", "section.field=value")),
    "no YAML": ("train.epochs=[1", ("--set train.epochs=[1", "YAML")),
}


@pytest.mark.parametrize("case", SETTINGS)
def test_configuration(
    own: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], case: str
) -> None:
    setting, says = SETTINGS[case]
    refuse(capsys, "train", "--config", own / "config.yaml", "--set", setting, says=says)
    assert not (tmp_path / "run").exists()


OPTIONS: dict[str, tuple[list[str], str]] = {
    "field below a value": (["--set", "name=a", "--set", "name.b=1"], "name"),
    "width of 0": (["--set", "model.hidden=[0]"], "model.hidden"),
    "no processes": (["--processes", "0"], "processes"),
}


@pytest.mark.parametrize("case", OPTIONS)
def test_options(own: Path, capsys: pytest.CaptureFixture[str], case: str) -> None:
    words, says = OPTIONS[case]
    refuse(capsys, "train", "--config", own / "config.yaml", *words, says=(says,))


def test_evaluation_of_a_run_without_checkpoints(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(finished, tmp_path / "run")
    shutil.rmtree(tmp_path / "run/checkpoints")
    refuse(capsys, "evaluate", tmp_path / "run", says=(str(tmp_path / "run"), "checkpoint"))


def test_configuration_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "run.yaml"
    refuse(capsys, "train", "--config", file, says=("run.yaml", "no such file"))
    file.write_text("train: [1")
    refuse(capsys, "train", "--config", file, says=("run.yaml", "YAML", "line 1"))
    file.write_text("- train")
    refuse(capsys, "train", "--config", file, says=("run.yaml", "mapping", "list"))
    file.write_text("name: x")
    refuse(capsys, "train", "--config", file, says=("output: required", "data: required"))


def test_unknown_command_and_option(capsys: pytest.CaptureFixture[str]) -> None:
    for words, says in ((["trian"], "trian"), (["train", "--confg", "x"], "--config")):
        with pytest.raises(SystemExit) as left:
            main(words)
        assert left.value.code == 2
        assert says in capsys.readouterr().err


# ---------------------------------------------------------------- places that cannot be written


def writers(own: Path, run: Path, out: Path) -> dict[str, list[object]]:
    """Every command that writes, with its output at `out`."""
    raw, schema = write_log(own / "raw", random_log(200))
    return {
        "prepare": prepare_words(raw, schema, out),
        "simulate": ["simulate", "--out", out, "--users", 20, "--items", 20, "--events", 2000],
        "extract": [
            "knowledge",
            "extract",
            "--data",
            own / "data",
            "--level",
            "item",
            "--out",
            out,
            "--device",
            "cpu",
            "--no-progress",
        ],
        "shuffle": ["knowledge", "shuffle", own / "knowledge/user", "--out", out],
        "train": ["train", "--config", own / "config.yaml", "--set", f"output={out}"],
        "compare": ["compare", run, run.with_name("run2"), "--samples", 100, "--out", out],
        "report": ["report", run, "--out", out],
    }


COMMANDS = ("prepare", "simulate", "extract", "shuffle", "train", "compare", "report")


@pytest.fixture(scope="module")
def finished(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run without knowledge; another beside it is `run2`."""
    folder = tmp_path_factory.mktemp("finished")
    for name in ("run", "run2"):
        config = make_config(world / "data", None, folder / name, name=name, train__epochs=1)
        file = write_config(config, folder / f"{name}.yaml")
        assert main(["train", "--config", str(file)]) == 0
    return folder / "run"


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("place", ["below a file", "in /proc"])
def test_place_that_cannot_be_written(
    own: Path,
    finished: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    command: str,
    place: str,
) -> None:
    (tmp_path / "file").write_text("precious")
    out = tmp_path / "file/out" if place == "below a file" else Path("/proc/llm4msr-out")
    words = writers(own, finished, out)[command]
    before = content(tmp_path)
    refuse(capsys, *words, says=(str(out.parent),))
    assert content(tmp_path) == before


@pytest.mark.slow
@pytest.mark.parametrize("command", ["prepare", "simulate", "extract", "shuffle", "train"])
def test_place_that_is_taken(
    own: Path, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    out = tmp_path / "taken"
    out.mkdir()
    for name in ("config.yaml", "thesis.txt"):
        (out / name).write_text("precious")
    words = writers(own, finished, out)[command]
    before = content(tmp_path)
    refuse(capsys, *words, says=(str(out),))
    assert content(tmp_path) == before


def no_space(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_no_space(
    own: Path,
    finished: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    command: str,
) -> None:
    out = tmp_path / ("out.html" if command == "report" else "out")
    words = writers(own, finished, out)[command]
    if command in ("compare", "report"):
        out.write_text("the old one")
        monkeypatch.setattr(files, "_sync", no_space)
    monkeypatch.setattr(pipeline, "write_sorted", no_space)
    monkeypatch.setattr(writer.pq, "write_table", no_space)
    monkeypatch.setattr(checkpoint_writer.dcp, "save", no_space)
    before = content(own, finished.parent)
    refuse(capsys, *words, says=(str(out.parent), "o space left"))
    assert content(own, finished.parent) == before
    if command in ("compare", "report"):
        assert out.read_text() == "the old one"
    elif command in ("prepare", "simulate", "shuffle"):
        assert not out.exists()
    assert not list(tmp_path.glob(".*.tmp"))


def test_extraction_continues_after_the_disk_was_full(
    own: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = [str(word) for word in writers(own, tmp_path, tmp_path / "out")["extract"]]
    with monkeypatch.context() as patched:
        patched.setattr(writer.pq, "write_table", no_space)
        refuse(capsys, *words, says=(PART, "No space left"))
    assert not json.loads((tmp_path / "out/manifest.json").read_text())["complete"]
    assert main(words) == 0
    assert main(["knowledge", "verify", str(tmp_path / "out")]) == 0


# ---------------------------------------------------------------- ports and processes


@pytest.fixture
def taken_port(monkeypatch: pytest.MonkeyPatch):
    """The environment of rank 0 of 2 whose rendezvous port another program holds."""
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        held.listen()
        port = held.getsockname()[1]
        for name, value in {
            "RANK": "0",
            "LOCAL_RANK": "0",
            "WORLD_SIZE": "2",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }.items():
            monkeypatch.setenv(name, value)
        yield port


@pytest.mark.parametrize("command", ["extract", "train"])
def test_port_in_use(
    own: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    taken_port: int,
    command: str,
) -> None:
    words = writers(own, tmp_path, tmp_path / "out")[command]
    refuse(capsys, *words, says=(str(taken_port), "in use"))
    assert not (tmp_path / "out").exists()


@pytest.mark.distributed
@pytest.mark.parametrize("command", ["extract", "train"])
def test_two_processes_say_it_once(own: Path, tmp_path: Path, command: str) -> None:
    file = own / "data" / "train" / PART
    pq.write_table(with_column("label", put(4, 7))(pq.read_table(file)), file)
    (own / "data/items.parquet").unlink()
    words = [str(word) for word in writers(own, tmp_path, tmp_path / "out")[command]]
    before = content(own)
    done = subprocess.run(
        [sys.executable, "-m", "launch", *words, "--processes", "2"],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=90,
    )
    assert done.returncode == 2, done.stderr
    says = "row 5 (the first is 1): not 0 or 1 (7)" if command == "train" else "items.parquet"
    assert done.stderr.count("llm4msr: error: ") == 1, done.stderr
    assert says in done.stderr
    assert "Traceback" not in done.stderr
    assert content(own) == before
