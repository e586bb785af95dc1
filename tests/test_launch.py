"""Stages through torchx."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from launch.cli import main
from tests.training_data import make_config, make_inputs, write_config

ROOT = Path(__file__).parent.parent
pytest.importorskip("torchx")


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("launch")
    run = make_config(*make_inputs(root), root / "run", train__epochs=1)
    return write_config(run, root / "config.yaml")


@pytest.mark.distributed
def test_local_job_trains_on_two_ranks(config: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "launch",
        "launch",
        "train",
        "-j",
        "1x2",
        "--",
        "--config",
        str(config),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    summary = json.loads((config.parent / "run/summary.json").read_text())
    assert summary["world_size"] == 2


def test_dryrun_shows_the_command_and_its_restarts(
    config: Path, capsys: pytest.CaptureFixture
) -> None:
    assert main(["launch", "train", "-j", "2x8", "--dryrun", "--", "--config", str(config)]) == 0
    shown = re.sub(r"'\s+'", "", capsys.readouterr().out)
    assert "--max-restarts 3" in shown
    assert "--nnodes 2 --nproc_per_node 8" in shown
    assert "'TORCH_DISABLE_SHARE_RDZV_TCP_STORE': '1'" in shown


def test_slurm_script(config: Path, capsys: pytest.CaptureFixture) -> None:
    words = [
        "--scheduler",
        "slurm",
        "--cfg",
        "partition=main",
        "-j",
        "2x8",
        "--gpu",
        "8",
        "--dryrun",
    ]
    assert main(["launch", "train", *words, "--", "--config", str(config)]) == 0
    shown = capsys.readouterr().out
    assert "--partition=main" in shown
    assert "--gpus-per-task=8" in shown
    assert str(config) in shown


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--scheduler", "cron"], "--scheduler cron: unknown; torchx has"),
        (["--resource", "toaster"], "--resource toaster: No named resource"),
        (["-j", "many"], "-j many: .*write hosts x processes"),
        (["--cfg", "partition"], "--cfg partition: write it as"),
    ],
)
def test_bad_options_are_refused_before_anything_is_submitted(
    config: Path, capsys: pytest.CaptureFixture, words: list[str], message: str
) -> None:
    assert main(["launch", "train", *words, "--", "--config", str(config)]) == 2
    assert re.search(message, capsys.readouterr().err)


def test_bad_arguments_of_the_stage_are_refused_here(
    config: Path, capsys: pytest.CaptureFixture
) -> None:
    assert main(["launch", "train", "--", "--config", str(config), "--set", "train.sede=1"]) == 2
    assert "did you mean seed?" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stopped:
        main(["launch", "train", "--", "--confg", str(config)])
    assert stopped.value.code == 2


def test_components_are_registered_beside_torchxs_own() -> None:
    from torchx.specs.finder import get_components

    assert {"llm4msr.train", "llm4msr.extract", "dist.ddp"} <= set(get_components())
