"""Names of folders are only names: neither patterns that match others, nor columns."""

import json
from pathlib import Path
from typing import Any

import pytest

import llm_knowledge.profiles.engines as engines
from tests.helpers.evaluation_data import make_dataset, make_run, noisy_truth
from tests.helpers.knowledge_data import random_dataset
from tests.helpers.training_data import make_config
from tests.llm_knowledge.profiles.test_engines import rows, spark
from tests.trainer.report.test_report import make_store
from trainer.evaluation.metrics import write_evaluation
from trainer.evaluation.predictions import read_run
from trainer.report.knowledge import draw_map
from trainer.run.id_tables import collision_rates

# A folder, and the sibling that it would be taken for if its name were a pattern.
NAMES = [("a[1]", "a1"), ("timestamp=5/user_id=7/scenario_id=x", "other")]
folders = pytest.mark.parametrize(("name", "sibling"), NAMES)
engine_of = pytest.mark.parametrize(
    "engine", ["duckdb", pytest.param("spark", marks=[spark, pytest.mark.slow])]
)


def dataset(folder: Path, seed: int = 0) -> Path:
    folder.mkdir(parents=True)
    return random_dataset(folder, users=10 + seed, seed=seed)


@folders
@engine_of
def test_profiles_are_those_of_the_folder(
    tmp_path: Path, name: str, sibling: str, engine: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, odd = dataset(tmp_path / "plain"), dataset(tmp_path / name)
    dataset(tmp_path / sibling, seed=1)
    options: dict[str, Any] = {"engine": engine, "threads": 1}
    for level in ("user", "item", "scenario"):
        cutoff = 1_002_500 if level == "user" else None
        wanted = rows(plain, level, plain, cutoff=cutoff, **options)
        assert rows(odd, level, odd, cutoff=cutoff, **options) == wanted, level
    monkeypatch.setattr(engines, "BUCKET_EVENTS", 20)  # what spills lies in such a folder, too
    assert rows(odd, "user", odd, **options) == rows(plain, "user", plain, **options)


def evaluated(folder: Path, seed: int = 0) -> tuple[dict[str, Any], Any]:
    """What metrics and the report's map read of a dataset and a run in this folder."""
    data = make_dataset(folder / "data", seed=seed)
    users = list(range(40))
    make_store(folder / "users", "user", users, ["a prompt"] * len(users))
    knowledge = {"user": str(folder / "users")}
    run = make_run(folder / "run", data, noisy_truth(data, 0.1, seed), "star", seed, knowledge)
    about = {"scenarios": [{"scenario_id": name} for name in ("comedy", "drama")]}
    write_evaluation(run)
    # Threads add numbers in any order: the last digits differ.
    numbers = json.loads(
        (run / "evaluation.json").read_text(), parse_float=lambda text: round(float(text), 9)
    )
    return numbers, draw_map(read_run(run), about)


@pytest.mark.slow
@folders
def test_metrics_and_reports_are_those_of_the_folder(
    tmp_path: Path, name: str, sibling: str
) -> None:
    other = evaluated(tmp_path / sibling, seed=1)
    plain = evaluated(tmp_path / "plain")
    assert plain[0] != other[0]
    assert plain[1] != other[1]
    assert evaluated(tmp_path / name) == plain


@folders
def test_ids_are_those_of_the_folder(tmp_path: Path, name: str, sibling: str) -> None:
    found = []
    for folder in (sibling, "plain", name):
        data = dataset(tmp_path / folder, seed=int(folder == sibling))
        config = make_config(data, None, tmp_path, tables__ids="hash", tables__hash_rows=30)
        found.append(collision_rates(config.tables.hash_rows, config.data))
    other, plain, odd = found
    assert odd == plain != other
