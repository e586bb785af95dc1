"""The cluster that tables are planned for: configured, read off the machine, or not there at all."""

import os
import shutil
from dataclasses import dataclass

import torch

from embeddings.sharding import Hardware
from llm_knowledge.errors import InputError
from trainer.config.tables import HardwareConfig
from trainer.distributed.process_group import Runtime

GIB = 2**30
# Of a cluster that is not there and of which nothing is said: a host of eight H100.
ABSENT_DEVICE_GIB = 80.0
ABSENT_HOST_GIB = 2048.0


@dataclass(frozen=True)
class Cluster:
    """Size of a cluster."""

    hosts: int
    ranks_per_host: int
    device: str


def make_hardware(
    given: HardwareConfig, cluster: Cluster, device_gib: float, host_gib: float, ssd_gib: float
) -> Hardware:
    """Puts configured rates and sizes together; sizes in GiB (2**30 bytes), of a device or a host."""
    return Hardware(
        hosts=cluster.hosts,
        ranks_per_host=cluster.ranks_per_host,
        device=cluster.device,
        device_memory=int(device_gib * GIB) if cluster.device == "cuda" else 0,
        host_memory=int(host_gib * GIB),
        device_bandwidth=given.device_bandwidth_gbs * 1e9,
        host_bandwidth=given.host_bandwidth_gbs * 1e9,
        intra_host=given.intra_host_gbs * 1e9,
        inter_host=given.inter_host_gbs * 1e9,
        reserved=given.reserved,
        host_to_device=given.host_to_device_gbs * 1e9,
        ssd=int(ssd_gib * GIB),
        ssd_bandwidth=given.ssd_gbs * 1e9,
    )


def this_cluster(
    given: HardwareConfig, runtime: Runtime, key_value_directory: str | None = None
) -> Hardware:
    """The job's own, with this machine's memory where none is configured.

    Args:
        given: What is configured.
        runtime: The job.
        key_value_directory: On SSD; its free space counts where `given` names none.

    Raises:
        InputError: If that folder does not exist.
    """
    device_gib = given.device_memory_gib
    if device_gib is None and runtime.device.type == "cuda":
        device_gib = torch.cuda.get_device_properties(runtime.device).total_memory / GIB
    host_gib = given.host_memory_gib
    if host_gib is None:
        host_gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB
    ssd_gib = given.ssd_gib
    if ssd_gib is None and key_value_directory is not None:
        try:
            ssd_gib = shutil.disk_usage(key_value_directory).free / GIB
        except OSError as error:
            raise InputError(
                f"tables.key_value_directory: {key_value_directory}: {error.strerror}"
            ) from error
    per_host = min(runtime.ranks_per_host, runtime.world_size)
    cluster = Cluster(runtime.world_size // per_host, per_host, runtime.device.type)
    return make_hardware(given, cluster, device_gib or 0, host_gib, ssd_gib or 0)


def absent_cluster(given: HardwareConfig, cluster: Cluster) -> Hardware:
    """One that is not there; memory of which nothing is said is that of a host of eight H100."""
    return make_hardware(
        given,
        cluster,
        given.device_memory_gib or ABSENT_DEVICE_GIB,
        given.host_memory_gib or ABSENT_HOST_GIB,
        given.ssd_gib or 0,
    )
