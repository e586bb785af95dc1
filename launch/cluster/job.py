"""Where and how a stage runs: the job file. What runs is the stage's own configuration.

The two are kept apart so that a run can be continued elsewhere, or by torchrun, as it is.
"""

import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from pydantic import Field, field_validator

from trainer.config.run import load_section
from trainer.config.tables import Section

LINE_ENDS = "\x7f\x85\u2028\u2029"


class Machine(Section):
    """A host, for machines that have no name."""

    cpu: int = Field(default=2, ge=1, description="Cores.")
    gpu: int = Field(default=0, ge=0, description="GPUs.")
    memory_gib: int = Field(default=8, ge=1, description="Memory.")
    capabilities: dict[str, str] = Field(
        default={}, description="What the scheduler selects hosts by, e.g. a Kubernetes node label."
    )
    devices: dict[str, int] = Field(
        default={}, description="Further devices, e.g. `vpc.amazonaws.com/efa: 32`."
    )


class JobConfig(Section):
    """A job."""

    scheduler: str = Field(
        default="local_cwd", description="A scheduler of torchx, or jobset (Kubernetes)."
    )
    hosts: str = Field(
        default="1x2",
        description="Hosts x processes per host; MIN:MAXxPROCESSES may shrink and grow.",
    )
    resource: str | Machine = Field(
        default="cpu", description="A host: a named resource, or cpu, gpu and memory_gib."
    )
    image: str | None = Field(
        default=None, description="Container image; local_cwd and slurm run in this folder instead."
    )
    restarts: int = Field(
        default=3, ge=0, description="Times that the workers may be started again within the job."
    )
    retries: int = Field(
        default=0, ge=0, description="Times that the scheduler may start the whole job again."
    )
    timeout_minutes: float | None = Field(
        default=None, gt=0, description="Then the job gets SIGTERM, and SIGKILL a minute later."
    )
    env: dict[str, str | int | float] = Field(default={}, description="Environment variables.")
    secrets: dict[str, str] = Field(
        default={},
        description="Environment variables by reference, so that no value stands in a manifest: secret/key "
        "of a Kubernetes secret, or what AWS Batch calls valueFrom.",
    )
    mounts: list[str] = Field(
        default=[],
        description="Of containers, e.g. `type=bind,src=/data,dst=/data,readonly`; "
        "type=volume names a persistent volume claim or an EFS file system.",
    )
    log_dir: str | None = Field(
        default=None, description="Folder, on every host, that keeps the output of every process."
    )
    port: int | None = Field(
        default=None,
        ge=1024,
        le=65_535,
        description="Where several hosts meet, on the first one; null: one that is free here.",
    )
    options: dict[str, str | int | float | bool] = Field(
        default={}, description="The scheduler's own, see `torchx runopts SCHEDULER`."
    )

    @field_validator("hosts")
    @classmethod
    def _hosts_by_processes(cls, value: str) -> str:
        size = re.fullmatch(r"(?:(\d+):)?(\d+)x(\d+)", value)
        if not size or int(size[2]) < 1 or int(size[3]) < 1:
            raise ValueError("write hosts x processes per host, e.g. 2x8")
        if size[1] and not 1 <= int(size[1]) <= int(size[2]):
            raise ValueError("MIN:MAXxPROCESSES needs 1 <= MIN <= MAX")
        return value

    @field_validator(
        "scheduler", "image", "log_dir", "mounts", "options", "env", "secrets", "resource"
    )
    @classmethod
    def _on_one_line(cls, value: Any) -> Any:
        """Refuses what would begin a line of its own in the script or manifest that is submitted."""
        for key, text in _texts_in(value):
            if any(ord(character) < 32 or character in LINE_ENDS for character in text):
                where = f"{key}: " if key else ""
                raise ValueError(f"{where}{text!r} holds a line break or another control character")
        return value

    @field_validator("env", "secrets")
    @classmethod
    def _names_of_variables(cls, value: dict[str, Any]) -> dict[str, Any]:
        for name in value:
            if not re.fullmatch(r"[A-Za-z_]\w*", name):
                raise ValueError(f"{name} is not a variable's name")
        return value

    @property
    def size(self) -> tuple[int, int, int]:
        """Fewest hosts, hosts, processes per host."""
        fewest, hosts, processes = re.fullmatch(r"(?:(\d+):)?(\d+)x(\d+)", self.hosts).groups()  # type: ignore[union-attr]
        return int(fewest or hosts), int(hosts), int(processes)


def _texts_in(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Every text in a value, with the key that it stands under; keys are texts, too."""
    if isinstance(value, str):
        yield key, value
    elif isinstance(value, Section):
        yield from _texts_in(value.model_dump(), key)
    elif isinstance(value, dict):
        for name, part in value.items():
            yield from _texts_in(name, key)
            yield from _texts_in(part, str(name))
    elif isinstance(value, list):
        for part in value:
            yield from _texts_in(part, key)


def load_job(file: Path | None, overrides: Iterable[str] = (), **flags: str | None) -> JobConfig:
    """Reads a job file; assignments override it, flags that were given override both.

    Raises:
        InputError: Names every wrong field.
    """
    of_flags = [f"{name}={json.dumps(value)}" for name, value in flags.items() if value is not None]
    return load_section(JobConfig, file, [*overrides, *of_flags])
