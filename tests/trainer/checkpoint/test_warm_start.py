"""A new run from another run's checkpoint: rows follow their ids, what is new starts fresh."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from llm_knowledge.errors import InputError
from tests.drills.restore_matrix import whole_state
from tests.helpers.training_data import make_config, make_inputs
from trainer.checkpoint.directory import checkpoints
from trainer.checkpoint.warm_start import warm_start
from trainer.config.run import RunConfig
from trainer.distributed.process_group import distributed
from trainer.run.build import build
from trainer.run.inputs import open_inputs
from trainer.training.loop import train
from trainer.training.run_folder import prepare_folder

USER = "sparse.pooled.embedding_bags.user.weight"
ITEM = "sparse.sequences.embeddings.item.weight"


@pytest.fixture(scope="module")
def days(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """The log of a day with users 0, 2, … 78, that of the next with users 0, 1, … 39, and stores."""
    root = tmp_path_factory.mktemp("days")
    later, stores = make_inputs(root / "inputs")
    earlier = shutil.copytree(later, root / "earlier")
    for file in earlier.glob("*/part-*.parquet"):
        table = pq.read_table(file)
        doubled = pc.multiply(table["user_id"], 2)
        pq.write_table(table.set_column(0, table.schema.field(0), doubled), file)
    return earlier, later, stores


def states(config: RunConfig, start: Path) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """The state of a run before and after it starts from a checkpoint, and what was told."""
    with distributed(60) as runtime:
        opened = open_inputs(config, runtime)
        run = build(config, runtime, prepare_folder(config, runtime, resume=False), opened)
        before = whole_state(run)
        carried = warm_start(run, start)
        return before, whole_state(run), carried.__dict__


def saved_state(config: RunConfig) -> dict[str, Any]:
    """The state of a finished run's best checkpoint."""
    copy = config.model_copy(update={"output": config.output + "-again"})
    return states(copy, Path(config.output))[1]


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["rowwise_adagrad", "adagrad"])
def test_rows_and_accumulators_follow_their_ids(
    days: tuple[Path, Path, Path], tmp_path: Path, optimizer: str
) -> None:
    earlier, later, _ = days
    options = {"tables__optimizer": optimizer, "train__epochs": 1}
    config = make_config(earlier, None, tmp_path / "old", **options)
    old = saved_state_after(config)
    again = make_config(later, None, tmp_path / "new", **options)
    before, after, told = states(again, tmp_path / "old")
    assert told["tables"] == {
        "user": {"carried": 21, "new": 20, "left": 20},
        "item": {"carried": 41, "new": 0, "left": 0},
    }
    assert (told["fresh"], told["left"]) == ([], [])
    for name in (USER, f"accumulator.{USER}"):
        np.testing.assert_array_equal(after[name][0], old[name][0])  # unknown ids
        for user in range(40):
            row = 1 + user
            if user % 2 == 0:  # its row was 1 + user / 2
                np.testing.assert_array_equal(after[name][row], old[name][1 + user // 2])
            else:
                np.testing.assert_array_equal(after[name][row], before[name][row])
    assert np.abs(old[f"accumulator.{USER}"]).max() > 0
    for name in after.keys() - {USER, f"accumulator.{USER}"}:
        np.testing.assert_array_equal(after[name], old[name], err_msg=name)
    assert any(name.endswith("exp_avg") for name in after)


def saved_state_after(config: RunConfig) -> dict[str, Any]:
    """Trains a run and gives the state of its best checkpoint."""
    train(config)
    return saved_state(config)


@pytest.mark.slow
def test_knowledge_that_comes_and_goes_is_named(
    days: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    _, later, stores = days
    train(make_config(later, None, tmp_path / "plain", train__epochs=1))
    richer = make_config(later, stores, tmp_path / "richer", train__epochs=1)
    before, after, told = states(richer, tmp_path / "plain")
    fresh = [name for name in told["fresh"] if name.startswith("model.")]
    assert fresh
    assert all(name.startswith("model.dense.") for name in fresh)
    for name in fresh:
        key = name.removeprefix("model.dense.")
        np.testing.assert_array_equal(after[key], before[key], err_msg=name)
    assert told["left"] == []
    assert any("stores are others" in note for note in told["notes"])

    shutil.rmtree(tmp_path / "richer")
    options = {"train__epochs": 1, "train__start_from": tmp_path / "plain"}
    run = train(make_config(later, stores, tmp_path / "richer", **options))
    assert json.loads((run / "start_from.json").read_text())["fresh"] == told["fresh"]
    plain = make_config(later, None, tmp_path / "plain-again", train__epochs=1)
    gone = states(plain, run)[2]["left"]
    assert {name for name in gone if name.startswith("model.")} == set(fresh)


def test_what_cannot_be_carried_over_is_refused_before_anything_starts(
    days: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    _, later, _ = days
    old = train(make_config(later, None, tmp_path / "old", train__epochs=1))
    cases: list[tuple[dict[str, Any], Path, str]] = [
        ({}, tmp_path / "nowhere", "nowhere: there is no such checkpoint"),
        ({"tables__dim": 8}, old, "table user of .* is 4 wide, tables.dim is 8"),
        ({"tables__ids": "hash", "tables__hash_rows": 41}, old, "tables.ids vocabulary"),
    ]
    for number, (changes, start, message) in enumerate(cases):
        config = make_config(
            later, None, tmp_path / str(number), train__start_from=start, **changes
        )
        with pytest.raises(InputError, match=message):
            train(config)
    assert not (tmp_path / "0").exists()
    newest = checkpoints(old / "checkpoints")[-1]
    alone = shutil.copytree(newest, tmp_path / "alone" / newest.name)
    with pytest.raises(InputError, match=r"parquet is missing; it says which id each row"):
        train(make_config(later, None, tmp_path / "x", train__start_from=alone))
