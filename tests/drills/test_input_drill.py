"""What ranks do to each other when input ends, fails or is picked up again; see input_drill.py."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.paths import ROOT

pytestmark = [pytest.mark.distributed, pytest.mark.slow]


def test_memory_stays_flat_over_a_file_larger_than_the_allowance(tmp_path: Path) -> None:
    """A small copy of the benchmark: the allowance is half of the file."""
    words = f"--folder {tmp_path} --out {tmp_path / 'result.json'} --events 100000"
    words += " --buffer 2048 --group 8192 --gigabytes 0.25 --allowance 120"
    subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "benchmarks.loader_memory", *words.split()],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        check=True,
        timeout=120,
    )
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["file_bytes"] > 1.9 * result["allowance_mb"] * 2**20
    assert result["peak_mb"]["at the end"] - result["peak_mb"]["after a tenth"] < 24, result[
        "peak_mb"
    ]
    assert list(tmp_path.iterdir()) == [tmp_path / "result.json"]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("drill")
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.drills.input_drill", str(folder)],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    return {**json.loads(done.stdout.splitlines()[-1]), "stderr": done.stderr}


def test_killed_run_trains_each_row_once_on_any_number_of_ranks(found: dict[str, Any]) -> None:
    assert found["killed"]["wrong"] == []
    assert found["killed"]["position"] > 13  # in the second epoch, and before what was lost
    assert found["killed"]["lost_steps"] > 0


def test_four_ranks_train_three_rows(found: dict[str, Any]) -> None:
    assert found["few"] == [3, 3, 3]


def test_a_part_that_vanishes_is_one_message_on_all_ranks(found: dict[str, Any]) -> None:
    for case in ("lost", "lost_on_one_rank"):
        one, other = found[case]
        assert one == other, case
        assert one["shared"], case
        assert "data/train/part-00001.parquet: has vanished; put it back" in one["ended"]
    assert found["lost_on_one_rank"][0]["ended"].startswith("rank 1: ")
    assert "Traceback" not in found["stderr"]
