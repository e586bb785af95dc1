"""What a run shows of itself: per rank, in trackers, and as traces on demand."""

import json
import multiprocessing
import os
import signal
import sys
import time
import types
from pathlib import Path
from typing import Any

import pytest
import torch

import trainer.training.loop
from llm_knowledge.errors import InputError
from tests.drills.fault_drill import at_batch, losses
from tests.helpers.training_data import make_config, make_inputs
from trainer.config.train import TrainConfig
from trainer.distributed.process_group import Runtime
from trainer.observe.metrics_log import RANK, STEP, RunLog
from trainer.observe.watchdog import TERMINATED, Preempted, Watch
from trainer.run.session import Run
from trainer.training.loop import train


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_inputs(tmp_path_factory.mktemp("watching"))[0]


@pytest.fixture(autouse=True)
def _put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainer.training.loop, "build", trainer.training.loop.build)


def test_numbers_of_ranks_and_of_waiting(data: Path, tmp_path: Path) -> None:
    run = train(make_config(data, None, tmp_path / "run", train__log_every=4))
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    first = next(line for line in lines if line["kind"] == "train")
    assert 0 <= first["input_share"] <= 1
    assert 0 <= first["waiting_share"] <= 1
    assert first["memory_gib"] > 0.01
    ranks = [json.loads(line) for line in (run / "ranks.jsonl").read_text().splitlines()]
    assert [line["step"] for line in ranks] == [x["step"] for x in lines if x["kind"] == "train"]
    assert ranks[0]["samples_per_second"] == [pytest.approx(first["samples_per_second"], rel=1e-3)]
    assert not list((run / "ranks").iterdir())  # no one is at work any more
    assert not list((run / "hang").iterdir())


