"""What our manifests of containers need beyond torchx's: secrets by reference, dollars that stay.

torchx knows environment variables by value only, and does not know that Kubernetes reads `$(NAME)` in a
command.
"""

import re
from typing import Any

from launch.cluster.job import JobConfig
from llm_knowledge.errors import InputError

# Schedulers whose manifests can name a secret.
BY_REFERENCE = ("jobset", "kubernetes", "aws_batch")
LIKE_A_SECRET = re.compile(
    r"(^|_)(KEY|APIKEY|TOKEN|SECRET|PASSWORD|PASSWD|PASSPHRASE|CREDENTIALS?)(_|$)", re.IGNORECASE
)
URL_WITH_PASSWORD = re.compile(r"://[^/@:\s]*:[^/@\s]+@")


def exposed(job: JobConfig) -> list[str]:
    """Names of variables whose values look like secrets and would stand in what is submitted."""
    return [
        name
        for name, value in job.env.items()
        if LIKE_A_SECRET.search(name) or URL_WITH_PASSWORD.search(str(value))
    ]


def check_secrets(job: JobConfig) -> None:
    """Checks that the scheduler can take the secrets of a job by reference.

    Raises:
        InputError: It cannot, or a reference is not written as it needs it.
    """
    if job.secrets and job.scheduler not in BY_REFERENCE:
        raise InputError(
            f"secrets: {job.scheduler} knows none by reference; its jobs inherit the environment of the "
            "shell that submits them: export the variable there"
        )
    for name, reference in job.secrets.items():
        if name in job.env:
            raise InputError(f"secrets.{name}: is in env as well; take it out there")
        if job.scheduler != "aws_batch" and not re.fullmatch(r"[a-z0-9.-]+/[\w.-]+", reference):
            raise InputError(
                f"secrets.{name}: {reference!r}: write the Kubernetes secret and its key as secret/key"
            )


def kubernetes_secrets(job: JobConfig) -> list[dict[str, Any]]:
    """The secrets of a job as entries of a container's `env`."""
    entries = []
    for name, reference in job.secrets.items():
        secret, _, key = reference.partition("/")
        entries.append({"name": name, "valueFrom": {"secretKeyRef": {"name": secret, "key": key}}})
    return entries


def kubernetes_command(words: list[str]) -> list[str]:
    """A command as Kubernetes has to read it, to which `$$` is a dollar and `$(NAME)` a variable."""
    return [word.replace("$", "$$") for word in words]


def complete(request: Any, job: JobConfig) -> None:
    """Completes what torchx would submit: Kubernetes' commands, secrets of Kubernetes and AWS Batch."""
    if job.scheduler == "kubernetes":
        from torchx.schedulers.kubernetes_scheduler import sanitize_for_serialization

        request.resource = sanitize_for_serialization(request.resource)
        for task in request.resource["spec"]["tasks"]:
            for container in task["template"]["spec"]["containers"]:
                container["command"] = kubernetes_command(container["command"])
                container["env"] += kubernetes_secrets(job)
    if job.scheduler == "aws_batch" and job.secrets:
        references = [{"name": name, "valueFrom": value} for name, value in job.secrets.items()]
        definition = request.job_def
        containers = [
            hosts["container"]
            for hosts in definition.get("nodeProperties", {}).get("nodeRangeProperties", [])
        ] or [definition["containerProperties"]]
        for container in containers:
            container["secrets"] = references
