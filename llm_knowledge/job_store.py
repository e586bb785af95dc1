"""The key-value store through which the processes of a job meet.

Processes of one machine meet in a file that only their user can open. A store behind a port would take
what anybody who reaches the machine writes there, and its readers unpickle it.
"""

from __future__ import annotations

import os
import socket
from datetime import timedelta
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch.distributed as dist

FILE = "LLM4MSR_STORE"  # the environment variable that names the file


def open_job_store(timeout: timedelta) -> tuple[dist.Store, int, int]:
    """Opens the store that the launcher made, in a file or behind a port.

    Returns:
        Store, rank of this process, number of processes.

    Raises:
        ValueError, RuntimeError: The launcher's environment is incomplete, or its store not reached.
    """
    import torch.distributed as dist
    from torch.distributed.rendezvous import rendezvous

    file = os.environ.get(FILE)
    if file is None:
        return next(rendezvous("env://", timeout=timeout))
    # Without a number of processes, so that the last to leave does not remove the file under others.
    store = dist.FileStore(file)
    store.set_timeout(timeout)
    # Processes that are started again must not see the keys of dead ones.
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    return dist.PrefixStore(f"attempt-{attempt}", store), rank, world


def loopback() -> dict[str, str]:
    """The environment in which gloo and NCCL listen on this machine's own interface only."""
    names = {name for _, name in socket.if_nameindex()}
    name = next((name for name in ("lo", "lo0") if name in names), None)
    return {"GLOO_SOCKET_IFNAME": name, "NCCL_SOCKET_IFNAME": name} if name else {}
