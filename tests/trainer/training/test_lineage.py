"""Stores are joined with the dataset that they were made from, with what was appended to it, and no other."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from llm_knowledge.dataset_files import dataset_fingerprint, dataset_origin
from llm_knowledge.errors import InputError
from llm_knowledge.extraction.config import ExtractConfig
from llm_knowledge.extraction.extract import extract
from llm_knowledge.extraction.refresh import refresh
from llm_knowledge.store.compress import compress
from llm_knowledge.store.manifest import read_manifest
from llm_knowledge.store.reader import KnowledgeStore
from llm_knowledge.store.writer import shuffled_store, write_store
from tests.helpers.knowledge_data import manifest, random_dataset, tiny_encoder
from tests.helpers.training_data import DIM, LEVELS, make_inputs
from trainer.config.run import DataConfig, KnowledgeConfig
from trainer.data.dataset import open_dataset
from trainer.run.stores import check_coverage, check_origin, open_stores


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_encoder(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, model: Path) -> tuple[Path, Path]:
    """A dataset and the stores that were extracted from it."""
    root = tmp_path_factory.mktemp("lineage")
    data = random_dataset(root / "data", users=20)
    extract(extraction(data, root / "knowledge", model, level="all"))
    return data, root / "knowledge"


def extraction(data: Path, out: Path, model: Path, **options: object) -> ExtractConfig:
    fixed = {"model": str(model), "device": "cpu", "progress": False}
    return ExtractConfig(data=data, out=out, **fixed, **options)


def check(data: Path, **knowledge: object) -> None:
    """What a run does with its stores before anything is written."""
    config = KnowledgeConfig.model_validate(
        {name: value if value is True else str(value) for name, value in knowledge.items()}
    )
    stores = open_stores(config, open_dataset(str(data)))
    check_origin(stores, str(data), config.other_dataset, is_main=True)
    check_coverage(stores, DataConfig(path=str(data)), is_main=True)


def appended(data: Path, out: Path) -> Path:
    """The dataset with a day more, as far as its lineage goes."""
    shutil.copytree(data, out)
    about = json.loads((out / "dataset.json").read_text())
    parent = {"fingerprint": dataset_fingerprint(data), "train_parts": 1, "train_rows": 1}
    about["parents"] = [*about.get("parents", []), parent]
    (out / "dataset.json").write_text(json.dumps(about))
    return out


def test_stores_of_another_log_are_refused_unless_asked_for(
    world: tuple[Path, Path], tmp_path: Path
) -> None:
    _, stores = world
    other = random_dataset(tmp_path / "other", users=31, seed=99)  # the same ids
    with pytest.raises(InputError, match=r"knowledge\.user: .* was made from another dataset than"):
        check(other, user=stores / "user")
    check(other, **{level: stores / level for level in LEVELS}, other_dataset=True)


def test_what_was_made_of_a_store_is_of_its_dataset(
    world: tuple[Path, Path], tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A store itself, compressed, refreshed on the data and on later data, its control, dated ones."""
    data, stores = world
    origin = dataset_origin(data)
    later = appended(data, tmp_path / "later")
    assert dataset_origin(later) == origin != dataset_fingerprint(later)
    assert dataset_origin(appended(later, tmp_path / "latest")) == origin
    compress(stores / "user", tmp_path / "small", 4)
    shuffled_store(stores / "user", tmp_path / "shuffled", seed=0)
    options = {"model": str(model), "device": "cpu"}
    refresh(stores / "user", data, tmp_path / "again", **options)
    refresh(stores / "user", later, tmp_path / "refreshed", **options)
    extract(
        extraction(later, tmp_path / "dated", model, level="user", cutoffs=("1005000", "1006000"))
    )
    dated = sorted((tmp_path / "dated").iterdir())
    made = [tmp_path / name for name in ("small", "shuffled", "again", "refreshed")]
    for store in [stores / "user", *made, *dated]:
        assert read_manifest(store).dataset == origin, store
    for path in (data, later):
        for store in (stores / "user", *made, tmp_path / "dated"):
            check(path, user=store)
    assert capsys.readouterr().err == ""


def test_a_store_that_does_not_say_is_warned_of(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, stores = make_inputs(tmp_path)
    check(data, user=stores / "user")
    assert "user does not say which dataset it was made from" in capsys.readouterr().err


def test_where_a_store_is_from_does_not_make_it_another_job() -> None:
    with_origin, without = manifest(dataset="a" * 32), manifest()
    assert with_origin.job == without.job
    assert "dataset" not in without.model_dump_json()


def test_no_common_key_is_refused_and_few_are_warned_of(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`5` and `005`, `item5` and `ITEM5`: nothing joins, and nobody would notice."""
    (tmp_path / "data").mkdir()
    data = random_dataset(tmp_path / "data", users=40, id_type="string")

    def store(name: str, keys: list[str]) -> Path:
        about = manifest(key_type="string", dataset=dataset_origin(data))
        vectors = np.ones((len(keys), DIM), np.float32)
        write_store(tmp_path / name, about, keys, vectors, cutoffs=[0] * len(keys))
        return tmp_path / name

    wrong = store("wrong", [f"KEY-{number:03d}" for number in range(40)])
    with pytest.raises(InputError, match=r"no vector for any of the 40 users .*'KEY-000'.*'key-0"):
        check(data, user=wrong)
    few = store("few", ["key-000", "key-001"])
    assert len(KnowledgeStore.open(few)) == 2
    check(data, user=few)
    assert "knowledge.user: 5.0 % of the first 640 training rows" in capsys.readouterr().err
