"""Jobs of several hosts, really run: hosts are network namespaces, or nodes of a real Slurm.

`launch/local_cluster.sh` makes them; where it cannot, the drills are skipped with its reason.
"""

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from launch.cluster.app import ENVIRONMENT, FIXED_SIZE
from llm_knowledge.store.reader import KnowledgeStore
from tests.helpers.knowledge_data import tiny_encoder
from tests.helpers.paths import ROOT
from tests.helpers.training_data import make_config, make_inputs, write_config

SCRIPT = ROOT / "launch/local_cluster.sh"
HOSTS = ("llm4msr1", "llm4msr2")
pytestmark = [pytest.mark.distributed, pytest.mark.slow, pytest.mark.timeout(900)]
pytest.importorskip("torchx")


def cluster(*words: str) -> None:
    done = subprocess.run([SCRIPT, *words], capture_output=True, text=True, timeout=300)
    if done.returncode == 3:
        pytest.skip(done.stderr.strip())
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return make_inputs(tmp_path_factory.mktemp("inputs"))


def predictions(run: Path) -> dict[tuple[Any, ...], float]:
    import pyarrow.parquet as pq

    rows = pq.read_table(run / "predictions/test").to_pylist()
    return {(r["user_id"], r["item_id"], r["timestamp"]): r["prediction"] for r in rows}


# ---------------------------------------------------------------- network namespaces


@pytest.fixture(scope="module")
def namespaces() -> Iterator[None]:
    cluster("namespaces", "up", "200")
    yield
    cluster("namespaces", "down")


TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]
# torchrun on a host whose clock is an hour ahead: agents compare the times of their heartbeats.
AHEAD = """
import datetime
from torch.distributed.elastic.rendezvous import dynamic_rendezvous
from torch.distributed.run import main

class Ahead(datetime.datetime):
    @classmethod
    def now(cls, tz=None):
        return datetime.datetime.now(tz) + datetime.timedelta(hours=1)

dynamic_rendezvous.datetime = Ahead
main()
"""


