"""`llm4msr launch`: a stage through a torchx scheduler."""

import logging
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

from launch.cluster.job import JobConfig
from launch.cluster.manifests import check_secrets, complete, exposed
from llm_knowledge.errors import InputError

logger = logging.getLogger(__name__)
JOBSET = "jobset"
# Those whose processes end with this one; the others keep the job.
LOCAL = ("local_cwd", "local_docker")
# Those that run in a folder of the host, without a container.
BARE = ("local_cwd", "slurm")


def submit(stage: str, arguments: list[str], job: JobConfig, dryrun: bool = False) -> int:
    """Submits a stage; local schedulers are waited for, others get the job and return.

    Args:
        stage: A key of `launch.cluster.app.STAGES`.
        arguments: What the stage's own command takes.
        job: Where and how it runs.
        dryrun: Print what would be submitted, submit nothing.

    Returns:
        0 when submitted (local: succeeded), 1 when a local job failed.

    Raises:
        InputError: torchx missing, or the job cannot be what it says; nothing was submitted.
    """
    try:
        from torchx.runner import get_runner
    except ImportError as error:
        raise InputError(
            "launch needs torchx: pip install 'llm4msr[launch]', or use torchrun itself"
        ) from error
    from launch.cluster.app import build

    _check(job)
    this_python = [sys.executable, "-m", "torch.distributed.run"]  # wherever PATH leads to
    app = build(stage, arguments, job, this_python if job.scheduler in BARE else ["torchrun"])
    if job.scheduler == JOBSET:
        from launch.cluster.jobset import manifest

        if not dryrun:
            raise InputError(
                "--scheduler jobset: kubectl submits it; add --dryrun and pipe into kubectl create -f -"
            )
        print(manifest(app, job), end="")
        return 0
    with get_runner() as runner:
        plan = _plan(runner, app, job)
        if dryrun:
            print(plan)
            return 0
        handle = _schedule(runner, plan, job)
        print(f"submitted {handle}", file=sys.stderr)
        if job.scheduler not in LOCAL:
            for word in ("status", "log", "cancel"):
                print(f"  torchx {word} {handle}", file=sys.stderr)
            return 0
        readers = [
            threading.Thread(target=_show, args=(runner, handle, stage, host), daemon=True)
            for host in range(job.size[1])
        ]
        for reader in readers:
            reader.start()
        status = runner.wait(handle, wait_interval=0.2)
        for reader in readers:
            reader.join(10)
        return 0 if status is not None and status.state.name == "SUCCEEDED" else 1


def _check(job: JobConfig) -> None:
    """Refuses what the scheduler would find out later, or would silently leave out."""
    from torchx.schedulers import get_scheduler_factories

    from launch.cluster.app import port_taken, resource

    name, (_, hosts, processes) = job.scheduler, job.size
    known = sorted([*get_scheduler_factories(), JOBSET])
    if name not in known:
        raise InputError(f"scheduler {name}: unknown; there are {', '.join(known)}")
    try:
        host = resource(job.resource)
    except KeyError as error:
        raise InputError(f"resource {job.resource}: {error.args[0]}") from error
    if 0 < host.gpu < processes:
        raise InputError(
            f"hosts {job.hosts}: {processes} processes per host, but {job.resource} has {host.gpu} "
            "GPUs; at most one process per GPU"
        )
    if name in BARE and (job.image or job.mounts):
        what = "image" if job.image else "mounts"
        raise InputError(
            f"{what}: {name} starts no container, so it would be ignored; leave it out"
        )
    if name not in BARE and not job.image:
        raise InputError(f"image: {name} needs one; build it from launch/Dockerfile")
    check_secrets(job)
    if name != "local_cwd":
        for variable in exposed(job):
            logger.warning(
                "env.%s: looks like a secret, and its value stands in what is submitted: name where it is "
                "kept in secrets, or on Slurm export it in the shell that submits",
                variable,
            )
    if name == "slurm" and (wrong := [key for key, value in job.env.items() if "," in str(value)]):
        raise InputError(f"env.{wrong[0]}: slurm's srun --export cannot carry a comma")
    if name == "local_cwd" and job.retries:
        raise InputError("retries: local_cwd starts a job once; use restarts")
    if name in LOCAL and hosts > 1 and job.port and port_taken(job.port):
        raise InputError(f"port {job.port}: taken on this machine; choose another, or none")


def _plan(runner: Any, app: Any, job: JobConfig) -> Any:
    """What would be submitted."""
    from torchx.specs.api import InvalidRunConfigException

    name = job.scheduler
    try:
        known = runner.scheduler_run_opts(name)
        if wrong := [key for key in job.options if known.get(key) is None]:
            has = ", ".join(key for key, _ in known)
            raise InputError(f"options.{wrong[0]}: {name} has no such option; it has {has}")
        options: dict[str, Any] = {}
        for key, value in job.options.items():  # one by one: texts may hold commas
            if known.get(key).opt_type is str:
                options[key] = str(value)
            else:
                options |= known.cfg_from_str(f"{key}={value}")
        if name == "local_cwd" and job.log_dir:
            options.setdefault("log_dir", job.log_dir)
        plan = runner.dryrun(app, name, known.resolve(options))
        complete(plan.request, job)
        return plan
    except InvalidRunConfigException as error:
        raise InputError(f"options: {str(error).splitlines()[0]}") from error
    except ImportError as error:
        raise InputError(
            f"scheduler {name}: its client {error.name} is not installed: pip install {error.name} "
            "(for kubernetes: 'kubernetes<32', newer ones do not go with torchx)"
        ) from error


def _schedule(runner: Any, plan: Any, job: JobConfig) -> str:
    """Submits; what the scheduler's own command says stands on stderr already."""
    if folder := job.options.get("job_dir"):  # torchx makes it only when it copies a workspace
        Path(str(folder)).mkdir(parents=True)
    try:
        return runner.schedule(plan)
    except FileNotFoundError as error:
        raise InputError(f"scheduler {job.scheduler}: {error.filename} not found here") from error
    except subprocess.CalledProcessError as error:
        command = error.cmd[0] if isinstance(error.cmd, list) else error.cmd
        raise InputError(
            f"scheduler {job.scheduler}: {command} refused the job (exit code {error.returncode})"
        ) from error


def _show(runner: Any, handle: str, role: str, host: int) -> None:
    """Copies a host's output to stderr as it comes."""
    for line in runner.log_lines(handle, role, k=host, should_tail=True):
        sys.stderr.write(f"{host} {line}" if line.endswith("\n") else f"{host} {line}\n")
        sys.stderr.flush()