def test_the_straggler_is_the_rank_that_needs_most_for_itself(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from trainer.observe.metrics_log import Window

    seen: list[Any] = []
    compare = RunLog._compare_ranks

    def three(self: RunLog, window: Window) -> dict[str, float]:
        ranks = {name: values.repeat(3) for name, values in window.ranks.items()}
        ranks["busy"], ranks["input"] = ranks["busy"] * 0 + 1.0, ranks["input"] * 0
        ranks["input"][1] = 2.0
        steps = {name: values.repeat(3, axis=0) for name, values in window.steps.items()}
        seen.append((set(window.ranks), set(window.steps)))
        return compare(self, Window(window.last, steps, ranks, 4.0))

    monkeypatch.setattr(RunLog, "_compare_ranks", three)
    run = train(make_config(data, None, tmp_path / "run", train__epochs=1))
    line = json.loads((run / "ranks.jsonl").read_text().splitlines()[0])
    assert line["straggler"] == 1
    assert line["input_share"] == [0.0, 0.5, 0.0]
    assert seen[0] == (set(RANK), set(STEP))


def test_trackers_through_their_own_clients(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[Any] = []
    mlflow, wandb = types.ModuleType("mlflow"), types.ModuleType("wandb")
    info = types.SimpleNamespace(info=types.SimpleNamespace(run_id="m1"))
    mlflow.start_run = lambda **named: told.append(("start", named)) or info  # type: ignore[attr-defined]
    mlflow.log_dict = lambda *_: told.append(("config",))  # type: ignore[attr-defined]
    mlflow.log_metrics = lambda found, step: told.append(("mlflow", step, found))  # type: ignore[attr-defined]
    mlflow.end_run = lambda: told.append(("end",))  # type: ignore[attr-defined]

    class Client:
        id = "w1"

        def log(self, found: dict[str, float], step: int) -> None:
            told.append(("wandb", step, found))

        def finish(self) -> None:
            told.append(("finish",))

    wandb.init = lambda **named: told.append(("init", named["id"])) or Client()  # type: ignore[attr-defined]
    for module in (mlflow, wandb):
        module.__spec__ = types.SimpleNamespace()  # type: ignore[assignment]
        monkeypatch.setitem(sys.modules, module.__name__, module)
    config = make_config(
        data, None, tmp_path / "run", train__epochs=1, train__trackers="[mlflow, wandb]"
    )
    at_batch(4, lambda run, batch: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(Preempted):
        train(config)
    run = train(config, resume=True)
    assert not (run / "tensorboard").exists()
    for name in ("mlflow", "wandb"):
        shown = [one for one in told if one[0] == name]
        assert [step for _, step, found in shown if "train/loss" in found] == list(range(1, 11))
        assert any("valid/valid_auc" in found for _, _, found in shown)
    assert ("end",) in told
    assert ("finish",) in told
    assert told[0] == ("start", {"run_id": None, "run_name": "tiny"})
    assert ("start", {"run_id": "m1", "run_name": None}) in told  # goes on in the same records
    assert ("init", "w1") in told


@pytest.mark.parametrize("name", ["mlflow", "wandb"])
def test_a_tracker_that_is_not_installed_is_refused(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    config = make_config(data, None, tmp_path / "run", train__trackers=f"[{name}]")
    with pytest.raises(InputError, match=f"train.trackers: {name} is not installed here: pip"):
        train(config)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_traces_on_demand(data: Path, tmp_path: Path) -> None:
    """By a signal, and by a file in the run's folder; the run is as it would have been."""
    at_batch(2, lambda run, batch: os.kill(os.getpid(), signal.SIGUSR1))
    at_batch(12, lambda run, batch: ask(run))

    def ask(run: Run) -> None:
        (run.folder / "trace-request").touch()
        end = 200
        while (run.folder / "trace-request").exists() and end:  # the watch takes it away
            end -= 1
            time.sleep(0.02)

    options = {"train__eval_every": 10, "train__hang_seconds": 1.0}
    run = train(make_config(data, None, tmp_path / "run", **options))
    traces = sorted((run / "traces").iterdir())
    assert [path.name for path in traces] == [
        "step-00000003-rank-0.json",
        "step-00000013-rank-0.json",
    ]
    for path in traces:
        names = {event.get("name", "") for event in json.loads(path.read_text())["traceEvents"]}
        assert any("forward" in name for name in names)
        assert any("split_embedding" in name for name in names)
    plain = train(make_config(data, None, tmp_path / "plain", train__eval_every=10))
    assert losses(run) == losses(plain)


@pytest.mark.slow
def test_one_rank_told_to_end_saves_and_goes_on(data: Path, tmp_path: Path) -> None:
    at_batch(6, lambda run, batch: os.kill(os.getpid(), signal.SIGTERM))
    config = make_config(data, None, tmp_path / "run", train__eval_every=10)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Preempted) as ending:
        train(config)
    assert ending.value.code == TERMINATED
    assert signal.getsignal(signal.SIGTERM) == before
    # Step 7 was under way and two more were read ahead.
    assert (tmp_path / "run/checkpoints/step-00000009").is_dir()
    run = train(config, resume=True)
    plain = train(make_config(data, None, tmp_path / "plain", train__eval_every=10))
    assert losses(run) == losses(plain)


def stuck(folder: Path, told: bool) -> None:
    runtime = Runtime(0, 1, 1, torch.device("cpu"))
    options = TrainConfig(hang_seconds=0.3, grace_seconds=0.3, timeout_seconds=1)
    with Watch(folder, runtime, options):
        if told:
            os.kill(os.getpid(), signal.SIGTERM)
        end = time.monotonic() + 20
        while time.monotonic() < end:  # the signal does not get it out of here
            time.sleep(0.05)


@pytest.mark.parametrize("told", [True, False])
def test_a_rank_that_is_stuck_ends_in_time(tmp_path: Path, told: bool) -> None:
    context = multiprocessing.get_context("fork")
    process = context.Process(target=stuck, args=(tmp_path, told))
    process.start()
    process.join(15)
    assert process.exitcode == (TERMINATED if told else 1)
    if not told:
        assert "held up by rank 0; " in (tmp_path / "hang/report.txt").read_text()
