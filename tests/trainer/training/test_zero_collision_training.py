"""Zero-collision tables in training: batches in flight, clean rows, reports, resuming, many ranks."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from embeddings.zero_collision.policy import EVICTIONS
from launch.main import main
from llm_knowledge.errors import InputError
from tests.drills.zero_collision_matrix import whole
from tests.helpers.training_data import make_config, make_inputs, write_config
from tests.trainer.training.test_train import ENVIRONMENT, ROOT, lines
from trainer.data.loading.batch import Batch
from trainer.distributed.process_group import distributed
from trainer.observe.metrics_log import RunLog, Window
from trainer.run.build import build
from trainer.run.inputs import open_inputs
from trainer.run.session import Run
from trainer.training.loop import train
from trainer.training.scoring import predict

SMALL = {
    "tables__ids": "zero_collision",
    "tables__zero_collision": "{user_rows: 16, item_rows: 24, eviction_interval: 1}",
    "train__global_batch_size": 16,
    "model__dropout": 0.0,
}
WEIGHTS = {"user": "sparse.pooled.embedding_bags.user", "item": "sparse.sequences.embeddings.item"}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_inputs(tmp_path_factory.mktemp("zero"))[0]


def fresh_run(data: Path, folder: Path, **options: object) -> Run:
    folder.mkdir()
    config = make_config(data, None, folder / "unused", **SMALL | options)
    with distributed(30) as runtime:
        return build(config, runtime, folder, open_inputs(config, runtime))


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["sgd", "rowwise_adagrad"])
def test_evictions_do_not_reach_batches_in_flight(
    data: Path, tmp_path: Path, optimizer: str
) -> None:
    """The pipeline remaps batches ahead; every row must end as if each step had been done alone."""
    with distributed(30):
        ends, ahead = [], 0
        for name in ("pipelined", "alone"):
            run = fresh_run(data, tmp_path / name, tables__optimizer=optimizer)
            run.model.train()
            stream = run.stream(["train"], shuffle=True)
            batches = run.remap_ids(iter(stream.batches()), assign=True)
            for step in range(stream.steps):
                if name == "pipelined":
                    run.pipeline.progress(batches)
                    ahead = max(ahead, int(run.model.module.row_owners._step) - step - 1)
                    continue
                batch: Batch = next(batches)
                run.optimizer.zero_grad()
                loss, _ = run.model(batch)
                loss.backward()
                run.optimizer.step()
            ends.append(whole(run))
        assert ahead >= 1, "nothing was ever in flight"
        assert ends[0]["row_owners.item.tally"][:, EVICTIONS].sum() > 50
        for name, values in ends[0].items():
            np.testing.assert_array_equal(values, ends[1][name], err_msg=name)


@pytest.mark.parametrize("optimizer", ["adagrad", "rowwise_adagrad"])
def test_a_row_that_changes_hands_is_clean(data: Path, tmp_path: Path, optimizer: str) -> None:
    """Vector and accumulators are those that its new id would have had in an untouched table."""
    with distributed(30):
        run = fresh_run(data, tmp_path / "run", tables__optimizer=optimizer)
        owners = run.model.module.row_owners
        run.model.train()
        batches = run.remap_ids(iter(run.stream(["train"], shuffle=True).batches()), assign=True)
        for _ in range(10):
            run.pipeline.progress(batches)
        rows = whole(run)["row_owners.user.keys"]
        accumulators = run.model.fused_optimizer.state_dict()["state"]
        used = {
            table: next(iter(accumulators[f"{name}.weight"].values())).local_shards()[0].tensor
            for table, name in WEIGHTS.items()
        }
        assert (used["user"].reshape(16, -1)[1:].sum(1) > 0).any()
        keys = torch.arange(16, dtype=torch.int64) << 59  # two for each of the eight buckets
        batch = next(iter(run.stream(["train"], shuffle=False).batches()))
        ids = type(batch.ids)(
            ["user", "item", "history"], keys.repeat(3), lengths=torch.ones(48).long()
        )
        remapped, fresh = owners.remap(ids, assign=True)
        owners(fresh)
        after = whole(run)
        assert (rows != after["row_owners.user.keys"]).sum() >= 7
        again = fresh_run(data, tmp_path / "again", tables__optimizer=optimizer)
        again.model.module.row_owners(fresh)
        untouched = whole(again)
        for table, found in zip(WEIGHTS, np.split(remapped.values().numpy(), 3), strict=False):
            given = found[found > 0]
            assert len(given) >= 7
            name = f"{WEIGHTS[table]}.weight"
            np.testing.assert_array_equal(after[name][given], untouched[name][given])
            assert not used[table].reshape(len(after[name]), -1)[given].any()


@pytest.mark.slow
def test_reports_and_unknown_ids(data: Path, tmp_path: Path) -> None:
    rows = "{user_rows: 16, item_rows: 512, eviction_interval: 1}"
    options = SMALL | {"tables__zero_collision": rows, "train__epochs": 1}
    run = train(make_config(data, None, tmp_path / "run", **options))
    last = lines(run, "train")[-1]
    assert last["user_admissions"] - last["user_evictions"] == 15  # row 0 is nobody's
    assert last["user_occupancy"] == 1.0
    assert last["user_evictions"] > 50
    assert last["item_evictions"] == 0
    assert last["item_admissions"] == pytest.approx(last["item_occupancy"] * 511)
    assert last["item_unknown_rate"] == 0.0
    summary = json.loads((run / "summary.json").read_text())["ids"]
    assert 0.4 < summary["user_unknown_rate"] < 0.9  # 40 users, 15 rows
    assert summary["item_unknown_rate"] < 0.2
    assert summary["item_collision_rate"] == 0.0
    first = pq.read_table(run / "predictions/test")
    assert pq.read_table(predict(run, "test")).equals(first)


def test_collisions_of_a_hash_are_counted(data: Path, tmp_path: Path) -> None:
    options = {"tables__ids": "hash", "tables__hash_rows": 11, "train__epochs": 1}
    run = train(make_config(data, None, tmp_path / "run", **options))
    found = json.loads((run / "summary.json").read_text())["ids"]
    assert found["user_collision_rate"] > 0.9  # 40 users in 10 rows
    assert found["user_occupancy"] == 1.0
    whole_table = train(make_config(data, None, tmp_path / "other", train__epochs=1))
    found = json.loads((whole_table / "summary.json").read_text())["ids"]
    assert found["user_collision_rate"] == 0.0


@pytest.mark.slow
def test_a_killed_run_goes_on_with_the_same_rows(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = SMALL | {"train__checkpoint_every": 7, "train__epochs": 1}
    undisturbed = train(make_config(data, None, tmp_path / "whole", **options))

    class PowerCutError(Exception):
        pass

    exchange = RunLog.exchange

    def cut(self: RunLog, step: int, *rest: object) -> Window:
        if step == 18:
            raise PowerCutError
        return exchange(self, step, *rest)  # type: ignore[arg-type]

    config = make_config(data, None, tmp_path / "broken", **options)
    with monkeypatch.context() as patched:
        patched.setattr(RunLog, "exchange", cut)
        with pytest.raises(PowerCutError):
            train(config)
    train(config, resume=True)
    first, second = (
        [(line["loss"], line["user_evictions"]) for line in lines(run, "train")]
        for run in (undisturbed, tmp_path / "broken")
    )
    assert first == second


def test_string_ids(tmp_path: Path) -> None:
    data, _ = make_inputs(tmp_path / "inputs", id_type="string")
    run = train(make_config(data, None, tmp_path / "run", **SMALL | {"train__epochs": 1}))
    last = lines(run, "train")[-1]
    assert last["user_occupancy"] > 0.9
    assert last["user_evictions"] > 20


@pytest.mark.parametrize("kind", ["table_row_wise", "planner"])
def test_shardings_that_cannot_be_cleaned_are_refused(
    data: Path, tmp_path: Path, kind: str
) -> None:
    with pytest.raises(InputError, match=r"sharding.user: .*row_wise, table_wise or column_wise"):
        make_config(data, None, tmp_path, **SMALL, tables__sharding=f"{{user: {kind}}}")


@pytest.mark.slow
@pytest.mark.distributed
def test_every_number_of_ranks_restores_every_other_exactly(tmp_path: Path) -> None:
    """{1, 2, 4} ranks row-wise and 2 column-wise, each from each: owners, vectors, accumulators."""
    command = [sys.executable, "-m", "tests.drills.zero_collision_matrix", str(tmp_path)]
    done = subprocess.run(
        command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {"cells": 16, "wrong": []}


@pytest.mark.slow
def test_a_new_run_starts_with_the_rows_of_another(data: Path, tmp_path: Path) -> None:
    options = SMALL | {"train__epochs": 1}
    first = train(make_config(data, None, tmp_path / "first", **options))
    admitted = json.loads((first / "summary.json").read_text())["ids"]["user_admissions"]
    options |= {"train__start_from": first}
    second = train(make_config(data, None, tmp_path / "second", **options))
    begin = lines(second, "train")[0]
    assert begin["user_admissions"] >= admitted > 15
    options["tables__zero_collision"] = "{user_rows: 32, item_rows: 24}"
    with pytest.raises(InputError, match=r"start_from: .* another tables.zero_collision"):
        train(make_config(data, None, tmp_path / "third", **options))


@pytest.mark.slow
def test_the_profilers_measure_rows_and_not_keys(tmp_path: Path) -> None:
    inputs = make_inputs(tmp_path / "inputs")
    config = write_config(make_config(*inputs, tmp_path / "run", **SMALL), tmp_path / "run.yaml")
    for what in ("train", "embeddings"):
        words = ["profile", what, "--config", str(config), "--rounds", "2", "--warmup", "1"]
        assert main(words) == 0
