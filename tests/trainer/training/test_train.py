"""Runs of the whole loop: one process, two processes, killed and resumed, refused."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from torchrec.distributed.types import ShardedTensor

from llm_knowledge.errors import InputError
from tests.helpers.paths import ROOT
from tests.helpers.training_data import make_config, make_inputs, write_config, write_stores
from trainer.checkpoint.directory import checkpoints
from trainer.distributed.process_group import distributed
from trainer.evaluation.metrics import write_evaluation
from trainer.models.meta import standardise
from trainer.run.build import build
from trainer.run.inputs import open_inputs
from trainer.training.loop import train
from trainer.training.run_folder import prepare_folder
from trainer.training.scoring import predict
from trainer.training.validation import histogram_auc

ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return make_inputs(tmp_path_factory.mktemp("train"))


def lines(run: Path, kind: str) -> list[dict]:
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in found if line["kind"] == kind]


def kill_all(word: str) -> None:
    """Kills every process whose command line holds `word`: ranks live in sessions of their own."""
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if word in (process / "cmdline").read_text():
                os.kill(int(process.name), signal.SIGKILL)
        except (FileNotFoundError, ProcessLookupError):
            continue


def command_line(config: Path, processes: int, *words: str) -> list[str]:
    command = [sys.executable, "-m", "launch", "train", "--config", str(config)]
    return [*command, "--processes", str(processes), *words]


@pytest.mark.slow
def test_one_process_writes_a_whole_run(inputs: tuple[Path, Path], tmp_path: Path) -> None:
    config = make_config(*inputs, tmp_path / "run")
    run = train(config)
    names = {path.name for path in run.iterdir()}
    assert names >= {"config.yaml", "versions.json", "plan.txt", "plan.json", "metrics.jsonl"}
    assert names >= {"tensorboard", "checkpoints", "predictions", "summary.json"}
    steps = [line["step"] for line in lines(run, "train")]
    assert steps == list(range(1, 21))  # 640 rows in batches of 64, two epochs
    assert sum(
        line["knowledge_coverage"] for line in lines(run, "train")[:10]
    ) / 10 == pytest.approx(0.5)
    evaluation = write_evaluation(run)
    assert evaluation["overall"]["rows"] == 80
    assert evaluation["overall"]["knowledge_coverage"] == 1.0
    summary = json.loads((run / "summary.json").read_text())
    assert summary["valid_auc"] == max(line["valid_auc"] for line in lines(run, "valid"))


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["auto", "reference"])
def test_the_strategy_of_each_meta_layer_is_kept_with_the_plan(
    inputs: tuple[Path, Path],
    tmp_path: Path,
    strategy: str,
) -> None:
    config = make_config(
        *inputs,
        tmp_path / "run",
        train__epochs=1,
        model__meta__kind="low_rank",
        model__meta__match_layers=["user"],
        model__meta__strategy=strategy,
    )
    plan = (train(config) / "plan.txt").read_text()
    meta = config.model.meta
    layers = [line for line in plan.splitlines() if line.startswith("meta layer ")]
    assert len(layers) == meta.user_layers + meta.scenario_layers + 1
    for line in layers:
        chosen, why = re.search(r": (\w+) \((.*)\)$", line).groups()
        if strategy == "auto":
            assert chosen in ("grouped", "reference")
            assert "knowledge" in why
        else:
            assert (chosen, why) == ("reference", "configured")


@pytest.mark.parametrize("kind", ["low_rank", "gate"])
def test_a_strategy_that_the_device_has_not_is_refused_before_anything_starts(
    inputs: tuple[Path, Path], tmp_path: Path, kind: str
) -> None:
    options = {"model__meta__kind": kind, "model__meta__strategy": "fused"}
    config = make_config(*inputs, tmp_path / "run", **options)
    with pytest.raises(InputError, match=r"model\.meta\.strategy: fused .*CUDA.*; use auto"):
        train(config)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_scoring_again_gives_the_same_predictions(
    inputs: tuple[Path, Path], tmp_path: Path
) -> None:
    run = train(make_config(*inputs, tmp_path / "run"))
    first = pq.read_table(run / "predictions/test")
    assert pq.read_table(predict(run, "test")).equals(first)
    assert len(pq.read_table(predict(run, "valid"))) == 80


@pytest.mark.slow
@pytest.mark.parametrize("backbone", ["shared_bottom", "star"])
def test_llm4msr_starts_where_its_backbone_starts(
    inputs: tuple[Path, Path], tmp_path: Path, backbone: str
) -> None:
    losses = []
    for stores in (None, inputs[1]):
        config = make_config(
            inputs[0],
            stores,
            tmp_path / f"run-{stores is None}",
            model__backbone=backbone,
            model__dropout=0.0,  # masks are drawn after the meta networks' noise
            train__epochs=1,
        )
        losses.append(lines(train(config), "train")[0]["loss"])
    assert losses[0] == losses[1]


@pytest.mark.slow
def test_same_seed_same_run_other_seed_other_run(inputs: tuple[Path, Path], tmp_path: Path) -> None:
    runs = [
        train(make_config(*inputs, tmp_path / name, train__seed=seed))
        for name, seed in (("a", 1), ("b", 1), ("c", 2))
    ]
    a, b, c = ([line["loss"] for line in lines(run, "train")] for run in runs)
    assert a == b
    assert a != c


@pytest.mark.distributed
def test_two_processes(inputs: tuple[Path, Path], tmp_path: Path) -> None:
    """Uneven shares (odd batch sizes), sharded tables, predictions of every row once."""
    config = make_config(*inputs, tmp_path / "run", train__global_batch_size=46, data__streams=2)
    file = write_config(config, tmp_path / "config.yaml")
    done = subprocess.run(
        command_line(file, 2),
        cwd=ROOT,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    run = tmp_path / "run"
    plan = json.loads((run / "plan.json").read_text())
    assert {table["table"] for table in plan} == {
        "user",
        "item",
        "user_knowledge",
        "item_knowledge",
    }
    assert all(
        len(table["bytes_per_rank"]) == 2 and min(table["bytes_per_rank"]) > 0 for table in plan
    )
    assert write_evaluation(run)["overall"]["rows"] == 80
    # One process scores the two processes' checkpoint to the same probabilities.
    table = pq.read_table(run / "predictions/test").sort_by(
        [("user_id", "ascending"), ("timestamp", "ascending")]
    )
    again = pq.read_table(predict(run, "test")).sort_by(
        [("user_id", "ascending"), ("timestamp", "ascending")]
    )
    np.testing.assert_allclose(
        table["prediction"].to_numpy(), again["prediction"].to_numpy(), rtol=1e-5
    )


@pytest.mark.distributed
def test_killed_and_resumed_run_has_the_losses_of_an_undisturbed_one(
    inputs: tuple[Path, Path], tmp_path: Path
) -> None:
    whole, broken = (
        make_config(
            *inputs,
            tmp_path / name,
            train__epochs=30,
            train__eval_every=20,
            train__checkpoint_every=7,
        )
        for name in ("whole", "broken")
    )
    file = write_config(whole, tmp_path / "whole.yaml")
    options = {
        "cwd": ROOT,
        "env": ENVIRONMENT,
        "stdout": subprocess.DEVNULL,
        "stderr": subprocess.DEVNULL,
    }
    subprocess.run(command_line(file, 2), timeout=120, check=True, **options)

    file = write_config(broken, tmp_path / "broken.yaml")
    victim = subprocess.Popen(command_line(file, 2), **options)
    deadline = time.monotonic() + 90
    while (
        not checkpoints(tmp_path / "broken/checkpoints")
        or len(lines(tmp_path / "broken", "train")) < 30
    ):
        assert victim.poll() is None, "finished before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.01)
    kill_all(str(file))
    victim.wait()
    assert not (tmp_path / "broken/summary.json").exists()

    subprocess.run(command_line(file, 2, "--resume"), timeout=120, check=True, **options)
    first, second = (lines(tmp_path / name, "train") for name in ("whole", "broken"))
    assert [line["step"] for line in second] == [line["step"] for line in first]
    assert [line["loss"] for line in second] == pytest.approx(
        [line["loss"] for line in first], rel=1e-6
    )
    tables = [pq.read_table(tmp_path / name / "predictions/test") for name in ("whole", "broken")]
    np.testing.assert_allclose(*(table["prediction"].to_numpy() for table in tables), rtol=1e-5)


@pytest.mark.slow
def test_resuming_a_finished_run_changes_nothing(inputs: tuple[Path, Path], tmp_path: Path) -> None:
    config = make_config(*inputs, tmp_path / "run")
    before = pq.read_table(train(config) / "predictions/test")
    assert pq.read_table(train(config, resume=True) / "predictions/test").equals(before)
    assert len(lines(tmp_path / "run", "train")) == 20


def test_frozen_rows_hold_the_stores_vectors_and_never_move(
    inputs: tuple[Path, Path], tmp_path: Path
) -> None:
    from llm_knowledge.store.reader import KnowledgeStore

    config = make_config(*inputs, tmp_path / "run")
    with distributed(60) as runtime:
        opened = open_inputs(config, runtime)
        run = build(config, runtime, prepare_folder(config, runtime, resume=False), opened)

        def table(level: str) -> torch.Tensor:
            state = run.model.module.knowledge.state_dict()
            sharded: ShardedTensor = state[f"collection.embedding_bags.{level}_knowledge.weight"]
            return sharded.local_shards()[0].tensor.clone()

        before = {level: table(level) for level in ("user", "item")}
        users = table("user")
        store = KnowledgeStore.open(inputs[1] / "user")
        stored = standardise(store.read_vectors(0, store.manifest.rows)).astype(np.float16)
        np.testing.assert_array_equal(users.numpy(), stored)
        ids = run.model.module.sparse.state_dict()["pooled.embedding_bags.user.weight"]
        trained = ids.local_shards()[0].tensor.clone()
        run.model.train()
        events = run.stream(["train"], shuffle=True)
        batches = iter(events.batches())
        for _ in range(3):
            run.pipeline.progress(batches)
        for level, value in before.items():
            assert torch.equal(table(level), value)
        assert not torch.equal(ids.local_shards()[0].tensor, trained)
        states = run.model.fused_optimizer.state_dict()["state"]
        assert {name.split(".")[0] for name, values in states.items() if values} == {"sparse"}


def test_string_ids(tmp_path: Path) -> None:
    data, stores = make_inputs(tmp_path / "inputs", id_type="string")
    run = train(make_config(data, stores, tmp_path / "run", train__epochs=1))
    assert write_evaluation(run)["overall"]["knowledge_coverage"] == 1.0


def test_hashed_ids(inputs: tuple[Path, Path], tmp_path: Path) -> None:
    config = make_config(
        *inputs, tmp_path / "run", tables__ids="hash", tables__hash_rows=50, train__epochs=1
    )
    plan = json.loads((train(config) / "plan.json").read_text())
    assert {t["table"]: t["rows"] for t in plan}["item"] == 50


def test_existing_run_is_not_overwritten(inputs: tuple[Path, Path], tmp_path: Path) -> None:
    config = make_config(*inputs, tmp_path / "run", train__epochs=1)
    train(config)
    with pytest.raises(InputError, match="a run is already there; pass --resume"):
        train(config)
    other = make_config(*inputs, tmp_path / "run", train__epochs=2)
    with pytest.raises(InputError, match="differs from the configuration to resume"):
        train(other, resume=True)


def test_checkpoint_of_other_knowledge_is_refused(
    inputs: tuple[Path, Path], tmp_path: Path
) -> None:
    run = train(make_config(*inputs, tmp_path / "run", train__epochs=1))
    other = write_stores(inputs[0], tmp_path / "other", seed=9)
    with pytest.raises(InputError, match="trained with knowledge"):
        predict(run, "test", [f"knowledge.user={other / 'user'}"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"knowledge__user": "{stores}/item"}, "knowledge.user: .* is a store of level item"),
        ({"knowledge__user": "{stores}/nowhere"}, "nowhere.*no knowledge store"),
        ({"data__path": "{stores}"}, "not a prepared dataset"),
    ],
)
def test_inputs_that_do_not_fit_leave_no_run_behind(
    inputs: tuple[Path, Path], tmp_path: Path, changes: dict[str, str], message: str
) -> None:
    changes = {key: value.format(stores=inputs[1]) for key, value in changes.items()}
    config = make_config(*inputs, tmp_path / "run", **changes)
    with pytest.raises(InputError, match=message):
        train(config)
    assert not (tmp_path / "run").exists()


def test_store_with_keys_of_another_type(inputs: tuple[Path, Path], tmp_path: Path) -> None:
    _, strings = make_inputs(tmp_path / "strings", users=5, id_type="string")
    config = make_config(*inputs, tmp_path / "run", knowledge__user=strings / "user")
    with pytest.raises(InputError, match="has string keys, the dataset's user ids are int64"):
        train(config)


@pytest.mark.distributed
def test_bad_input_on_two_processes_is_one_message_and_exit_code_2(
    inputs: tuple[Path, Path], tmp_path: Path
) -> None:
    config = make_config(*inputs, tmp_path / "run", train__global_batch_size=60)
    file = write_config(config, tmp_path / "config.yaml")
    done = subprocess.run(
        command_line(file, 2),
        cwd=ROOT,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("train.global_batch_size: 60 cannot be split over 8 streams") == 1
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()


def test_output_that_cannot_be_written(inputs: tuple[Path, Path], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    config = make_config(*inputs, tmp_path / "file" / "run")
    with pytest.raises(InputError, match=r"cannot be written or locked \(Not a directory\)"):
        train(config)
    assert (tmp_path / "file").read_text() == "in the way"


def test_histogram_auc() -> None:
    counts = torch.tensor([[2.0, 1.0, 0.0], [1.0, 1.0, 3.0]])
    pairs = [(p, n) for p in [0, 1, 2, 2, 2] for n in [0, 0, 1]]
    expected = np.mean([1.0 if p > n else 0.5 if p == n else 0.0 for p, n in pairs])
    assert histogram_auc(counts.double()) == pytest.approx(expected)
    assert histogram_auc(torch.tensor([[0.0, 0.0], [1.0, 2.0]])) is None
