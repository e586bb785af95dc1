"""Runs with features: what they learn, how they are scored again, resumed, continued and started from."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from embeddings.tables import Table, pooled_collection
from llm_knowledge.errors import InputError
from tests.helpers.feature_data import prepare_features, raw_log, write_raw
from tests.helpers.paths import ROOT
from tests.helpers.training_data import make_config, write_config
from trainer.config.model import ModelConfig
from trainer.data.loading.row_encoder import collate
from trainer.data.sources.parquet_log import prepare_parquet
from trainer.evaluation.metrics import write_evaluation
from trainer.features.block import FeatureBlocks, FeatureShape
from trainer.features.encoder import IDS, NUMBERS, FeatureEncoder
from trainer.features.encoding import Encoding
from trainer.features.pooling import FieldShape, SequenceShape
from trainer.features.ragged import Ragged
from trainer.features.steps import GAP_ROWS
from trainer.models import BACKBONES
from trainer.models.llm4msr import LLM4MSR
from trainer.models.shapes import Shapes
from trainer.planning.problem import problem_of_config
from trainer.run.hardware import Cluster
from trainer.training.loop import train
from trainer.training.scoring import predict

USE = (
    "{age: {transform: log, scale: standard}, city: {dim: 4}, tags: {pooling: mean}, "
    "words: {pooling: mean, ids: hash, rows: 50}, author: {into: item}, price: {buckets: 4, dim: 12}, "
    "place: {cross: [city, author, scenario]}, clicks: {pooling: attention, dim: 4}}"
)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare_features(tmp_path_factory.mktemp("features"), rows=1_000)


def config_of(data: Path, output: Path, use: str = USE, **changes: object):
    changes = {"features__width": 8, "features__use": use, "train__epochs": 1} | changes
    return make_config(data, None, output, **changes)


def predictions(run: Path) -> np.ndarray:
    return predictions_of(run / "predictions" / "test")


def predictions_of(folder: Path) -> np.ndarray:
    files = sorted(folder.glob("*.parquet"))
    return np.concatenate([pq.read_table(file)["prediction"].to_numpy() for file in files])


@pytest.fixture(scope="module")
def run(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(config_of(data, tmp_path_factory.mktemp("run") / "run"))


def test_a_run_with_every_kind_of_feature_is_scored_again_alike(run: Path) -> None:
    before = predictions(run)
    predict(run, "test")
    assert np.array_equal(predictions(run), before)
    assert write_evaluation(run)["overall"]["rows"] == 100
    last = (run / "metrics.jsonl").read_text().splitlines()[-1]
    assert json.loads(last)["feature_city_unknown_rate"] == 0.0
    description = json.loads(next((run / "checkpoints").glob("*/checkpoint.json")).read_text())
    assert description["features"] == FeatureEncoder.load(run).fingerprint


def test_an_encoder_of_another_run_is_refused(run: Path, data: Path, tmp_path: Path) -> None:
    changed = tmp_path / "run"
    shutil.copytree(run, changed)
    content = json.loads((changed / "features.json").read_text())
    content["features"]["age"]["mean"] += 1.0
    (changed / "features.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match="was trained with another encoder of features"):
        predict(changed, "test")


def test_a_resumed_run_ends_as_an_undisturbed_one(run: Path, data: Path, tmp_path: Path) -> None:
    config = config_of(data, tmp_path / "run", train__checkpoint_every=4, train__keep_checkpoints=9)
    train(config)
    shutil.rmtree(tmp_path / "run" / "predictions")
    kept = tmp_path / "run" / "checkpoints" / "step-00000004"
    for later in (tmp_path / "run" / "checkpoints").glob("step-*"):
        if later != kept:
            shutil.rmtree(later)
    train(config, resume=True)
    assert np.array_equal(predictions(tmp_path / "run"), predictions(run))


def test_a_feature_more_changes_no_score_at_the_start(
    run: Path, data: Path, tmp_path: Path
) -> None:
    # The table of cities moves from the sums to the sequences, which have another width.
    use = USE.replace("{age:", "{device: {cross: [user, city]}, seen: {into: user}, age:")
    changes = {"train__start_from": run, "train__learning_rate": "1.0e-30"}
    frozen = {
        "tables__learning_rate": "1.0e-30",
        "train__weight_decay": 0.0,
        "tables__optimizer": "sgd",
    }
    other = train(config_of(data, tmp_path / "run", use, **changes, **frozen))
    assert predictions(other) == pytest.approx(predictions(run), abs=1e-7)
    carried = json.loads((other / "start_from.json").read_text())
    assert any("feature_device" in name for name in carried["fresh"])
    assert any("sequence_seen" in name for name in carried["fresh"])
    names = carried["fresh"] + carried["left"]
    assert not any(name.endswith("feature_city.weight") for name in names)
    assert carried["tables"]["gap_clicks"]["carried"] == GAP_ROWS
    assert carried["tables"]["feature_city"]["carried"] == 6
    moments = [
        json.loads((one / "features.json").read_text())["features"]["age"] for one in (run, other)
    ]
    assert moments[0] == moments[1]


def test_the_history_can_be_switched_off(data: Path, tmp_path: Path) -> None:
    table = pq.read_table(data / "test" / "part-00000.parquet")
    first = train(config_of(data, tmp_path / "one", features__history=False))
    shutil.copytree(data, tmp_path / "data")
    description = tmp_path / "data" / "dataset.json"
    facts = json.loads(description.read_text()) | {"footers": {}}
    description.write_text(json.dumps(facts))
    for file in (tmp_path / "data").glob("t*/part-*.parquet"):
        rows = pq.read_table(file)
        place = rows.schema.get_field_index("history")
        field = rows.schema.field(place)
        rows = rows.set_column(place, field, pa.array([[]] * len(rows), field.type))
        pq.write_table(rows, file)
    assert any(table["history"].to_pylist())
    second = train(config_of(tmp_path / "data", tmp_path / "two", features__history=False))
    assert np.array_equal(predictions(first), predictions(second))


def test_a_plan_has_the_tables_of_the_run(run: Path) -> None:
    problem = problem_of_config(run / "config.yaml", [], Cluster(1, 2, "cpu"), None, None)
    planned = {table.name: (table.rows, table.dim) for table in problem.tables}
    trained = {
        table["table"]: (table["rows"], table["dim"])
        for table in json.loads((run / "plan.json").read_text())
    }
    assert planned == trained
    assert {"feature_tags", "feature_place", "feature_price", "gap_clicks"} <= set(planned)
    readers = {table.name: table.features for table in problem.tables if table.sequence}
    assert readers["item"] == ("item", "history", "sequence_clicks_item")
    assert readers["feature_author"] == ("feature_author", "sequence_clicks_author")
    assert [table.name for table in problem.tables if table.weighted] == ["feature_tags"]


@pytest.mark.distributed
@pytest.mark.slow
def test_two_ranks_encode_and_shard_alike_and_one_scores_what_they_saved(
    data: Path, tmp_path: Path
) -> None:
    """Beside ids that are given rows while training."""
    changes = {
        "tables__ids": "zero_collision",
        "tables__zero_collision__user_rows": 64,
        "tables__zero_collision__item_rows": 64,
        "data__streams": 2,
        "model__dropout": 0.0,
    }
    alone = train(config_of(data, tmp_path / "alone", **changes))
    config = config_of(data, tmp_path / "two", **changes)
    file = write_config(config, tmp_path / "config.yaml")
    words = [sys.executable, "-m", "launch", "train", "--config", str(file), "--processes", "2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        words, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    encoders = [(run / "features.json").read_bytes() for run in (alone, tmp_path / "two")]
    assert encoders[0] == encoders[1]
    plan = json.loads((tmp_path / "two" / "plan.json").read_text())
    spread = {table["table"]: table["bytes_per_rank"] for table in plan}
    assert min(spread["feature_words"]) > 0 < min(spread["feature_tags"])
    both = sorted(predictions(tmp_path / "two"))
    assert sorted(predictions_of(predict(tmp_path / "two", "test"))) == pytest.approx(both)


# ---------------------------------------------------------------- the planted effect of F1


def test_a_label_of_one_column_is_learnt_with_the_feature_and_chance_without(
    tmp_path: Path,
) -> None:
    log, catalogue = raw_log(2_000, seed=4)
    draw = np.random.default_rng(5)
    age = draw.normal(40, 12, 2_000)
    chance = 1 / (1 + np.exp(-(age - 40) / 3))
    log["age"] = age.tolist()
    log["label"] = (draw.random(2_000) < chance).astype(int).tolist()
    raw, schema = write_raw(tmp_path / "raw", log, catalogue)
    prepare_parquet(raw, tmp_path / "data", schema)
    test = pq.read_table(tmp_path / "data" / "test" / "part-00000.parquet")
    best = auc(test["label"].to_numpy(), test["feature_age"].to_numpy())
    settings = {
        "train__learning_rate": 0.01,
        "train__epochs": 4,
        "train__eval_every": 1_000,
        "train__checkpoint_every": 1_000,
        "features__history": False,
    }
    use = "{age: {scale: standard}}"
    with_age = train(config_of(tmp_path / "data", tmp_path / "with", use, **settings))
    without = train(config_of(tmp_path / "data", tmp_path / "without", "{}", **settings))
    assert auc(test["label"].to_numpy(), predictions(with_age)) > best - 0.01 > 0.9
    assert abs(auc(test["label"].to_numpy(), predictions(without)) - 0.5) < 0.08


def auc(labels: np.ndarray, scores: np.ndarray) -> float:
    order = scores.argsort().argsort() + 1
    positives = labels.sum()
    return (order[labels == 1].sum() - positives * (positives + 1) / 2) / (
        positives * (len(labels) - positives)
    )


# ---------------------------------------------------------------- the model


FEATURES = (
    FeatureShape("city", 4, "features", 5),
    FeatureShape("author", 8, "item", 6, steps=(("sequence_clicks_author", 2.0),)),
    FeatureShape("tags", 8, "features", 6, 2.0, mean=True),
    FeatureShape("age", 2, "user"),
)


SEQUENCES = (
    SequenceShape(
        "clicks",
        "attention",
        "features",
        (
            FieldShape("sequence_clicks_item", 4, "item"),
            FieldShape("sequence_clicks_author", 8, "feature_author", optional=True),
            FieldShape("sequence_clicks_gap", 4),
        ),
    ),
)


def small_batch(encodings: list[Encoding]):
    count = 4
    rows = {
        "user": np.arange(count), "item": np.arange(count), "scenario": np.arange(count) % 2,
        "label": np.array([0, 1, 1, 0], np.float32), "extra_labels": np.zeros((count, 0), np.float32),
        "history": np.zeros((count, 3), np.int64), "history_length": np.array([0, 1, 3, 2]),
        **{f"{level}_knowledge": np.full(count, -1) for level in ("user", "item", "scenario")},
        IDS: np.array([[1, 2], [-1, 3], [0, -1], [4, 5]]),
        "sequence_clicks_item": Ragged(np.array([1, 2, 5]), np.array([2, 0, 1, 0])),
        "sequence_clicks_author": Ragged(
            np.array([3, 0, 0]), np.array([2, 0, 1, 0]), np.array([1, 0, 1], np.float32)
        ),
        "sequence_clicks_gap": Ragged(np.array([4, 9, 2]), np.array([2, 0, 1, 0])),
        NUMBERS: np.array([[1, 0], [0, 1], [2, 0], [-1, 0]], np.float32),
        "feature_tags": Ragged(np.array([1, 2, 3]), np.array([2, 0, 1, 0])),
    }  # fmt: skip
    return collate(rows, count + 1, FeatureEncoder(encodings))


ENCODINGS = [
    Encoding("city", "id", ("feature_city",), rows=5),
    Encoding("author", "id", ("feature_author",), rows=6),
    Encoding("tags", "ids", ("feature_tags",), rows=6),
    Encoding("age", "number", ("feature_age",)),
    Encoding(
        "clicks",
        "sequence",
        tuple(field.key for field in SEQUENCES[0].fields),
        fields=("item", "author", "gap"),
    ),
]


@pytest.mark.parametrize("name", BACKBONES)
def test_every_backbone_takes_features(name: str) -> None:
    torch.manual_seed(0)
    shapes = Shapes(6, 6, 3, 2, features=FEATURES, sequences=SEQUENCES, features_width=8)
    model = LLM4MSR(ModelConfig(backbone=name, hidden=[32, 16], dropout=0.0), shapes, 4, 0.1)
    tables = [model.sparse.pooled, *model.sparse.sequence_collections]
    for table in tables:
        table.to_empty(device="cpu")
        for weight in table.parameters():
            torch.nn.init.normal_(weight)
    batch = small_batch(ENCODINGS)
    loss, found = model(batch)
    loss.backward()
    for name_, weight in model.named_parameters():
        if "feature" in name_ or "gap_" in name_:
            assert weight.grad is not None, name_
            assert weight.grad.abs().sum() > 0, name_
    batch.numbers[0, 0] += 1.0
    changed = model(batch)[1].logits
    assert not torch.equal(changed[0], found.logits[0])
    torch.testing.assert_close(changed[1:], found.logits[1:])
    batch.present[2] = 0.0  # of the third sample's only step
    missing = model(batch)[1].logits
    assert not torch.equal(missing[2], changed[2])
    torch.testing.assert_close(missing[[0, 1, 3]], changed[[0, 1, 3]])


def test_features_are_summed_projections() -> None:
    torch.manual_seed(1)
    features = [FEATURES[0], *FEATURES[2:]]
    blocks = FeatureBlocks(features, dim=4, width=8)
    batch = small_batch(ENCODINGS)
    city, tags = torch.randn(5, 4), torch.randn(5, 8)
    made = blocks({"feature_city": city, "feature_tags": tags}, None, batch.ids, batch.numbers)
    weights = blocks.projections
    divided = tags / torch.tensor([2.0, 1, 1, 1, 1])[:, None]
    wanted = city @ weights["feature_city"].T + divided @ weights["feature_tags"].T
    torch.testing.assert_close(made["features"], wanted)
    torch.testing.assert_close(made["user"], batch.numbers @ weights["feature_age"].T)
    assert list(made) == ["features", "user"]
    assert batch.ids["feature_city"].lengths().tolist() == [1, 0, 1, 1, 0]
    assert batch.ids["feature_city"].values().tolist() == [1, 0, 4]


def test_weights_count_where_they_are_said_to() -> None:
    from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

    table = Table("feature_tags", 3, 4, ("feature_tags",), weighted=True)
    ids = KeyedJaggedTensor(
        ["feature_tags"],
        torch.tensor([1, 2]),
        lengths=torch.tensor([2]),
        weights=torch.tensor([10.0, 100.0]),
    )
    for is_weighted, wanted in ((True, 210.0), (False, 3.0)):
        collection = pooled_collection([table], 0.1, is_weighted)
        assert collection.is_weighted() == is_weighted
        collection.to_empty(device="cpu")
        with torch.no_grad():
            for weight in collection.parameters():
                weight.copy_(torch.arange(3.0)[:, None].expand(3, 4))
        assert collection(ids)["feature_tags"].tolist() == [[wanted] * 4]
