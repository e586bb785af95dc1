"""Processes, devices and seeds; the only reader of the launcher's environment."""

import ctypes
import os
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist

from llm_knowledge import job_store
from llm_knowledge.errors import InputError

T = TypeVar("T")


@dataclass(frozen=True)
class Runtime:
    """Where this process stands in the job."""

    rank: int
    world_size: int
    ranks_per_host: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which prints and writes shared files."""
        return self.rank == 0


@contextmanager
def distributed(timeout_seconds: int) -> Iterator[Runtime]:
    """Joins the process group that torchrun describes, or makes one of a single process.

    Uses NCCL and this rank's GPU where there is one, gloo and the CPU otherwise. A group that exists
    already is used and left alone, so several runs can follow each other in one job.

    Raises:
        InputError: More ranks than GPUs on this host, or the ranks cannot meet.
    """
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if "TORCHELASTIC_RUN_ID" in os.environ:
        _end_with_parent()
    # What was called last is kept, for the report of a rank that stands still.
    os.environ.setdefault("TORCH_FR_BUFFER_SIZE", "1000")
    use_gpu = torch.cuda.is_available()
    device = (
        torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        if use_gpu
        else torch.device("cpu")
    )
    if use_gpu:
        ranks, devices = int(os.environ.get("LOCAL_WORLD_SIZE", "1")), torch.cuda.device_count()
        if ranks > devices:
            raise InputError(
                f"{ranks} ranks on {socket.gethostname()}, which has {devices} GPUs: start at most "
                "one rank per GPU"
            )
        torch.cuda.set_device(device)
    owner = not dist.is_initialized()
    if owner:
        backend = "cuda:nccl,cpu:gloo" if use_gpu else "gloo"
        timeout = timedelta(seconds=timeout_seconds)
        if world == 1 or job_store.FILE in os.environ:  # all on this machine
            for name, interface in job_store.loopback().items():
                os.environ.setdefault(name, interface)
        if world > 1:
            try:
                store, rank, world = job_store.open_job_store(timeout)
                store = dist.PrefixStore("default_pg", store)
                dist.init_process_group(
                    backend, store=store, rank=rank, world_size=world, timeout=timeout
                )
            except (ValueError, RuntimeError) as error:
                address = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
                raise InputError(
                    f"rank {rank} of {world} cannot meet the others at {address}: "
                    f"{str(error).splitlines()[0]}; choose another MASTER_PORT, or start the ranks "
                    "with torchrun"
                ) from error
        else:
            dist.init_process_group(
                backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout
            )
    try:
        yield Runtime(rank, world, int(os.environ.get("LOCAL_WORLD_SIZE", "1")), device)
    finally:
        if owner:
            dist.destroy_process_group()


def _end_with_parent() -> None:
    """Lets the kernel send SIGTERM when the launcher's agent dies.

    Its ranks lead sessions of their own, so that nothing else would end them: they would go on beside
    those that a new agent starts.
    """
    parent = os.getppid()
    try:
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
    except (OSError, AttributeError):
        return  # not Linux
    if os.getppid() != parent:  # it died before
        os.kill(os.getpid(), signal.SIGTERM)


def seed_step(seed: int, rank: int, step: int) -> None:
    """Seeds dropout and noise of one step, so that a resumed run draws what the first one drew.

    What `torch.manual_seed` does, but without its walk up the stack on machines without CUDA, which
    costs some tenths of a millisecond per step.
    """
    number = (seed * 1_000_003 + step) * 4_096 + rank
    torch.default_generator.manual_seed(number)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed(number)


def on_all_ranks(action: Callable[[], T], group: dist.ProcessGroup | None = None) -> T:
    """Runs `action` on every rank; bad input found by any is raised on all of them.

    Without this the rank that finds it leaves and the others wait until their timeout.

    Args:
        action: What to run.
        group: The process group to agree over; None: the default one.

    Raises:
        InputError: With the message of the lowest rank that failed; `shared` is set, so that one rank
            can speak for all.
    """
    result: T | None = None
    problem: str | None = None
    try:
        result = action()
    except InputError as error:
        problem = str(error)
    problems: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(problems, problem, group=group)
    failures = [(rank, text) for rank, text in enumerate(problems) if text]
    if failures:
        rank, text = failures[0]
        everywhere = len({text for _, text in failures}) == 1 and len(failures) == len(problems)
        raise InputError(text if everywhere else f"rank {rank}: {text}", shared=True)
    return result  # type: ignore[return-value]
