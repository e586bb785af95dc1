"""Several labels per sample: from the log's columns to metrics of each."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from llm_knowledge.errors import InputError
from tests.helpers.log_data import SCHEMA, random_log, write_log
from trainer.config.run import RunConfig, load_config
from trainer.data.dataset import open_dataset, split_files
from trainer.data.sources.append import append_parquet
from trainer.data.sources.parquet_log import prepare_parquet
from trainer.evaluation.metrics import write_evaluation
from trainer.training.loop import train


def labelled_log() -> dict:
    """`bought` is true for even items only, `viewed` for scenario 1: easy to learn, unlike `label`."""
    log = random_log(rows=3_000)
    log["is_buy"] = [int(item % 2 == 0) for item in log["item_id"]]
    log["seen"] = [scenario == 1 for scenario in log["scenario_id"]]
    return log


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("labels")
    labels = {"labels": {"viewed": "seen", "bought": "is_buy"}}
    raw, schema = write_log(folder / "raw", labelled_log(), SCHEMA | labels)
    prepare_parquet(raw, folder / "data", schema)
    return folder / "data"


def config(data: Path, output: Path, **changes: object) -> RunConfig:
    values = {
        "name": "labels",
        "output": output,
        "data.path": data,
        "data.labels": json.dumps({"viewed": 0.5, "bought": 1.0}),
        "tables.dim": 8,
        "model.hidden": [16, 8],
        "train.global_batch_size": 64,
        "train.epochs": 6,
        "train.learning_rate": 0.01,
        "tables.learning_rate": 0.2,
        "model.backbone": "aitm",
    } | {key.replace("__", "."): value for key, value in changes.items()}
    return load_config(None, [f"{key}={value}" for key, value in values.items()])


def test_prepared_events_hold_every_label(data: Path) -> None:
    assert sorted(open_dataset(data).extra_labels) == ["bought", "viewed"]
    for split in ("profile", "train", "valid", "test"):
        rows = pa.concat_tables([pq.read_table(file) for file in split_files(data, split)])
        assert rows["label_bought"].type == pa.int8()
        even = np.array(rows["item_id"].to_pylist()) % 2 == 0
        assert np.array_equal(rows["label_bought"].to_numpy() == 1, even)
        first = np.array(rows["scenario_id"].to_pylist()) == 1
        assert np.array_equal(rows["label_viewed"].to_numpy() == 1, first)


@pytest.mark.slow
@pytest.mark.parametrize("backbone", ["aitm", "mmoe"])
def test_every_label_is_learned_and_measured(data: Path, tmp_path: Path, backbone: str) -> None:
    run = train(config(data, tmp_path / "run", model__backbone=backbone))
    found = write_evaluation(run)
    assert found["labels"]["bought"]["overall"]["auc"] > 0.9
    assert found["labels"]["viewed"]["overall"]["auc"] > 0.9
    assert found["overall"]["auc"] < 0.7  # the first label is noise
    rows = pq.read_table(sorted((run / "predictions" / "test").glob("part-*.parquet"))[0])
    assert {"prediction", "prediction_viewed", "prediction_bought", "label_bought"} <= set(
        rows.column_names
    )


def test_weights_scale_the_loss_of_each_label() -> None:
    from tests.trainer.models.test_model import ROWS, inputs, shapes
    from trainer.config.model import ModelConfig
    from trainer.models.llm4msr import DenseModel

    pooled, sequences, vectors, batch = inputs()
    batch.extra_labels = torch.stack([batch.label, 1 - batch.label], dim=1)
    losses = {}
    for weights in ((1.0, 1.0), (3.0, 1.0), (1.0, 5.0)):
        torch.manual_seed(0)
        sizes = shapes()
        object.__setattr__(sizes, "label_weights", weights)
        dense = DenseModel(ModelConfig(backbone="mmoe", hidden=[8, 6]), sizes, 4).eval()
        loss, found = dense(pooled, sequences, vectors, batch)
        losses[weights] = loss.item()
    own = [
        torch.nn.functional.binary_cross_entropy_with_logits(
            found.extra_logits[:, task], batch.extra_labels[:, task], reduction="sum"
        ).item()
        / ROWS
        for task in range(2)
    ]
    assert losses[3.0, 1.0] - losses[1.0, 1.0] == pytest.approx(2 * own[0], rel=1e-4)
    assert losses[1.0, 5.0] - losses[1.0, 1.0] == pytest.approx(4 * own[1], rel=1e-4)


def test_unknown_label_is_refused_before_anything_starts(data: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no further label .liked. .there: bought, viewed"):
        train(config(data, tmp_path / "run", data__labels=json.dumps({"liked": 1.0})))
    assert not (tmp_path / "run").exists()


def test_label_that_is_not_0_or_1_is_named(tmp_path: Path) -> None:
    log = labelled_log()
    log["is_buy"][7] = 3
    raw, schema = write_log(tmp_path / "raw", log, SCHEMA | {"labels": {"bought": "is_buy"}})
    with pytest.raises(InputError, match=r"column 'is_buy', row 8 .*not 0 or 1 \(3\)"):
        prepare_parquet(raw, tmp_path / "data", schema)
    assert not (tmp_path / "data").exists()


def test_a_new_day_brings_every_label(tmp_path: Path) -> None:
    schema = SCHEMA | {"split": {"rule": "global_time"}, "labels": {"bought": "is_buy"}}
    log = {name: values for name, values in labelled_log().items() if name != "seen"}
    raw, rules = write_log(tmp_path / "raw", log, schema)
    prepare_parquet(raw, tmp_path / "old", rules)
    later = log | {"timestamp": [time + 1_000 for time in log["timestamp"]]}
    day, _ = write_log(tmp_path / "day", later, schema)
    append_parquet(day, tmp_path / "old", tmp_path / "new", rules)
    rows = pa.concat_tables([pq.read_table(file) for file in split_files(tmp_path / "new", "test")])
    even = np.array(rows["item_id"].to_pylist()) % 2 == 0
    assert np.array_equal(rows["label_bought"].to_numpy() == 1, even)
    _, other = write_log(tmp_path / "other", later, schema | {"labels": {"seen": "is_buy"}})
    with pytest.raises(InputError, match="further labels"):
        append_parquet(day, tmp_path / "old", tmp_path / "again", other)
