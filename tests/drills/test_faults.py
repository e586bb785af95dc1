"""Machines die and the job goes on with nothing lost; fault_drill.py does it."""

import json
import os
import random
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.drills.fault_drill import KILLS, losses
from tests.helpers.training_data import make_config, make_inputs, write_config
from tests.trainer.training.test_train import ENVIRONMENT, ROOT
from trainer.checkpoint.directory import checkpoints

pytestmark = [pytest.mark.distributed, pytest.mark.slow]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder, seed = tmp_path_factory.mktemp("faults"), random.SystemRandom().randrange(10**6)
    print(f"seed of the kill points: {seed}")  # shown where a test fails
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.drills.fault_drill", str(folder), str(seed)],
        cwd=ROOT,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=290,
    )
    assert done.returncode == 0, f"seed {seed}: {done.stderr}"
    drills = json.loads(done.stdout.splitlines()[-1])
    print(f"seconds: {drills['seconds']}")
    return drills


def test_ranks_killed_at_random_times_lose_nothing(found: dict[str, Any]) -> None:
    kills = found["kills"]
    assert (kills["kills"], kills["wrong"]) == (KILLS, []), kills
    # They do not wait for the dead, but where one dies while groups are made: then for their timeout.
    assert statistics.median(kills["seconds_until_survivors_end"]) < 10
    assert max(kills["seconds_until_survivors_end"]) < 55


def test_a_rank_told_to_end_makes_all_save_their_last_step(found: dict[str, Any]) -> None:
    told = found["told"]
    assert told["wrong"] == []
    assert told["saved"] == told["trained"] == told["went_on"]
    assert told["seconds"] < 25


def test_four_ranks_then_two_then_four(found: dict[str, Any]) -> None:
    first, second, third = found["elastic"]["positions"]
    assert first == 0 < second < third
    assert found["elastic"]["wrong"] == []


def test_a_rank_that_stops_answering_is_named(found: dict[str, Any]) -> None:
    stopped = found["stopped"]
    assert "held up by rank 1;" in stopped["report"]
    assert "rank 1: " in stopped["report"]
    assert "T (stopped)" in stopped["report"]
    assert "rank 0: " in stopped["report"]
    assert "waits for other ranks" in stopped["report"]
    assert "trainer/training/loop.py" in stopped["stacks"]
    assert stopped["collectives"] > 1000
    assert stopped["seconds"] < 30  # train.timeout_seconds
    assert stopped["wrong"] == []


def test_a_stuck_loader_is_told_from_a_wait_for_it(found: dict[str, Any]) -> None:
    report = found["starved"]["report"]
    assert "held up by rank 1;" in report
    assert "waits for input, at trainer/data/loading/prefetch.py" in report
    assert "waits for other ranks" in report
    assert "in slow" in found["starved"]["stacks"][1]  # the thread that reads, too
    assert found["starved"]["wrong"] == []


def test_slow_storage_is_named_and_a_full_disk_is_one_message(found: dict[str, Any]) -> None:
    storage = found["storage"]
    assert "held up by rank 1;" in storage["report"]
    assert "waits for storage" in storage["report"]
    assert storage["refused"][0] == storage["refused"][1]
    assert "rank 1 could not write it: no space left for a checkpoint" in storage["refused"][0]
    assert storage["went_on"] > 0
    assert storage["wrong"] == []


def test_a_poisoned_batch_is_stopped_skipped_or_rolled_back(found: dict[str, Any]) -> None:
    guard, words = found["guard"], "step 8: loss is not finite in the batch of rank 1"
    assert len(guard["stop"]["refused"]) == 2
    assert all(words in text for text in guard["stop"]["refused"])
    assert max(guard["stop"]["saved"]) == "step-00000006"  # none after it
    for policy in ("skip", "rollback"):
        (incident,) = guard[policy]["incidents"]
        assert (incident["found"], incident["policy"]) == (words, policy)
        assert incident["steps"] == [7]
        losses = {int(step): loss for step, loss in guard[policy]["losses"].items()}
        undisturbed = {int(step): loss for step, loss in guard["undisturbed"].items()}
        assert list(losses) == [s for s in range(1, 27) if policy == "skip" or s != 8]
        assert [losses[s] for s in range(1, 8)] == [undisturbed[s] for s in range(1, 8)]
        after = [losses[s] for s in range(9, 27)]  # one batch less: close, not equal
        assert after == pytest.approx([undisturbed[s] for s in range(9, 27)], rel=0.1)


