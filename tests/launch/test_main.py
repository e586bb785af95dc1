"""The command line itself: options given twice, wrong files, names, signals, examples, exit codes."""

import errno
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from launch.main import main
from launch.parser import build_parser
from tests.helpers.paths import ROOT
from tests.helpers.training_data import make_config, make_inputs, write_config


def parse(*words: str) -> Any:
    return build_parser().parse_args(list(words))


def commands(parser: Any = None, name: str = "") -> dict[str, Any]:
    """Every command by its words."""
    parser = parser or build_parser()
    below = [action for action in parser._actions if isinstance(action.choices, dict)]
    if not below:
        return {name: parser}
    return {
        full: leaf
        for action in below
        for word, part in action.choices.items()
        for full, leaf in commands(part, f"{name} {word}".strip()).items()
    }


# ---------------------------------------------------------------- options given again


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ("config", ["train", "--config", "a", "--config", "b", "c"]),
        (
            "cutoffs",
            [
                "knowledge",
                "extract",
                "--data",
                "d",
                "--out",
                "o",
                "--cutoffs",
                "a",
                "--cutoffs",
                "b",
                "c",
            ],
        ),
        (
            "remove",
            [
                "knowledge",
                "refresh",
                "s",
                "--data",
                "d",
                "--out",
                "o",
                "--remove",
                "a",
                "--remove",
                "b",
                "c",
            ],
        ),
        ("sharding", ["profile", "embeddings", "--sharding", "a", "--sharding", "b", "c"]),
    ],
)
def test_options_of_several_values_keep_all_of_them(option: str, words: list[str]) -> None:
    assert [str(value) for value in getattr(parse(*words), option)] == ["a", "b", "c"]


def test_the_first_value_replaces_the_default() -> None:
    assert parse("profile", "embeddings", "--dim", "8").dim == [8]
    assert parse("profile", "embeddings", "--dim", "8", "--dim", "16", "32").dim == [8, 16, 32]


def test_every_option_of_several_values_adds_up() -> None:
    """No command has an option whose later values replace earlier ones."""
    replacing = [
        (name, action.dest)
        for name, parser in commands().items()
        for action in parser._actions
        if action.option_strings and action.nargs in ("+", "*") and type(action).__name__ != "_Keep"
    ]
    assert replacing == []


def test_a_second_value_of_an_option_of_one_is_refused(capsys: pytest.CaptureFixture) -> None:
    assert parse("simulate", "--out", "a", "--out", "a").out == Path("a")
    with pytest.raises(SystemExit) as stopped:
        parse("simulate", "--out", "a", "--out", "b")
    assert stopped.value.code == 2
    assert "argument --out: given twice, as a and as b; give it once" in capsys.readouterr().err


# ---------------------------------------------------------------- help


@pytest.mark.parametrize("name", list(commands()))
def test_the_example_of_every_command_is_one_line_that_parses(name: str) -> None:
    parser = commands()[name]
    [line] = [line for line in parser.format_help().splitlines() if line.startswith("example: ")]
    words = shlex.split(line.removeprefix("example: llm4msr "))
    end = words.index("--") if "--" in words else len(words)
    options = parse(*words[:end])
    assert words[: len(name.split())] == name.split()
    assert options.log_level == "info"
    if end < len(words):
        parse(options.stage, *words[end + 1 :])


# ---------------------------------------------------------------- wrong input


@pytest.mark.parametrize("content", ["directory", "pipe", "bytes", "brackets", "broken", "twice"])
@pytest.mark.parametrize(
    "words",
    [
        ["train", "--config", "FILE"],
        ["pipeline", "--config", "FILE"],
        ["plan", "--tables", "FILE", "--nodes", "1", "--gpus-per-node", "1"],
        ["plan", "--config", "FILE", "--nodes", "1", "--gpus-per-node", "1"],
        ["prepare", "parquet", "--raw", "RAW", "--out", "OUT", "--schema", "FILE"],
        ["launch", "train", "--job", "FILE", "--", "--config", "CONFIG"],
        ["launch", "train", "--", "--config", "FILE"],
        ["profile", "train", "--config", "FILE"],
    ],
)
def test_a_wrong_file_is_one_message(
    tmp_path: Path, capsys: pytest.CaptureFixture, words: list[str], content: str
) -> None:
    file = tmp_path / "file.yaml"
    if content == "directory":
        file.mkdir()
    elif content == "pipe":
        os.mkfifo(file)  # reading it would wait for a writer for ever
    else:
        file.write_bytes(
            {
                "bytes": b"name: \xff\xfe",
                "brackets": b"[" * 20_000,
                "broken": b"a: [",
                "twice": b"a: 1\na: 2\n",
            }[content]
        )
    config = write_config(make_config(tmp_path / "d", None, tmp_path / "r"), tmp_path / "c.yaml")
    (tmp_path / "raw").mkdir()
    paths = {"FILE": file, "CONFIG": config, "RAW": tmp_path / "raw", "OUT": tmp_path / "out"}
    assert main([str(paths.get(word, word)) for word in words]) == 2
    message = capsys.readouterr().err
    assert message.count("error: ") == 1, message
    assert "file.yaml" in message
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("value", ["[[[", "[" * 5000, '"a\\0b"', "9" * 5000, "{a: 1, a: 2}"])
def test_a_wrong_value_of_set_is_one_message(
    tmp_path: Path, capsys: pytest.CaptureFixture, value: str
) -> None:
    config = write_config(make_config(tmp_path / "d", None, tmp_path / "r"), tmp_path / "c.yaml")
    assert main(["train", "--config", str(config), "--set", f"output={value}"]) == 2
    message = capsys.readouterr().err
    assert message.count("error: ") == 1, message
    assert "output" in message