def on_hosts(
    words: list[str], second: list[str] = TORCHRUN, before: str = ""
) -> list[subprocess.CompletedProcess]:
    """Runs plain torchrun with 2 ranks in each namespace.

    Args:
        words: Arguments of `llm4msr`.
        second: The second host's torchrun.
        before: What the second host's shell does first.
    """
    environment = os.environ | ENVIRONMENT | {"PYTHONPATH": str(ROOT), "GLOO_SOCKET_IFNAME": "eth0"}
    started = []
    for number, host in enumerate(HOSTS):
        shell = ["sh", "-c", f'{before if number else ""} "$@"', "sh"]
        command = ["ip", "netns", "exec", host, *shell]
        command += [*(second if number else TORCHRUN), "--nnodes", "2", "--nproc-per-node", "2"]
        command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "10.77.0.1:29500"]
        command += ["--rdzv-id", "drill", "--local-addr", f"10.77.0.{number + 1}"]
        command += ["--rdzv-conf", f"{FIXED_SIZE},is_host={'false' if number else 'true'}"]
        command += ["-m", "launch", *words]
        started.append(
            subprocess.Popen(
                command,
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
    ended = []
    for process in started:
        try:
            output, _ = process.communicate(timeout=300)
        except subprocess.TimeoutExpired:
            for other in started:
                other.terminate()
            output, _ = process.communicate(timeout=30)
        ended.append(subprocess.CompletedProcess(process.args, process.returncode, output))
    return ended


@pytest.mark.namespaces
def test_two_hosts_train_as_one_though_a_clock_is_an_hour_ahead(
    namespaces: None, inputs: tuple[Path, Path], tmp_path: Path
) -> None:
    file = write_config(
        make_config(*inputs, tmp_path / "two", train__epochs=1), tmp_path / "c.yaml"
    )
    (tmp_path / "ahead.py").write_text(AHEAD)
    ahead = [sys.executable, str(tmp_path / "ahead.py")]
    for host in on_hosts(["train", "--config", str(file)], second=ahead):
        assert host.returncode == 0, host.stdout
    command = [sys.executable, "-m", "launch", "train", "--config", str(file), "--processes", "4"]
    done = subprocess.run(
        [*command, "--set", f"output={tmp_path / 'one'}"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    on_two, on_one = predictions(tmp_path / "two"), predictions(tmp_path / "one")
    assert on_two.keys() == on_one.keys()
    # Several hosts reduce in another order.
    assert list(on_two.values()) == pytest.approx([on_one[key] for key in on_two], abs=1e-5)


@pytest.mark.namespaces
def test_two_hosts_extract_as_one(
    namespaces: None, inputs: tuple[Path, Path], tmp_path: Path
) -> None:
    model = tiny_encoder(tmp_path / "model")
    words = ["knowledge", "extract", "--data", str(inputs[0]), "--level", "all", "--chunk", "8"]
    words += ["--model", str(model), "--no-progress"]
    for host in on_hosts([*words, "--out", str(tmp_path / "two")]):
        assert host.returncode == 0, host.stdout
    done = subprocess.run(
        [sys.executable, "-m", "launch", *words, "--out", str(tmp_path / "one")],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    for level in ("user", "item", "scenario"):
        two, one = (KnowledgeStore.open(tmp_path / name / level) for name in ("two", "one"))
        assert two.fingerprint == one.fingerprint
        assert (
            two.read_vectors(0, two.manifest.rows) == one.read_vectors(0, one.manifest.rows)
        ).all()


@pytest.mark.namespaces
def test_a_host_that_does_not_share_the_folder_is_named(
    namespaces: None, inputs: tuple[Path, Path], tmp_path: Path
) -> None:
    runs = tmp_path / "runs"
    runs.mkdir()
    file = write_config(make_config(*inputs, runs / "run"), tmp_path / "c.yaml")
    # A disk of its own, under the same path, on the second host.
    hosts = on_hosts(["train", "--config", str(file)], before=f"mount -t tmpfs none {runs};")
    assert all(host.returncode for host in hosts)
    text = "".join(host.stdout for host in hosts)
    assert re.search(
        rf"{runs / 'run'}: is not shared: .* not seen by \S+ \(rank 2\), \S+ \(rank 3\)|"
        rf"{runs / 'run'}: is not shared: .* not seen by \S+ \(rank 0\), \S+ \(rank 1\)",
        text,
    ), text
    assert text.count("llm4msr: error:") == 1
    assert not any(runs.iterdir())


# ---------------------------------------------------------------- Slurm


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    state = tmp_path_factory.mktemp("slurm") / "cluster"
    os.environ["LLM4MSR_CLUSTER"] = str(state)
    try:
        cluster("slurm", "up")
        environment = os.environ | {"SLURM_CONF": f"{state}/slurm.conf", "PYTHONPATH": str(ROOT)}
        environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
        yield environment
    finally:
        cluster("slurm", "down")
        del os.environ["LLM4MSR_CLUSTER"]


class Submitted:
    """A training on two nodes, submitted through torchx from a folder that it logs to."""

    def __init__(
        self, environment: dict[str, str], folder: Path, inputs: tuple[Path, Path]
    ) -> None:
        self.environment, self.folder, self.out = environment, folder, folder / "run"
        config = make_config(
            *inputs, self.out, train__epochs=30, train__eval_every=60, train__checkpoint_every=20
        )
        file = write_config(config, folder / "c.yaml")
        words = ["--scheduler", "slurm", "--cfg", "partition=main", "-j", "2x2"]
        llm4msr = (sys.executable, "-m", "launch")
        said = self.run(*llm4msr, "launch", "train", *words, "--", "--config", str(file))
        [self.handle] = re.findall(r"submitted (slurm://\S+)", said)
        self.number = self.handle.rpartition("/")[2]

    def run(self, *words: str) -> str:
        done = subprocess.run(
            words,
            cwd=self.folder,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout + done.stderr

    def parts_in(self, state: str) -> int:
        """How many of its two components are in a state of Slurm's."""
        return self.run("squeue", "-a", "-h", "-t", state).count("train-")

    def wait(self, condition: Callable[[], object], seconds: float) -> None:
        end = time.monotonic() + seconds
        while not condition():
            logs = [f"{file}:\n{file.read_text()}" for file in self.folder.glob("slurm-*")]
            controller = Path(self.environment["SLURM_CONF"]).parent / "log/slurmctld.log"
            state = [self.run("squeue", "-a"), self.run("sinfo"), controller.read_text()]
            assert time.monotonic() < end, "\n".join([*logs, *state])
            time.sleep(0.3)


@pytest.fixture(scope="module")
def requeued(
    slurm: dict[str, str], inputs: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory
) -> Submitted:
    """A job that has lost a node after its first checkpoint; Slurm holds it back for two minutes."""
    job = Submitted(slurm, tmp_path_factory.mktemp("requeued"), inputs)
    job.wait(lambda: list(job.out.glob("checkpoints/step-*")), 240)
    assert "State: RUNNING" in job.run("torchx", "status", job.handle)
    subprocess.run([SCRIPT, "slurm", "fail", "node2"], check=True)
    assert not (job.out / "summary.json").exists()
    states = ("sacct", "-D", "-n", "-j", job.number, "-o", "state")
    job.wait(lambda: "NODE_FAIL" in job.run(*states), 90)
    job.wait(lambda: job.parts_in("PD") == 2, 60)
    subprocess.run([SCRIPT, "slurm", "mend", "node2"], check=True)
    return job


@pytest.mark.slurm
def test_slurm_cancels_a_job_and_refuses_a_bad_one(
    slurm: dict[str, str], requeued: Submitted, inputs: tuple[Path, Path], tmp_path: Path
) -> None:
    """While the other job is held back, so that these two minutes are not only waited for."""
    run = make_config(*inputs, tmp_path / "run", train__epochs=1000)
    file = write_config(run, tmp_path / "c.yaml")

    def launch(*words: str) -> subprocess.CompletedProcess:
        command = [
            sys.executable,
            "-m",
            "launch",
            "launch",
            "train",
            "--scheduler",
            "slurm",
            *words,
        ]
        return subprocess.run(
            [*command, "--", "--config", str(file)],
            cwd=tmp_path,
            env=slurm,
            capture_output=True,
            text=True,
            timeout=120,
        )

    refused = launch("--cfg", "partition=nowhere")
    assert refused.returncode == 2
    assert "scheduler slurm: sbatch refused the job" in refused.stderr
    [handle] = re.findall(r"submitted (slurm://\S+)", launch("-j", "1x1").stderr)
    subprocess.run(["torchx", "cancel", handle], env=slurm, check=True, cwd=tmp_path)
    # torchx 0.7 does not know the state "CANCELLED by UID": its status command ends with a traceback.
    command = ["sacct", "-n", "-X", "-P", "-j", handle.rpartition("/")[2], "-o", "state"]
    for _ in range(60):
        done = subprocess.run(command, env=slurm, capture_output=True, text=True)
        if done.stdout.startswith("CANCELLED"):
            return
        time.sleep(0.5)
    pytest.fail(done.stdout + done.stderr)


@pytest.mark.slurm
def test_slurm_runs_a_job_and_runs_it_again_after_a_node_was_lost(requeued: Submitted) -> None:
    job = requeued
    # A job started before its two minutes are over can be ended by what the controller still had to
    # tell the lost node about it: "cancelled due to node failure".
    job.wait((job.out / "summary.json").exists, 480)
    job.wait(lambda: "SUCCEEDED" in job.run("torchx", "status", job.handle), 60)
    assert "Restarts=1" in job.run("scontrol", "show", "job", job.number)
    log = "".join(job.run("torchx", "log", f"{job.handle}/train/{host}") for host in (0, 1))
    assert "tiny: step 300, epoch 30: valid AUC" in log
    lines = [json.loads(line) for line in (job.out / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line["kind"] == "train"] == list(range(1, 301))
