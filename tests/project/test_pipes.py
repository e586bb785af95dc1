"""What is no regular file is refused wherever a command reads what others wrote: a pipe would never end."""

import os
import tarfile
from pathlib import Path

import pytest

from launch.main import main
from tests.helpers.paths import ROOT

EVALUATE, RESUME = (
    ["evaluate", "runs/vocabulary"],
    ["train", "--config", "configs/vocabulary.yaml", "--resume"],
)
PIPES = {
    "knowledge/user/manifest.json": ["knowledge", "verify", "knowledge/user"],
    "knowledge/user/part-00000.parquet": ["knowledge", "inspect", "knowledge/user"],
    "knowledge/item/part-00000.parquet": EVALUATE,
    "knowledge/item/projection.safetensors": ["knowledge", "verify", "knowledge/item"],
    "data/dataset.json": EVALUATE,
    "data/items.parquet": RESUME,
    "data/test/part-00000.parquet": EVALUATE,
    "data/train/part-00000.parquet": RESUME,
    "runs/vocabulary/predictions/test/part-00000.parquet": [*EVALUATE, "--reuse-predictions"],
    "runs/vocabulary/ids/user.parquet": EVALUATE,
    "runs/vocabulary/data.json": RESUME,
}


@pytest.mark.parametrize("file", PIPES)
@pytest.mark.timeout(60)
def test_a_pipe_is_refused(
    file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    with tarfile.open(ROOT / "tests/stored/v0.1.tar.xz") as archive:
        archive.extractall(tmp_path, filter="data")
    monkeypatch.chdir(tmp_path)
    (tmp_path / file).unlink()
    os.mkfifo(tmp_path / file)
    assert main(PIPES[file]) == 2
    said = capsys.readouterr().err
    assert said.count("llm4msr: error: ") == 1
    assert Path(file).name in said
