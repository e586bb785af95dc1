"""Do the hosts of a job agree? Found out before anything is written, not from wrong results.

Times play no part in it: the clocks of the hosts may differ.
"""

import errno
import hashlib
import json
import os
import socket
import time
import uuid
from collections.abc import Mapping
from pathlib import Path

import torch.distributed as dist

from embeddings.versions import versions
from llm_knowledge.errors import InputError

PACKAGES = ("trainer", "embeddings", "llm_knowledge", "launch")
# A network file system may show a new file late; it does not take longer than its attribute cache.
PATIENCE_SECONDS = 10.0


def check_hosts(output: Path, work: object) -> None:
    """Refuses a job of several ranks whose hosts differ in versions, code, work or output folder.

    Args:
        output: Folder that all ranks write into; created if need be.
        work: What this rank is about to do, e.g. its configuration; JSON-able.

    Raises:
        InputError: On every rank (`shared`); names what differs on which hosts.
    """
    if dist.get_world_size() == 1:
        return
    facts = {name: value for name, value in versions().items() if name != "platform"}
    facts["code of llm4msr"] = _code_hash()
    facts["configuration"] = hashlib.sha256(
        json.dumps(work, sort_keys=True, default=str).encode()
    ).hexdigest()[:12]
    check_agreement(facts)
    check_shared(output)


def check_agreement(facts: Mapping[str, str]) -> None:
    """Compares facts of all ranks.

    Raises:
        InputError: On every rank; names each fact that differs, with its values and their hosts.
    """
    everywhere: list[tuple[str, Mapping[str, str]]] = [("", {})] * dist.get_world_size()
    dist.all_gather_object(everywhere, (socket.gethostname(), dict(facts)))
    differ = []
    for name in sorted({name for _, values_here in everywhere for name in values_here}):
        places: dict[str, list[str]] = {}
        for rank, (host, values_here) in enumerate(everywhere):
            places.setdefault(values_here.get(name, "missing"), []).append(f"{host} (rank {rank})")
        if len(places) > 1:
            values = "; ".join(f"{value} on {', '.join(hosts)}" for value, hosts in places.items())
            differ.append(f"{name}: {values}")
    if differ:
        raise InputError(
            "the hosts of this job differ in " + "\n  ".join(differ) + "\ninstall the same "
            "versions everywhere, and start all ranks with the same arguments",
            shared=True,
        )


def check_shared(folder: Path) -> None:
    """Checks that a file which rank 0 writes into `folder` is there for every rank.

    Raises:
        InputError: On every rank; names the hosts that do not see it, or why it cannot be written.
    """
    rank = dist.get_rank()
    name, problem = f".shared-{uuid.uuid4().hex}", ""
    created = False
    if rank == 0:
        created = not folder.exists()
        try:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / name).touch()
        except OSError as error:
            problem = os.strerror(error.errno or errno.EIO)
    sent = [name, problem]
    dist.broadcast_object_list(sent, src=0)
    name, problem = sent
    if problem:
        raise InputError(f"{folder}: cannot be written on the first host: {problem}", shared=True)
    everywhere: list[tuple[str, bool]] = [("", False)] * dist.get_world_size()
    dist.all_gather_object(everywhere, (socket.gethostname(), _appears(folder, name)))
    if rank == 0:
        (folder / name).unlink()
        if created:
            folder.rmdir()
    blind = [
        f"{host} (rank {number})" for number, (host, sees) in enumerate(everywhere) if not sees
    ]
    if blind:
        raise InputError(
            f"{folder}: is not shared: a file that {everywhere[0][0]} (rank 0) wrote there is not "
            f"seen by {', '.join(blind)}; choose an output on a file system that all hosts mount",
            shared=True,
        )


def _appears(folder: Path, name: str) -> bool:
    end = time.monotonic() + PATIENCE_SECONDS
    while True:
        try:
            if name in os.listdir(folder):  # unlike a lookup, listing asks the server again
                return True
        except OSError:
            pass  # no such folder here: it may appear
        if time.monotonic() > end:
            return False
        time.sleep(0.1)


def _code_hash() -> str:
    """Hash over the project's own source files, for checkouts that share a version number."""
    root, digest = Path(__file__).parents[2], hashlib.sha256()
    for file in sorted(file for package in PACKAGES for file in (root / package).rglob("*.py")):
        digest.update(str(file.relative_to(root)).encode() + file.read_bytes())
    return digest.hexdigest()[:12]