def test_ranks_that_drift_apart_are_found(found: dict[str, Any]) -> None:
    apart = found["guard"]["apart"]
    assert len(apart["refused"]) == 2
    assert "step 8: dense parameters of rank 1 differ" in apart["refused"][0]
    assert max(apart["saved"]) == "step-00000006"


# ---------------------------------------------------------------- under torchrun


class Job:
    """torchrun with two ranks, restarts and the environment that the component sets."""

    def __init__(self, config: Path, run: Path, restarts: int) -> None:
        from launch.cluster.app import ENVIRONMENT as OF_COMPONENT

        self.run, self.mark = run, str(config)
        self.agent = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "torch.distributed.run",
                "--nproc-per-node",
                "2",
                "--max-restarts",
                str(restarts),
                "--rdzv-backend",
                "c10d",
                "--rdzv-endpoint",
                "localhost:0",
                "-m",
                "launch",
                "train",
                "--resume",
                "--config",
                str(config),
            ],
            cwd=ROOT,
            env=ENVIRONMENT | OF_COMPONENT,
            stderr=subprocess.PIPE,
            text=True,
        )

    def ranks(self) -> list[int]:
        """Processes of the ranks, wherever they hang now."""
        found = []
        for process in Path("/proc").glob("[0-9]*"):
            try:
                words = (process / "cmdline").read_text().split("\0")
                state = (process / "stat").read_text().rpartition(")")[2].split()[0]
            except OSError:
                continue
            if self.mark in words and "torch.distributed.run" not in words and state != "Z":
                found.append(int(process.name))
        return sorted(found)

    def wait_for_step(self, step: int) -> None:
        """Waits until metrics.jsonl shows that step."""
        end = time.monotonic() + 120
        while True:
            file = self.run / "metrics.jsonl"
            lines = file.read_text().splitlines() if file.exists() else []
            whole = [json.loads(line) for line in lines if line.endswith("}")]
            if whole and whole[-1]["step"] >= step:
                return
            if self.agent.poll() is not None or time.monotonic() > end:
                raise AssertionError(f"not at step {step}: {self.agent.communicate()[1]}")
            time.sleep(0.02)

    def ended(self) -> float:
        """Waits until no rank is left; seconds."""
        began = time.monotonic()
        while self.ranks():
            assert time.monotonic() < began + 40, "ranks outlive their agent"
            time.sleep(0.02)
        return time.monotonic() - began


def newest(run: Path) -> int:
    return int(checkpoints(run / "checkpoints")[-1].name.removeprefix("step-"))


def test_a_rank_an_agent_and_a_job_die_under_torchrun(tmp_path: Path) -> None:
    data, _ = make_inputs(tmp_path / "inputs")
    options = {"train__epochs": 5000, "train__eval_every": 1000, "train__checkpoint_every": 20}
    options |= {"train__timeout_seconds": 40, "train__log_every": 2}
    run = tmp_path / "run"
    file = write_config(make_config(data, None, run, **options), tmp_path / "run.yaml")
    times = {}

    job = Job(file, run, restarts=1)
    job.wait_for_step(50)
    began, rank = time.monotonic(), job.ranks()[-1]
    os.kill(rank, signal.SIGKILL)  # one rank: the agent starts all of them again
    step = newest(run)
    job.wait_for_step(step + 60)
    times["rank killed, back at work"] = time.monotonic() - began

    job.agent.kill()  # the agent: its ranks save and end, so none trains on beside the next job's
    job.agent.wait()
    times["agent killed, ranks gone"] = job.ended()
    saved = newest(run)
    assert saved > step

    job = Job(file, run, restarts=1)
    job.wait_for_step(saved + 30)
    began = time.monotonic()
    job.agent.send_signal(signal.SIGTERM)  # what a scheduler does when it takes the machines back
    text = job.agent.communicate(timeout=60)[1]
    times["told to end, job ended"] = time.monotonic() - began
    assert job.agent.returncode != 0  # so that the scheduler starts it again
    assert "told to end: step" in text
    job.ended()
    last = newest(run)
    assert last == list(losses(run))[-1] > saved  # not a step is lost

    print({name: round(seconds, 1) for name, seconds in times.items()})
