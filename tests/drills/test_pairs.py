"""Two commands at once on one directory: pair_drill.py does it."""

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest

from tests.drills.pair_drill import PAIRS
from tests.helpers.paths import ROOT
from tests.trainer.training.test_train import ENVIRONMENT

pytestmark = pytest.mark.slow


def test_of_two_commands_one_writes_and_the_other_is_told_who(tmp_path: Path) -> None:
    seed = random.SystemRandom().randrange(10**6)
    print(f"seed of the pairs: {seed}")  # shown where the test fails
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.drills.pair_drill", str(tmp_path), str(seed)],
        cwd=ROOT,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=290,
    )
    assert done.returncode == 0, f"seed {seed}: {done.stderr}"
    drill = json.loads(done.stdout.splitlines()[-1])
    assert (drill["pairs"], drill["wrong"]) == (PAIRS, []), f"seed {seed}: {drill['wrong']}"
