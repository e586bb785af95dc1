"""Checkpoints restored on other numbers of ranks and by other shardings."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from llm_knowledge.errors import InputError
from tests.helpers.training_data import make_config, make_inputs, write_config
from tests.trainer.training.test_train import ENVIRONMENT, ROOT, command_line, lines
from trainer.observe.metrics_log import RunLog, Window
from trainer.training.loop import train
from trainer.training.scoring import predict


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return make_inputs(tmp_path_factory.mktemp("restore"))


@pytest.mark.slow
@pytest.mark.distributed
def test_every_layout_restores_every_other_exactly(tmp_path: Path) -> None:
    """Every pair of 13 layouts with two optimizers; see `LAYOUTS`."""
    command = [sys.executable, "-m", "tests.drills.restore_matrix", str(tmp_path)]
    done = subprocess.run(
        command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=400
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {"cells": 338, "wrong": []}


@pytest.mark.distributed
@pytest.mark.parametrize("processes", [2, 4])
def test_a_run_continues_on_another_number_of_ranks(
    inputs: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, processes: int
) -> None:
    """Same losses as undisturbed, so the same rows in every step: none twice, none left out."""
    options = {"train__checkpoint_every": 5, "train__global_batch_size": 32, "model__dropout": 0.0}
    options |= {"model__meta__noise": 0.0, "model__meta__dropout": 0.0}  # drawn per rank
    whole = train(make_config(*inputs, tmp_path / "whole", **options))

    class PowerCutError(Exception):
        pass

    exchange = RunLog.exchange

    def cut(self: RunLog, step: int, *rest: object) -> Window:
        if step == 23:  # in the second epoch, three steps after a checkpoint
            raise PowerCutError
        return exchange(self, step, *rest)  # type: ignore[arg-type]

    config = make_config(*inputs, tmp_path / "broken", **options)
    with monkeypatch.context() as patched:
        patched.setattr(RunLog, "exchange", cut)
        with pytest.raises(PowerCutError):
            train(config)
    file = write_config(config, tmp_path / "broken.yaml")
    done = subprocess.run(
        command_line(file, processes, "--resume"),
        cwd=ROOT,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    first, second = (
        [(line["step"], line["loss"]) for line in lines(run, "train")]
        for run in (whole, tmp_path / "broken")
    )
    assert [step for step, _ in first] == [step for step, _ in second] == list(range(1, 41))
    assert [loss for _, loss in second] == pytest.approx([loss for _, loss in first], rel=1e-4)


@pytest.mark.slow
def test_checkpoint_of_another_model_is_refused(inputs: tuple[Path, Path], tmp_path: Path) -> None:
    run = train(make_config(*inputs, tmp_path / "run", train__epochs=1))
    with pytest.raises(
        InputError, match=r"the model needs .*differs: model.hidden: \[8, 4\], now \[12, 4\]"
    ):
        predict(run, "test", ["model.hidden=[12, 4]"])
    with pytest.raises(InputError, match=r"holds nothing for .*; it belongs to another model"):
        predict(run, "test", ["model.backbone=shared_bottom"])


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["table_wise", "column_wise", "planner"])
def test_shardings_train(inputs: tuple[Path, Path], tmp_path: Path, kind: str) -> None:
    sharding = f"{{user: {kind}, item: {kind}, user_knowledge: {kind}, item_knowledge: row_wise}}"
    config = make_config(*inputs, tmp_path / "run", tables__sharding=sharding, train__epochs=1)
    plan = {
        table["table"]: table for table in json.loads((train(config) / "plan.json").read_text())
    }
    if kind != "planner":
        assert {plan[name]["sharding"] for name in ("user", "item", "user_knowledge")} == {kind}
    assert plan["item_knowledge"]["sharding"] == "row_wise"
    assert sum(plan["user_knowledge"]["bytes_per_rank"]) == 40 * 8 * 2  # rows x dim x float16


@pytest.mark.distributed
@pytest.mark.parametrize("kind", ["table_row_wise", "grid_shard"])
def test_shardings_over_two_hosts(inputs: tuple[Path, Path], tmp_path: Path, kind: str) -> None:
    """Four ranks that take themselves for two hosts of two."""
    config = make_config(
        *inputs, tmp_path / "run", tables__sharding=f"{{user: {kind}}}", train__epochs=1
    )
    file = write_config(config, tmp_path / "config.yaml")
    ranks = []
    for rank in range(4):
        environment = ENVIRONMENT | {
            "RANK": str(rank),
            "WORLD_SIZE": "4",
            "LOCAL_RANK": str(rank % 2),
        }
        environment |= {"LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
        environment |= {"MASTER_PORT": str(29_600 + os.getpid() % 1000)}
        ranks.append(
            subprocess.Popen(
                command_line(file, 1), cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True
            )
        )
    for process in ranks:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
    plan = {table["table"]: table for table in json.loads((tmp_path / "run/plan.json").read_text())}
    assert plan["user"]["sharding"] == kind
