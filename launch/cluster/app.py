"""A stage as a torchx app: what a host runs, how hosts meet, what is restarted.

The job itself runs torchrun and never imports torchx, whose pins stay out of a training image.
"""

import random
import shlex
import socket
from collections.abc import Sequence
from pathlib import Path

import torchx.specs as specs

from launch.cluster.job import JobConfig, Machine, load_job
from llm_knowledge import job_store

STAGES = {
    "extract": ["knowledge", "extract"],
    # A restarted worker continues from the newest checkpoint of its run.
    "train": ["train", "--resume"],
    "evaluate": ["evaluate"],
    "profile": ["profile"],
    "pipeline": ["pipeline"],
}
# Restarted workers would meet their dead predecessors' keys in the store that agents and workers
# share by default since torch 2.5: every restart then fails on the port of a process that is gone.
ENVIRONMENT = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1", "OMP_NUM_THREADS": "1"}
# Agents compare the times of their heartbeats: hosts whose clocks differ by more than 5 s x this
# would drop each other. A job of fixed size needs no heartbeats, so a day is allowed.
FIXED_SIZE = "keep_alive_interval=5,keep_alive_max_attempt=17280"
RESOLVE = 'for i in {1..300}; do getent hosts "$host" >/dev/null && break; sleep 1; done'


def component(
    stage: str, arguments: Sequence[str], job: str | None, **flags: str | None
) -> specs.AppDef:
    """What the components have in common: `build`, with a job file and flags that override it."""
    return build(stage, list(arguments), load_job(Path(job) if job else None, [], **flags))


def build(
    stage: str, arguments: list[str], job: JobConfig, torchrun: Sequence[str] = ("torchrun",)
) -> specs.AppDef:
    """Describes a stage as a torchx app: one role, one replica per host, torchrun in each.

    Args:
        stage: A key of `STAGES`.
        arguments: What the stage's own command takes.
        job: Where and how it runs.
        torchrun: The command that starts the processes of a host.

    Raises:
        KeyError: No such named resource.
    """
    fewest, hosts, _ = job.size
    words = [*STAGES[stage], *arguments]
    return specs.AppDef(
        name=f"llm4msr-{stage}",
        roles=[
            specs.Role(
                name=stage,
                image=job.image or str(Path.cwd()),
                min_replicas=fewest,
                num_replicas=hosts,
                entrypoint="bash",
                args=["-c", _command(words, job, torchrun)],
                env=ENVIRONMENT | {name: str(value) for name, value in job.env.items()},
                resource=resource(job.resource),
                max_retries=job.retries,
                mounts=[
                    mount for text in job.mounts for mount in specs.parse_mounts(text.split(","))
                ],
            )
        ],
    )


def resource(machine: str | Machine) -> specs.Resource:
    """Resolves a machine; KeyError if there is none of that name."""
    if isinstance(machine, str):
        return specs.named_resources[machine]
    return specs.Resource(
        cpu=machine.cpu,
        gpu=machine.gpu,
        memMB=machine.memory_gib * 1024,
        capabilities=dict(machine.capabilities),
        devices=dict(machine.devices),
    )


def _command(words: list[str], job: JobConfig, torchrun: Sequence[str]) -> str:
    """The shell command of a host. torchx substitutes ${…}; a dollar that is to stay is doubled."""
    fewest, hosts, processes = job.size
    run = [*torchrun, "--nnodes", f"{fewest}:{hosts}" if fewest < hosts else str(hosts)]
    run += ["--nproc-per-node", str(processes), "--max-restarts", str(job.restarts)]
    run += ["--rdzv-backend", "c10d", "--tee", "3", "--role", ""]
    if 1 < fewest == hosts:
        run += ["--rdzv-conf", FIXED_SIZE]
    if job.log_dir:
        run += ["--log-dir", job.log_dir]
    if job.timeout_minutes:
        seconds = round(job.timeout_minutes * 60)
        run = ["timeout", "--signal", "TERM", "--kill-after", "60", str(seconds), *run]
    quoted, work = _quote(run), _quote(["-m", "launch", *words])
    if hosts == 1:
        # Nobody else has to reach the processes of one host: they meet in files, behind no port.
        folder = f'folder=$$(mktemp -d) && export {job_store.FILE}="$$folder/ranks"'
        meet = '--rdzv-conf store_type=file --rdzv-endpoint "$$folder/launcher"'
        return f"{folder} && exec {quoted} --rdzv-id {specs.macros.app_id} {meet} {work}"
    # The first host's name may be known a little later than the host itself is up.
    find = f"host=$${{{specs.macros.rank0_env}:=localhost}}; {RESOLVE.replace('$', '$$')}; "
    meet = f'--rdzv-id {specs.macros.app_id} --rdzv-endpoint "$$host:{job.port or free_port()}"'
    return f"{find}exec {quoted} {meet} {work}"


def _quote(words: list[str]) -> str:
    """Words of a shell's command that reach it through torchx as they are.

    torchx replaces ${NAME} where it builds the app, and its Slurm scheduler replaces `${app_id}` once more
    in the finished script, quoted or not: so the dollar stands apart from the brace.
    """
    return shlex.join(words).replace("${", "$''{").replace("$", "$$")


def free_port() -> int:
    """A port that nobody listens on here, outside of the range that clients draw theirs from."""
    while True:
        port = random.SystemRandom().randrange(15_000, 32_000)
        if not port_taken(port):
            return port


def port_taken(port: int) -> bool:
    """Whether somebody on this machine listens on a port."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError:
            return True
    return False
