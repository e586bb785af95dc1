"""Evaluating a finished run: on the data that it was trained on, and nothing else of it changes."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from launch.main import main
from llm_knowledge.errors import InputError
from tests.helpers.knowledge_data import random_dataset
from tests.helpers.training_data import make_config, make_inputs
from trainer.config.run import load_config
from trainer.data.loading.loader import EventStream
from trainer.distributed.process_group import Runtime, distributed
from trainer.models.shapes import Predictions
from trainer.run.inputs import open_inputs
from trainer.run.session import Run
from trainer.training import scoring, validation
from trainer.training.loop import train


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Returns (dataset, run)."""
    root = tmp_path_factory.mktemp("trained")
    data, stores = make_inputs(root)
    return data, train(make_config(data, stores, root / "run", train__epochs=1))


@pytest.fixture
def run(trained: tuple[Path, Path], tmp_path: Path) -> Path:
    return shutil.copytree(trained[1], tmp_path / "run")


def evaluate(run: Path, *words: str) -> int:
    return main(["evaluate", str(run), *words])


def evaluated(run: Path) -> dict[str, float]:
    found = json.loads((run / "evaluation.json").read_text())["overall"]
    return {name: found[name] for name in ("rows", "positives", "auc", "gauc", "logloss")}


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(file.relative_to(folder)): file.read_bytes()
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }


@pytest.mark.slow
def test_a_dataset_that_has_moved_is_evaluated_where_it_is(
    trained: tuple[Path, Path], run: Path, tmp_path: Path
) -> None:
    assert evaluate(run) == 0
    before = evaluated(run)
    moved = shutil.copytree(trained[0], tmp_path / "moved")
    hidden = trained[0].rename(tmp_path / "away")
    try:
        for words in ([], ["--reuse-predictions"]):
            (run / "evaluation.json").unlink()
            assert evaluate(run, *words, "--set", f"data.path={moved}") == 0
            assert evaluated(run) == pytest.approx(before)
    finally:
        hidden.rename(trained[0])


def test_predictions_that_are_no_numbers_never_replace_good_ones(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before, score = contents(run), scoring.score

    def spoiled(live: Run, events: EventStream) -> Iterator[Predictions]:
        for number, predictions in enumerate(score(live, events)):
            if number == 1:
                predictions.logits[3] = float("nan")
            yield predictions

    monkeypatch.setattr(scoring, "score", spoiled)
    assert evaluate(run) == 2
    said = capsys.readouterr().err
    assert "rank 0: 1 of " in said
    assert "values of prediction for test are NaN or infinite" in said
    assert contents(run) == before


@pytest.mark.slow
@pytest.mark.parametrize("size", [7, 1_000])
def test_how_many_are_scored_at_once_changes_nothing(run: Path, size: int) -> None:
    assert evaluate(run) == 0
    before = evaluated(run)
    rows = load_config(run / "config.yaml").train.global_batch_size
    steps: list[int] = []
    found = scoring.score

    def score(live: Run, events: EventStream) -> Iterator[Predictions]:
        steps.append(events.steps)
        return found(live, events)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scoring, "score", score)
        assert evaluate(run, "--set", f"train.eval_batch_size={size}") == 0
    assert evaluated(run) == pytest.approx(before, abs=1e-6)
    assert steps == [-(-int(before["rows"]) // size)] != [-(-int(before["rows"]) // rows)]


def test_a_number_that_ranks_cannot_share_is_refused(
    trained: tuple[Path, Path], tmp_path: Path
) -> None:
    config = make_config(trained[0], None, tmp_path / "run", train__eval_batch_size=7)
    with pytest.raises(InputError, match=r"train.eval_batch_size: 7 cannot be split over 2 ranks"):
        open_inputs(config, Runtime(0, 2, 2, torch.device("cpu")))


@pytest.mark.parametrize("words", [[], ["--reuse-predictions"]])
def test_other_data_is_refused_and_the_predictions_stay(
    trained: tuple[Path, Path],
    run: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
) -> None:
    (tmp_path / "other").mkdir()
    other, before = random_dataset(tmp_path / "other", users=40, seed=3), contents(run)
    assert evaluate(run, *words, "--set", f"data.path={other}") == 2
    assert contents(run) == before
    said = capsys.readouterr().err
    assert str(other) in said
    assert f"trained on {trained[0]}" in said


def test_the_plan_stays_that_of_the_training(run: Path) -> None:
    plans = [run / "plan.txt", run / "plan.json"]
    for plan in plans:
        plan.write_text("of 64 ranks")
    assert evaluate(run) == 0
    assert [plan.read_text() for plan in plans] == ["of 64 ranks"] * 2


def exact_auc(logits: np.ndarray, label: np.ndarray) -> float:
    """By the mean ranks of the positives, ties at half."""
    values, place, count = np.unique(logits, return_inverse=True, return_counts=True)
    rank = np.cumsum(count) - (count - 1) / 2
    positives = int(label.sum())
    below = rank[place][label == 1].sum() - positives * (positives + 1) / 2
    assert len(values) > 1
    return below / (positives * (len(label) - positives))


@pytest.mark.parametrize(
    ("rate", "spread"),
    [(2e-5, 0.6), (1.2e-4, 0.4), (0.01, 1.0), (0.3, 2.0), (0.5, 1.0), (0.5, 0.05), (0.98, 1.0)],
)
def test_auc_while_training_is_that_of_the_ranks(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, rate: float, spread: float
) -> None:
    """At any base rate: predictions of rare positives lie close together as probabilities."""
    rng = np.random.default_rng(7)
    rows = 1_000_000
    logits = (np.log(rate / (1 - rate)) + spread * rng.normal(size=rows)).astype(np.float32)
    label = (rng.random(rows) < 1 / (1 + np.exp(-logits))).astype(np.float32)

    def score(run: object, events: object) -> Iterator[Predictions]:
        none = torch.zeros(rows)
        yield Predictions(
            torch.from_numpy(logits), torch.from_numpy(label), torch.ones(rows), none, none, none
        )

    monkeypatch.setattr(validation, "score", score)
    with distributed(60) as runtime:
        run = SimpleNamespace(runtime=runtime, folder=tmp_path)
        measured = validation.measure(run, None)
    assert measured.auc == pytest.approx(exact_auc(logits, label), abs=1e-4)
