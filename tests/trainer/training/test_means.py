"""Vectors are read less the mean of their store, which is taken once and kept with the run."""

import json
import shutil
from pathlib import Path

import duckdb
import numpy as np
import pytest
from safetensors.numpy import load_file

from launch.main import main
from llm_knowledge.errors import InputError
from llm_knowledge.store.dated import DatedStores
from llm_knowledge.store.manifest import Cutoff
from llm_knowledge.store.reader import KnowledgeStore
from llm_knowledge.store.spread import mean_vector, spread_of
from llm_knowledge.store.writer import write_store
from tests.helpers.knowledge_data import manifest
from tests.helpers.training_data import DIM, LEVELS, make_config, make_inputs
from trainer.run.means import FILE, prepare_means, read_means
from trainer.training.loop import train
from trainer.training.scoring import predict


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return make_inputs(tmp_path_factory.mktemp("means"))


@pytest.fixture(scope="module")
def trained(inputs: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(make_config(*inputs, tmp_path_factory.mktemp("trained") / "run", train__epochs=1))


def moved(stores: Path, out: Path, by: float) -> Path:
    """The same stores with a constant added to every vector, in float32."""
    for level in LEVELS:
        store = KnowledgeStore.open(stores / level)
        rows = len(store)
        cutoffs = [int(c) for c in store.cutoffs()] if level == "user" else None
        write_store(
            out / level,
            store.manifest.model_copy(update={"dtype": "float32"}),
            store.keys(),
            store.read_vectors(0, rows).astype(np.float32) + by * np.arange(DIM, dtype=np.float32),
            cutoffs=cutoffs,
        )
    return out


def predictions(run: Path) -> np.ndarray:
    with duckdb.connect() as connection:
        query = "SELECT prediction FROM read_parquet(?) ORDER BY user_id, timestamp, item_id"
        files = str(run / "predictions/test/*.parquet")
        return connection.execute(query, [files]).fetchnumpy()["prediction"]


@pytest.mark.slow
def test_a_constant_vector_added_to_a_store_changes_no_score(
    inputs: tuple[Path, Path], tmp_path: Path
) -> None:
    data, stores = inputs
    scores = {}
    for centre in (True, False):
        for by in (0.0, 3.0):
            out = moved(stores, tmp_path / f"{centre}-{by}", by)
            config = make_config(
                data, out, tmp_path / f"run-{centre}-{by}", knowledge__centre=centre
            )
            scores[centre, by] = predictions(train(config))
    np.testing.assert_allclose(scores[True, 0.0], scores[True, 3.0], atol=1e-4)
    assert np.abs(scores[False, 0.0] - scores[False, 3.0]).max() > 1e-3


def test_the_means_are_those_of_the_stores(trained: Path, inputs: tuple[Path, Path]) -> None:
    means = load_file(trained / FILE)
    assert set(means) == set(LEVELS)
    for level in LEVELS:
        vectors = KnowledgeStore.open(inputs[1] / level).read_vectors(0, 99).astype(np.float64)
        np.testing.assert_allclose(means[level], vectors.mean(axis=0), atol=1e-7)


def test_without_its_means_a_run_is_not_scored(trained: Path, tmp_path: Path) -> None:
    run = shutil.copytree(trained, tmp_path / "run")
    before = predictions(run)
    predict(run, "test")
    assert np.array_equal(predictions(run), before)
    (run / FILE).unlink()
    with pytest.raises(InputError, match="was trained with other means"):
        predict(run, "test")
    (run / FILE).write_bytes(b"no tensors")
    with pytest.raises(InputError, match=r"knowledge_means\.safetensors: cannot be read"):
        predict(run, "test")


@pytest.mark.slow
def test_weights_of_another_run_bring_its_means(
    trained: Path, inputs: tuple[Path, Path], tmp_path: Path
) -> None:
    """A refreshed store's own mean is another one; a level that is new gets its own."""
    data, stores = inputs
    refreshed = moved(stores, tmp_path / "refreshed", 0.5)
    further = {"train__start_from": trained, "train__epochs": 1}
    run = train(make_config(data, refreshed, tmp_path / "run", **further))
    before, after = read_means(trained), read_means(run)
    assert all(np.array_equal(before[level], after[level]) for level in LEVELS)
    plain = train(make_config(data, None, tmp_path / "plain", train__epochs=1))
    assert read_means(plain) == {}
    further["train__start_from"] = plain / "checkpoints/step-00000010"
    run = train(make_config(data, stores, tmp_path / "lifted", **further))
    assert all(np.array_equal(before[level], read_means(run)[level]) for level in LEVELS)


def test_a_run_that_is_there_keeps_what_it_has(inputs: tuple[Path, Path], tmp_path: Path) -> None:
    """Those of version 0.1 have no means and read vectors as they are."""
    stores = {level: DatedStores.open(inputs[1] / level) for level in LEVELS}
    (tmp_path / "config.yaml").write_text("a run")
    prepare_means(tmp_path, stores, centre=True, begins_with=None)
    assert not (tmp_path / FILE).exists()
    (tmp_path / "config.yaml").unlink()
    prepare_means(tmp_path, stores, centre=False, begins_with=None)
    assert not (tmp_path / FILE).exists()


def store_of(path: Path, vectors: np.ndarray, cutoff: int | None = None) -> KnowledgeStore:
    about = manifest(
        dim=vectors.shape[1], dtype="float32", cutoff=Cutoff(kind="global", value=cutoff or 0)
    )
    write_store(
        path, about, list(range(len(vectors))), vectors, cutoffs=[cutoff or 0] * len(vectors)
    )
    return KnowledgeStore.open(path)


def test_of_dated_stores_the_oldest_has_the_mean(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    late = store_of(tmp_path / "dated/a", rng.normal(size=(5, 4)).astype(np.float32), cutoff=9)
    early = store_of(tmp_path / "dated/b", rng.normal(size=(5, 4)).astype(np.float32), cutoff=3)
    dated = DatedStores.open(tmp_path / "dated")
    prepare_means(tmp_path, {"user": dated}, centre=True, begins_with=None)
    kept = read_means(tmp_path)["user"]
    assert np.array_equal(kept, mean_vector(early))
    assert not np.allclose(kept, mean_vector(late))


def test_the_spread_of_a_store(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rng = np.random.default_rng(1)
    vectors = (rng.normal(size=(300, 6)) * [1, 1, 1, 1, 1e-9, 1e-9]).astype(np.float32)
    spread = spread_of(store_of(tmp_path / "wide", vectors))
    units = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    cosines = (units @ units.T)[~np.eye(300, dtype=bool)]
    assert spread is not None
    assert spread.mean_cosine == pytest.approx(cosines.mean(), abs=1e-6)
    assert spread.effective_rank == pytest.approx(4, abs=0.1)
    assert not spread.is_alike
    alike = store_of(tmp_path / "alike", vectors + 50)
    assert spread_of(alike).is_alike
    assert spread_of(store_of(tmp_path / "same", np.ones((9, 4), np.float32))).effective_rank == 0
    assert spread_of(store_of(tmp_path / "one", vectors[:1])) is None
    capsys.readouterr()
    assert main(["knowledge", "verify", str(alike.path), str(tmp_path / "wide")]) == 0
    told = capsys.readouterr().err
    assert "alike: two rows have a mean cosine of 1.000" in told
    assert "wide: two rows" not in told
    assert main(["knowledge", "inspect", str(alike.path)]) == 0
    assert "hardly apart until they are centred" in capsys.readouterr().out


def test_the_record_of_a_checkpoint_names_its_means(trained: Path) -> None:
    newest = sorted((trained / "checkpoints").iterdir())[-1]
    about = json.loads((newest / "checkpoint.json").read_text())
    assert len(about["means"]) == 32
