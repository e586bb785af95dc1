"""Stages through torchx."""

import json
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from launch.main import main
from llm_knowledge.errors import InputError
from tests.helpers.paths import ROOT
from tests.helpers.training_data import make_config, make_inputs, write_config

pytest.importorskip("torchx")


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("launch")
    run = make_config(*make_inputs(root), root / "run", train__epochs=1, data__streams=32)
    return write_config(run, root / "config.yaml")


def launch(config: Path, *words: str, stage: str = "train") -> int:
    return main(["launch", stage, *words, "--", "--config", str(config)])


def shown_by_dryrun(capsys: pytest.CaptureFixture, config: Path, *words: str) -> str:
    assert launch(config, *words, "--dryrun") == 0
    return re.sub(r"'\s+'", "", capsys.readouterr().out)


@pytest.mark.distributed
@pytest.mark.slow
def test_local_job_of_two_hosts_equals_one_host(config: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "launch"]
    job = ["launch", "train", "--scheduler", "local_cwd", "-j", "2x2"]
    job += ["--set", f"log_dir={tmp_path / 'logs'}", "--", "--config", str(config)]
    done = subprocess.run([*command, *job], capture_output=True, text=True, timeout=120, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    summary = json.loads((config.parent / "run/summary.json").read_text())
    assert summary.pop("world_size") == 4
    assert re.search(r"tiny: step 10, epoch 1: valid AUC 0\.\d+, logloss", done.stderr)
    assert list((tmp_path / "logs").rglob("stderr.log"))
    single = ["train", "--processes", "4", "--config", str(config)]
    single += ["--set", f"output={tmp_path / 'single'}"]
    done = subprocess.run(
        [*command, *single], capture_output=True, text=True, timeout=120, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    expected = json.loads((tmp_path / "single/summary.json").read_text())
    assert (summary["steps"], summary["best_step"]) == (expected["steps"], expected["best_step"])
    assert summary["valid_auc"] == pytest.approx(expected["valid_auc"], abs=1e-6)


def test_dryrun_shows_the_command_and_its_restarts(
    config: Path, capsys: pytest.CaptureFixture
) -> None:
    shown = shown_by_dryrun(capsys, config, "-j", "2x8", "--set", "timeout_minutes=90")
    assert (
        f"timeout --signal TERM --kill-after 60 5400 {sys.executable} -m torch.distributed.run"
        in shown
    )
    assert "--nnodes 2" in shown
    assert "--nproc-per-node 8 --max-restarts 3" in shown
    assert "'TORCH_DISABLE_SHARE_RDZV_TCP_STORE': '1'" in shown


def test_elastic_jobs_keep_heartbeats(config: Path, capsys: pytest.CaptureFixture) -> None:
    shown = shown_by_dryrun(capsys, config, "-j", "1:4x2")
    assert "--nnodes 1:4" in shown
    assert "keep_alive_max_attempt" not in shown


def test_job_file_and_flags(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    job = tmp_path / "job.yaml"
    job.write_text(
        "scheduler: slurm\nhosts: 4x8\nresource: h100x8\nretries: 2\nport: 29400\n"
        "env: {NCCL_DEBUG: WARN}\noptions: {partition: main}\nlog_dir: /logs\n"
    )
    shown = shown_by_dryrun(capsys, config, "--job", str(job), "-j", "2x8", "--cfg", "time=90")
    for part in (
        "--partition=main --time=90",
        "--gpus-per-task=8",
        "TORCHX_MAX_RETRIES=2",
        "--nnodes 2 ",
        "NCCL_DEBUG=WARN",
        "--log-dir /logs",
        '--rdzv-endpoint "$host:29400"',
        "host=${SLURM_JOB_NODELIST_HET_GROUP_0:=localhost}",
        str(config),
    ):
        assert part in shown
    assert shown.count("#SBATCH --job-name=train-") == 2


def test_dollars_of_arguments_reach_the_job_as_they_are(tmp_path: Path) -> None:
    from torchx.specs import macros

    from launch.cluster.app import build
    from launch.cluster.job import load_job

    words = ["--set", "name=$HOME ${app_id} $$ 'x' $(id)"]
    [role] = build("train", words, load_job(None)).roles
    values = macros.Values(img_root="", app_id="7", replica_id="0", rank0_env="HOST")
    text = values.apply(role).args[1].replace("exec torchrun", 'printf "%s\\n"')
    assert "${app_id}" not in text  # torchx's Slurm scheduler replaces it in the finished script
    lines = subprocess.run(["bash", "-c", text], capture_output=True, text=True).stdout.splitlines()
    assert lines[-1] == words[1]
    assert lines[lines.index("--rdzv-id") + 1] == "7"


def test_a_job_file_means_what_it_says(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    job = tmp_path / "job.yaml"
    job.write_text(
        "scheduler: slurm\nhosts: 1x2\noptions: {time: 24:30:00, partition: NO}\nenv: {ON: on, N: 010}\n"
    )
    shown = shown_by_dryrun(capsys, config, "--job", str(job))
    assert "--partition=NO" in shown
    assert "--time=24:30:00" in shown
    assert "ON=on,N=010" in shown
    job.write_text("scheduler: slurm\nhosts: 1x2\nhosts: 2x2\n")
    assert launch(config, "--job", str(job), "--dryrun") == 2
    assert "the key 'hosts' of line 2" in capsys.readouterr().err


def test_processes_of_a_job_are_said_once(
    config: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["train", "--config", str(config), "--processes", "4"]
    assert main(["launch", "train", "--dryrun", "--", *words[1:]]) == 2
    assert "--processes 4: the job starts the processes" in capsys.readouterr().err
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(words) == 2
    assert "--processes 4: a launcher has started this command" in capsys.readouterr().err


def test_what_looks_like_a_secret_is_warned_of(config: Path, capsys: pytest.CaptureFixture) -> None:
    env = "env={WANDB_API_KEY: k, KEYBOARD: k, NCCL_DEBUG: WARN, DB: 'pg://me:pw@host/x'}"
    words = ["--scheduler", "slurm", "--cfg", "partition=main", "--set", env, "--dryrun"]
    assert launch(config, *words) == 0
    warned = re.findall(r"warning: env\.(\w+): looks like a secret", capsys.readouterr().err)
    assert warned == ["WANDB_API_KEY", "DB"]


def test_aws_batch_takes_secrets_by_reference(config: Path, capsys: pytest.CaptureFixture) -> None:
    words = ["--scheduler", "aws_batch", "--cfg", "queue=gpus", "--image", "llm4msr:cuda"]
    shown = shown_by_dryrun(capsys, config, *words, "--set", "secrets.TOKEN=arn:aws:ssm:x")
    assert re.search(r"secrets:\s+- name: TOKEN\s+valueFrom: arn:aws:ssm:x", shown)


def test_container_job(config: Path, capsys: pytest.CaptureFixture) -> None:
    words = ["--scheduler", "aws_batch", "--cfg", "queue=gpus", "--image", "llm4msr:cuda"]
    mount = "mounts=['type=bind,src=/fsx,dst=/data,readonly']"
    machine = "resource={cpu: 8, gpu: 4, memory_gib: 64, devices: {vpc.amazonaws.com/efa: 1}}"
    shown = shown_by_dryrun(capsys, config, *words, "-j", "2x4", "--set", mount, "--set", machine)
    for part in ("sourcePath: /fsx", "readOnly: true", "/dev/infiniband/uverbs0", "llm4msr:cuda"):
        assert part in shown


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--scheduler", "cron"], "scheduler cron: unknown; there are"),
        (["--resource", "toaster"], "resource toaster: No named resource"),
        (["-j", "many"], r"hosts: write hosts x processes.*found 'many'"),
        (["-j", "2x0"], "hosts: write hosts x processes"),
        (["-j", "3:2x1"], "1 <= MIN <= MAX"),
        (["-j", "1x16", "--resource", "h100x8"], "16 processes per host, but h100x8 has 8 GPUs"),
        (["--cfg", "partition"], "--cfg partition: write it as"),
        (["--scheduler", "slurm", "--cfg", "partitoin=x"], "slurm has no such option; it has part"),
        (["--scheduler", "aws_batch", "--image", "x"], "options: Required run option: queue"),
        (["--scheduler", "local_docker"], "image: local_docker needs one"),
        (["--image", "x"], "image: local_cwd starts no container"),
        (["--scheduler", "slurm", "--set", "mounts=[type=bind]"], "mounts: slurm starts no"),
        (["--scheduler", "slurm", "--set", "env.A='1,2'"], "env.A: slurm's srun"),
        (["--set", "retries=1"], "retries: local_cwd starts a job once"),
        (["--set", "retires=1"], "retires: no such field; did you mean retries?"),
        (["--set", "env.A-B=c"], "A-B is not a variable's name"),
        (
            ["--scheduler", "slurm", "--cfg", "partition=a\n#SBATCH --uid=0"],
            "partition.*line break",
        ),
        (["--set", 'log_dir="/l\\u2028m"'], "log_dir: .*line break"),
        (["--set", 'env.A="1\\n2"'], "env: .*line break"),
        (["--image", "a\nb", "--scheduler", "jobset"], "image: .*line break"),
        (["--set", "secrets.TOKEN=a/b"], "secrets: local_cwd knows none"),
        (
            ["--scheduler", "jobset", "--image", "x", "--set", "secrets.A=b"],
            "secrets.A: 'b': write",
        ),
        (["-j", "3x3"], "hosts 3x3, which is 9 ranks: data.streams: 32 streams"),
        (["-j", "1:3x2"], "hosts 1:3x2, which is 6 ranks"),
        (["--job", "nowhere.yaml"], "nowhere.yaml: no such"),
    ],
)
def test_bad_jobs_are_refused_before_anything_is_submitted(
    config: Path, capsys: pytest.CaptureFixture, words: list[str], message: str
) -> None:
    assert launch(config, *words) == 2
    assert re.search(message, capsys.readouterr().err)
    assert not (ROOT / ".torchxslurmjobdirs").exists()


def test_a_taken_port_is_refused(config: Path, capsys: pytest.CaptureFixture) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        assert launch(config, "-j", "2x1", "--set", f"port={port}") == 2
    assert f"port {port}: taken on this machine" in capsys.readouterr().err


def test_bad_arguments_of_the_stage_are_refused_here(
    config: Path, capsys: pytest.CaptureFixture
) -> None:
    for stage in ("train", "pipeline"):
        words = ["launch", stage, "--", "--config", str(config), "--set", "train.sede=1"]
        assert main(words) == 2
        assert "did you mean seed?" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stopped:
        main(["launch", "train", "--", "--confg", str(config)])
    assert stopped.value.code == 2


def test_components_are_registered_beside_torchxs_own() -> None:
    from torchx.specs import named_resources
    from torchx.specs.finder import get_components

    stages = {f"llm4msr.{name}" for name in ("extract", "train", "evaluate", "profile", "pipeline")}
    components = set(get_components())
    assert stages | {"dist.ddp", "utils.echo"} <= components
    assert {name for name in components if name.startswith("llm4msr.")} == stages
    assert named_resources["h200x8"].gpu == 8


def test_component_by_torchxs_own_command(config: Path) -> None:
    command = [str(Path(sys.executable).parent / "torchx"), "run", "--dryrun", "-s", "local_cwd"]
    done = subprocess.run(
        [*command, "llm4msr.train", "-j", "2x2", "--", "--config", str(config)],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert "--nnodes 2 --nproc-per-node 2" in re.sub(r"'\s+'", "", done.stdout), done.stderr


@pytest.mark.slow
def test_the_job_does_not_import_torchx(config: Path) -> None:
    """Every stage's modules load in an environment without torchx."""
    program = (
        "import sys; sys.modules['torchx'] = None\n"
        "from launch.main import main\n"
        "import launch.pipeline, trainer.training.loop, trainer.training.scoring\n"
        "import llm_knowledge.extraction.extract\n"
        f"sys.exit(main(['pipeline', '--config', {str(config)!r}, '--set', 'train.sede=1']))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2, done.stderr
    assert "did you mean seed?" in done.stderr


def test_launch_without_torchx_says_what_to_do(
    config: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "torchx.runner", None)
    assert launch(config) == 2
    assert "or use torchrun itself" in capsys.readouterr().err


# ---------------------------------------------------------------- pipeline


def test_levels_that_share_a_folder_are_extracted_together(tmp_path: Path) -> None:
    from launch.pipeline import extractions

    data, stores = make_inputs(tmp_path)
    run = make_config(data, stores, tmp_path / "run")
    [job] = extractions(run, "--store-dtype float32 --chunk 9")
    assert (job.level, job.out, job.data) == ("all", stores, data)
    assert (job.store_dtype, job.chunk) == ("float32", 9)
    other = run.knowledge.model_copy(update={"item": str(tmp_path / "elsewhere")})
    jobs = extractions(run.model_copy(update={"knowledge": other}))
    assert [job.level for job in jobs] == ["user", "scenario", "item"]
    assert extractions(make_config(data, None, tmp_path / "plain")) == []
    with pytest.raises(InputError, match="unknown: --chonk 9"):
        extractions(run, "--chonk 9")
    with pytest.raises(InputError, match="--extract"):
        extractions(run, "--layer x")


@pytest.mark.distributed
@pytest.mark.slow
def test_pipeline_runs_every_stage_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from tests.helpers.knowledge_data import tiny_encoder

    data, _ = make_inputs(tmp_path)
    model = tiny_encoder(tmp_path / "model")
    run = make_config(data, tmp_path / "extracted", tmp_path / "run", train__epochs=1)
    file = write_config(run, tmp_path / "config.yaml")

    words = ["pipeline", "--config", str(file), "--extract", f"--model {model} --no-progress"]

    def states_in(out: str, err: str) -> list[str]:
        assert out.strip() == str(tmp_path / "run/report.html")
        return re.findall(r"((?:extract all|train|evaluate|report): \w+)$", err, re.MULTILINE)

    def start() -> list[str]:
        command = [sys.executable, "-m", "launch", *words, "--processes", "2"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=ROOT)
        assert done.returncode == 0, done.stderr
        return states_in(done.stdout, done.stderr)

    stages = ["extract all", "train", "evaluate", "report"]
    assert start() == [f"{stage}: begins" for stage in stages]
    (tmp_path / "run/evaluation.json").unlink()
    states = ["complete", "complete", "begins", "begins"]  # the report shows the evaluation
    assert start() == [f"{stage}: {state}" for stage, state in zip(stages, states, strict=True)]
    # What two processes made is complete for one, here where the libraries are loaded, too.
    assert main(words) == 0
    assert states_in(*capsys.readouterr()) == [f"{stage}: complete" for stage in stages]


def test_the_page_lists_every_field_of_a_job() -> None:
    from launch.cluster.job import JobConfig

    page = (ROOT / "docs/how-to/many-hosts.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\w+)` \| `([^`]+)` \|", page.split("## The job")[1], re.MULTILINE)
    fields = JobConfig.model_fields.items()
    assert rows == [
        (key, field.default if isinstance(field.default, str) else json.dumps(field.default))
        for key, field in fields
    ]