def test_a_name_that_is_no_text_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    name = os.fsdecode(os.fsencode(tmp_path / "data-") + b"\xff")
    assert main(["simulate", "--out", name]) == 2
    assert "is not text in this locale; set LC_ALL=C.UTF-8" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_name_beyond_the_locale_is_one_message(tmp_path: Path) -> None:
    config = make_config(tmp_path / "dätä", None, tmp_path / "run")
    file = write_config(config, tmp_path / "config.yaml")
    # What Python does by itself under LC_ALL=C, and what it does when told not to.
    for variables in ({}, {"PYTHONUTF8": "0"}):
        done = subprocess.run(
            [sys.executable, "-m", "launch", "train", "--config", str(file)],
            cwd=ROOT,
            env=os.environ | {"LC_ALL": "C"} | variables,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 2, done.stderr
        assert "Traceback" not in done.stderr
        assert done.stderr.count("error: ") == 1, done.stderr
        assert "dataset.json" in done.stderr


@pytest.mark.parametrize(
    "number",
    [
        errno.EMFILE,
        errno.EIO,
        errno.ENAMETOOLONG,
        errno.ENOSPC,
        errno.ELOOP,
        errno.EISDIR,
        errno.ESTALE,
    ],
)
def test_whatever_the_system_says_of_a_file_is_one_message(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise OSError(number, os.strerror(number), str(tmp_path / "file"))

    monkeypatch.setattr("trainer.data.sources.simulate.simulate", fail)
    assert main(["simulate", "--out", str(tmp_path / "out")]) == 2
    message = capsys.readouterr().err
    assert message.startswith(f"llm4msr: error: {tmp_path / 'file'}: {os.strerror(number)}")
    assert message.count("\n") == 1


def test_a_fault_of_a_connection_stays_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise ConnectionResetError(errno.ECONNRESET, "reset")

    monkeypatch.setattr("trainer.data.sources.simulate.simulate", fail)
    with pytest.raises(ConnectionResetError):
        main(["simulate", "--out", "out"])


@pytest.mark.parametrize(
    ("error", "wrong"),
    [
        (MemoryError(), True),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: 9 bytes"), True),
        (RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB"), True),
        (ValueError("array is too big; `arr.size * arr.dtype.itemsize` is larger than"), True),
        (ValueError("a number is no letter"), False),
        (RuntimeError("a matrix of 3 x 4 does not fit"), False),
    ],
)
def test_a_machine_that_is_too_small_is_no_fault_of_ours(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    error: Exception,
    wrong: bool,
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr("trainer.data.sources.simulate.simulate", fail)
    if not wrong:
        with pytest.raises(type(error)):
            main(["simulate", "--out", "out"])
        return
    assert main(["simulate", "--out", "out"]) == 2
    assert "out of memory" in capsys.readouterr().err


def test_a_reader_that_leaves_is_no_fault() -> None:
    line = (
        f"{shlex.quote(sys.executable)} -m launch --help; {shlex.quote(sys.executable)} -m launch"
    )
    shell = f"set -o pipefail; ({line} plan --tables launch/configs/hundred_tables.yaml --nodes 2 "
    shell += "--gpus-per-node 2) | true"
    done = subprocess.run(["bash", "-c", shell], cwd=ROOT, capture_output=True, text=True)
    assert "Traceback" not in done.stderr


# ---------------------------------------------------------------- signals


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_a_training_that_is_interrupted_says_how_it_goes_on(tmp_path: Path, number: int) -> None:
    config = make_config(
        *make_inputs(tmp_path), tmp_path / "run", train__epochs=10_000, train__eval_every=100_000
    )
    file = write_config(config, tmp_path / "config.yaml")
    with (tmp_path / "said").open("w") as said:
        training = subprocess.Popen(
            [sys.executable, "-m", "launch", "train", "--config", str(file)],
            cwd=ROOT,
            stdout=said,
            stderr=said,
            # Under nohup, or in a shell's background, tests would hand on that the signal is ignored,
            # which training respects.
            preexec_fn=lambda: signal.signal(number, signal.SIG_DFL),
        )
    metrics, ends = tmp_path / "run/metrics.jsonl", time.monotonic() + 100
    while not (metrics.exists() and metrics.read_text().count("\n") > 2):
        assert training.poll() is None, (tmp_path / "said").read_text()
        assert time.monotonic() < ends
        time.sleep(0.1)
    training.send_signal(number)
    try:
        code = training.wait(timeout=60)
    finally:
        training.kill()
    message = (tmp_path / "said").read_text()
    assert "Traceback" not in message
    assert "--resume goes on from" in message
    if number == signal.SIGHUP:
        assert code == 143
        [step] = (tmp_path / "run/checkpoints").glob("step-*")
        assert json.loads((step / "checkpoint.json").read_text())
    else:
        assert code == 130
