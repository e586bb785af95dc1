"""A stage as a Kubernetes JobSet, for clusters without Volcano, which torchx's kubernetes asks for.

JobSet is the Kubernetes project's own kind for jobs whose pods must know each other; Kueue queues it.
"""

import secrets
from typing import Any

import torchx.specs as specs

from launch.cluster.job import JobConfig
from launch.cluster.manifests import kubernetes_command, kubernetes_secrets
from llm_knowledge.errors import InputError
from llm_knowledge.yaml_files import dump_yaml

OPTIONS = ("namespace", "queue", "service_account", "priority_class")
HOSTS = "hosts"


def manifest(app: specs.AppDef, job: JobConfig) -> str:
    """Writes the YAML that kubectl submits.

    Args:
        app: What `launch.cluster.app.build` returned for `job`.
        job: `options` may name `namespace`, `queue` (Kueue's local queue), `service_account` and
            `priority_class`; `retries` restarts all pods.

    Raises:
        InputError: Another option, or a mount that a pod cannot have.
    """
    if wrong := [key for key in job.options if key not in OPTIONS]:
        raise InputError(
            f"options.{wrong[0]}: jobset has no such option; it has {', '.join(OPTIONS)}"
        )
    name = f"{app.name}-{secrets.token_hex(3)}"
    values = specs.macros.Values(
        img_root="", app_id=name, replica_id="", rank0_env="LLM4MSR_FIRST_HOST"
    )
    role = values.apply(app.roles[0])
    # JobSet names a pod's host after set, job, index of the job and index of the pod.
    role.env["LLM4MSR_FIRST_HOST"] = f"{name}-{HOSTS}-0-0.{name}"
    metadata: dict[str, Any] = {"name": name}
    if "namespace" in job.options:
        metadata["namespace"] = job.options["namespace"]
    if "queue" in job.options:
        metadata["labels"] = {"kueue.x-k8s.io/queue-name": job.options["queue"]}
    hosts = {
        "parallelism": role.num_replicas,
        "completions": role.num_replicas,
        "completionMode": "Indexed",
        "backoffLimit": 0,  # a pod that fails ends the set, which then starts again as a whole
        "template": {"spec": _pod(role, job)},
    }
    document = {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": metadata,
        "spec": {
            "failurePolicy": {"maxRestarts": role.max_retries},
            "replicatedJobs": [{"name": HOSTS, "replicas": 1, "template": {"spec": hosts}}],
        },
    }
    return dump_yaml(document)


def _pod(role: specs.Role, job: JobConfig) -> dict[str, Any]:
    mounts, volumes = _mounts(role)
    machine = role.resource
    amounts: dict[str, Any] = {"cpu": str(machine.cpu), "memory": f"{machine.memMB}Mi"}
    if machine.gpu:
        amounts["nvidia.com/gpu"] = str(machine.gpu)
    amounts |= {device: str(count) for device, count in machine.devices.items()}
    pod: dict[str, Any] = {
        "restartPolicy": "Never",
        "containers": [
            {
                "name": role.name,
                "image": role.image,
                "command": kubernetes_command([role.entrypoint, *role.args]),
                "env": [
                    *({"name": key, "value": value} for key, value in role.env.items()),
                    *kubernetes_secrets(job),
                ],
                "resources": {"requests": amounts, "limits": dict(amounts)},
                "volumeMounts": mounts,
            }
        ],
        "volumes": volumes,
    }
    if machine.capabilities:
        pod["nodeSelector"] = dict(machine.capabilities)
    if "service_account" in job.options:
        pod["serviceAccountName"] = job.options["service_account"]
    if "priority_class" in job.options:
        pod["priorityClassName"] = job.options["priority_class"]
    return pod


def _mounts(role: specs.Role) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Mounts of the container and volumes of the pod; shared memory for NCCL and loaders is one."""
    mounts: list[dict[str, Any]] = [{"name": "shared-memory", "mountPath": "/dev/shm"}]
    volumes: list[dict[str, Any]] = [{"name": "shared-memory", "emptyDir": {"medium": "Memory"}}]
    for number, mount in enumerate(role.mounts):
        name = f"mount-{number}"
        if isinstance(mount, specs.BindMount):
            source = {"hostPath": {"path": mount.src_path}}
        elif isinstance(mount, specs.VolumeMount):
            source = {"persistentVolumeClaim": {"claimName": mount.src}}
        else:
            raise InputError("mounts: jobset mounts type=bind and type=volume; devices by resource")
        volumes.append({"name": name, **source})
        mounts.append({"name": name, "mountPath": mount.dst_path, "readOnly": mount.read_only})
    return mounts, volumes
