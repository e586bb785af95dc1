"""Which evaluation is the best: by a named rule, also where the valid split defines no AUC."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.helpers.paths import ROOT
from tests.helpers.training_data import make_config, make_inputs, write_config
from trainer.checkpoint.directory import checkpoints, read_state
from trainer.checkpoint.loop_state import LoopState
from trainer.evaluation.metrics import write_evaluation
from trainer.training import loop
from trainer.training.loop import train
from trainer.training.scoring import predict
from trainer.training.validation import Evaluation, grouped_auc


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return make_inputs(tmp_path_factory.mktemp("selection"))


@pytest.fixture(scope="module")
def one_class(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Inputs whose valid rows are all positive."""
    data, stores = make_inputs(tmp_path_factory.mktemp("one-class"))
    for part in data.glob("valid/*.parquet"):
        table = pq.read_table(part)
        label = pa.array(np.ones(len(table)), table.schema.field("label").type)
        index = table.schema.get_field_index("label")
        pq.write_table(table.set_column(index, table.schema.field("label"), label), part)
    return data, stores


def lines(run: Path) -> list[dict]:
    written = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in written if line["kind"] == "valid"]


@pytest.mark.parametrize(("eval_every", "checkpoint_every"), [(5, 20), (5, 5), (6, 4)])
def test_one_class_is_chosen_by_logloss(
    one_class: tuple[Path, Path], tmp_path: Path, eval_every: int, checkpoint_every: int
) -> None:
    """Evaluations between checkpoints, with them, and beside them."""
    config = make_config(
        *one_class,
        tmp_path / "run",
        train__eval_every=eval_every,
        train__checkpoint_every=checkpoint_every,
        train__patience=2,
        train__keep_checkpoints=99,
        tables__learning_rate=1e-3,
    )
    run = train(config)
    summary = json.loads((run / "summary.json").read_text())
    evaluations = lines(run)
    assert [line["valid_auc"] for line in evaluations] == [None] * len(evaluations)
    best = min(evaluations, key=lambda line: line["valid_logloss"])
    assert (summary["selected_by"], summary["best_step"]) == ("logloss", best["step"])
    assert summary["valid_auc"] is summary["valid_normalised_entropy"] is None
    # The logloss falls from the first to the last: patience does not end it.
    assert best["step"] == summary["steps"] == 20
    assert f"step-{best['step']:08d}" in [path.name for path in checkpoints(run / "checkpoints")]


def test_stopped_before_its_first_evaluation_a_run_is_scored_by_its_newest_step(
    inputs: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config(*inputs, tmp_path / "run", train__eval_every=15, train__checkpoint_every=4)

    def stopped(*_: object) -> bool:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(loop.Loop, "_evaluate", stopped)
        with pytest.raises(KeyboardInterrupt):
            train(config)
    assert predict(tmp_path / "run", "test").is_dir()


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.distributed)])
def test_gauc_chooses_and_is_what_evaluation_finds(
    inputs: tuple[Path, Path], tmp_path: Path, processes: int
) -> None:
    config = make_config(*inputs, tmp_path / "run", train__select_by="gauc", train__eval_every=3)
    if processes == 1:
        run = train(config)
    else:
        command = [sys.executable, "-m", "launch", "train", "--processes", "2", "--config"]
        command.append(str(write_config(config, tmp_path / "run.yaml")))
        subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=120)
        run = tmp_path / "run"
    summary = json.loads((run / "summary.json").read_text())
    best = max(lines(run), key=lambda line: line["valid_gauc"])
    assert (summary["selected_by"], summary["best_step"]) == ("gauc", best["step"])
    predict(run, "valid")
    overall = write_evaluation(run, "valid")["overall"]
    assert best["valid_gauc"] == pytest.approx(overall["gauc"], abs=1e-9)
    assert best["valid_auc"] == pytest.approx(overall["auc"], abs=1e-3)
    assert best["valid_normalised_entropy"] == pytest.approx(overall["ne"], rel=1e-5)


def test_each_rule_takes_its_own_best() -> None:
    evaluation = Evaluation(0.5, 0.9, auc=0.7, gauc=0.6)
    assert evaluation.criterion("auc") == ("auc", 0.7)
    assert evaluation.criterion("gauc") == ("gauc", 0.6)
    assert evaluation.criterion("logloss") == ("logloss", -0.5)
    # No user has both classes: the whole split may have them all the same.
    assert Evaluation(0.5, 0.9, auc=0.7).criterion("gauc") == ("logloss", -0.5)
    assert Evaluation(0.5, None).criterion("auc") == ("logloss", -0.5)


def test_the_state_keeps_the_best_and_what_it_was() -> None:
    state = LoopState()
    for step, score in [(1, -0.7), (2, -0.9), (3, -0.5), (4, -0.6)]:
        state.count_step(step - 1, 10)
        state.record_evaluation(("logloss", score), 0.6, 1.0 + step)
    assert (state.best_step, state.best_score, state.best_by) == (3, -0.5, "logloss")
    assert (state.best_normalised_entropy, state.evaluations_without_gain) == (4.0, 1)


def test_worse_than_a_constant_is_said(
    inputs: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # The AUC may be best at the first evaluation, so there is one, at the end.
    rates = ("train__learning_rate", "train__meta_learning_rate", "tables__learning_rate")
    steps = dict.fromkeys(rates, 0.5) | {"train__epochs": 8, "train__eval_every": 1000}
    run = train(make_config(*inputs, tmp_path / "run", **steps))
    entropy = json.loads((run / "summary.json").read_text())["valid_normalised_entropy"]
    assert entropy > 1
    assert f"normalised entropy on valid is {entropy:.3f}" in capsys.readouterr().err
    state = read_state(checkpoints(run / "checkpoints")[-1])
    assert state.best_normalised_entropy == entropy


def test_gauc_of_ties_and_users_of_one_class() -> None:
    rng = np.random.default_rng(3)
    users = rng.integers(0, 30, 400) - 5
    predictions = rng.integers(0, 5, 400) / 4  # many ties
    labels = (rng.random(400) < 0.3).astype(np.float32)
    weighted, rows = 0.0, 0
    for user in set(users):
        mine, label = predictions[users == user], labels[users == user]
        pairs = [(p > n) + 0.5 * (p == n) for p in mine[label == 1] for n in mine[label == 0]]
        if pairs:
            weighted, rows = weighted + np.mean(pairs) * len(mine), rows + len(mine)
    assert grouped_auc(users, predictions, labels) == pytest.approx(weighted / rows, abs=1e-12)
    assert grouped_auc(np.array([1, 2]), np.array([0.1, 0.2]), np.array([0, 1])) is None
