"""What version 0.1 wrote to disk, before rooms were moved and files were given new homes, stays readable.

`tests/stored/v0.1.tar.xz` holds a dataset, compressed stores and two runs, made by its `make.sh` with
commit 30755f0; nothing in it is ever written anew by later code.
"""

import json
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from launch.main import main
from tests.helpers.paths import ROOT

ARCHIVE = ROOT / "tests/stored/v0.1.tar.xz"
LEVELS = ("user", "item", "scenario")
KINDS_OF_IDS = ("vocabulary", "zero_collision")
LAST_BUT_ONE, LAST = 60, 76  # the steps whose checkpoints are stored


@pytest.fixture
def stored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The unpacked example, which is also the working directory: its paths are relative."""
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(tmp_path, filter="data")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def predictions(run: Path) -> pa.Table:
    keys = ["user_id", "item_id", "scenario_id", "timestamp"]
    return pq.read_table(run / "predictions/test").sort_by([(key, "ascending") for key in keys])


def losses(run: Path) -> dict[int, float]:
    """Training loss by step."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["loss"] for line in lines if line["kind"] == "train"}


@pytest.mark.parametrize("level", LEVELS)
def test_stores_verify(stored: Path, level: str) -> None:
    assert main(["knowledge", "verify", f"knowledge/{level}"]) == 0


@pytest.mark.parametrize("ids", KINDS_OF_IDS)
def test_a_run_is_evaluated_to_its_stored_predictions(stored: Path, ids: str) -> None:
    run = stored / "runs" / ids
    before = predictions(run)
    overall = json.loads((run / "evaluation.json").read_text())["overall"]
    shutil.rmtree(run / "predictions")
    (run / "evaluation.json").unlink()
    assert main(["evaluate", str(run), "--split", "test"]) == 0
    after = predictions(run)
    assert after.drop_columns("prediction").equals(before.drop_columns("prediction"))
    np.testing.assert_allclose(after["prediction"], before["prediction"], rtol=0, atol=1e-6)
    again = json.loads((run / "evaluation.json").read_text())["overall"]
    for metric in ("rows", "positives", "auc", "gauc", "logloss"):
        assert again[metric] == pytest.approx(overall[metric], abs=1e-6), metric


@pytest.mark.slow
@pytest.mark.parametrize("ids", KINDS_OF_IDS)
def test_a_run_goes_on_from_its_stored_checkpoint_with_the_stored_losses(
    stored: Path, ids: str
) -> None:
    run = stored / "runs" / ids
    before, scored = losses(run), predictions(run)
    shutil.rmtree(run / f"checkpoints/step-{LAST:08d}")
    shutil.rmtree(run / "predictions")
    lines = (run / "metrics.jsonl").read_text().splitlines()
    kept = [line for line in lines if json.loads(line)["step"] <= LAST_BUT_ONE]
    (run / "metrics.jsonl").write_text("".join(f"{line}\n" for line in kept))
    assert main(["train", "--config", f"configs/{ids}.yaml", "--resume"]) == 0
    after = losses(run)
    assert sorted(after) == sorted(before) == list(range(1, LAST + 1))
    for step in before:
        assert after[step] == pytest.approx(before[step], abs=1e-6), f"step {step}"
    np.testing.assert_allclose(
        predictions(run)["prediction"], scored["prediction"], rtol=0, atol=1e-6
    )
