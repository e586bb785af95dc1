"""`llm4msr launch`: a stage through a torchx scheduler."""

import sys
from pathlib import Path

from llm_knowledge.errors import InputError

STAGES = ("train", "extract")
LOCAL = ("local_cwd", "local_docker")


def submit(
    stage: str,
    arguments: list[str],
    scheduler: str,
    hosts: str,
    dryrun: bool,
    options: dict[str, str],
    resource: str | None = None,
    gpu: int = 0,
) -> int:
    """Submits a stage; local schedulers are waited for, others get the job and return.

    Args:
        stage: One of `STAGES`.
        arguments: What the stage's own command takes.
        scheduler: A scheduler that torchx knows.
        hosts: "NxM", hosts x processes per host.
        dryrun: Print what would be submitted, submit nothing.
        options: The scheduler's own options, e.g. {"partition": "main"}.
        resource: Named resource of a host.
        gpu: GPUs per host, when no resource is named.

    Returns:
        0 when submitted (local: succeeded), 1 when a local job failed.

    Raises:
        InputError: Unknown scheduler, resource or option; torchx missing.
    """
    try:
        from torchx.runner import get_runner
        from torchx.schedulers import get_scheduler_factories
        from torchx.specs import named_resources
    except ImportError as error:
        raise InputError(
            "launch needs torchx: pip install 'llm4msr[launch]', or use torchrun itself"
        ) from error
    from launch import components

    known = sorted(get_scheduler_factories())
    if scheduler not in known:
        raise InputError(f"--scheduler {scheduler}: unknown; torchx has {', '.join(known)}")
    if resource is not None:
        try:
            named_resources[resource]
        except KeyError as error:
            raise InputError(f"--resource {resource}: {error.args[0]}") from error
    try:
        app = getattr(components, stage)(
            *arguments, j=hosts, h=resource, gpu=gpu, image=str(Path.cwd())
        )
    except ValueError as error:
        raise InputError(
            f"-j {hosts}: {error}; write hosts x processes per host, e.g. 2x8"
        ) from error
    for role in app.roles:
        if scheduler in LOCAL[:1]:  # the job finds this very interpreter's torchrun
            role.env["PATH"] = f"{Path(sys.executable).parent}:/usr/local/bin:/usr/bin:/bin"
    with get_runner() as runner:
        settings = runner.scheduler_run_opts(scheduler).resolve(dict(options))
        plan = runner.dryrun(app, scheduler, settings)
        if dryrun:
            print(plan)
            return 0
        handle = runner.schedule(plan)
        print(f"submitted {handle}", file=sys.stderr)
        if scheduler not in LOCAL:
            print(f"watch it with: torchx status {handle}; torchx log {handle}", file=sys.stderr)
            return 0
        status = runner.wait(handle, wait_interval=0.5)
        for role in app.roles:
            for line in runner.log_lines(handle, role.name, k=0):
                sys.stderr.write(line if line.endswith("\n") else line + "\n")
        return 0 if status is not None and status.state.name == "SUCCEEDED" else 1
