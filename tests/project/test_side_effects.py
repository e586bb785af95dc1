"""Importing a module of ours leaves the process as it was: a command sets things up, an import does not."""

import subprocess
import sys

import pytest

from tests.helpers.paths import ROOT
from tests.project.test_imports import modules

PROGRAM = """
import importlib, logging, sys, warnings
# What the libraries do themselves when imported is not ours.
import torch, torchrec, fbgemm_gpu, torch.distributed.checkpoint, torchrec.distributed.planner
import transformers, pyarrow.parquet, duckdb, matplotlib.pyplot, torch.utils.tensorboard
import torchrec.modules.hash_mc_modules

def state():
    loggers = logging.root.manager.loggerDict
    levels = {name: one.level for name, one in loggers.items() if isinstance(one, logging.Logger)}
    filters = [repr(entry) for entry in warnings.filters]
    return {name: level for name, level in levels.items() if level}, filters, list(logging.root.filters)

before = state()
for name in sys.argv[1:]:
    importlib.import_module(name)
    if state() != before:
        print(name, state(), before)
        sys.exit(1)
"""


@pytest.mark.slow
def test_an_import_changes_no_filter_and_no_logger() -> None:
    names = [
        name
        for name in modules()
        if not name.endswith("__main__") and name != "launch.cluster.components"
    ]
    assert len(names) > 100
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *names],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr
