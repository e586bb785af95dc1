"""Forks the ranks of a process group from a process that has imported everything: a group costs a second."""

import faulthandler
import multiprocessing
import os
import pickle
import shutil
import signal
import tempfile
import time
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

GROUP_TIMEOUT = timedelta(seconds=45)  # for the others in one collective; less than `join` waits


class Ranks:
    """Running ranks that meet over gloo and call `function(rank, *arguments)` each.

    What they raise stands on stderr behind "Process rank 1 of 2:".

    Args:
        world_size: Number of ranks.
        function: What every rank calls; forked, it may be a closure.
        arguments: Of the function, behind the rank.
        per_host: Ranks that take themselves for one host; default: all.
    """

    def __init__(
        self,
        world_size: int,
        function: Callable[..., Any],
        *arguments: Any,
        per_host: int | None = None,
    ) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="ranks-"))

        def rank_main(rank: int) -> None:
            faulthandler.register(signal.SIGUSR2, file=2)
            torch.set_num_threads(1)
            host = per_host or world_size
            os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world_size)}
            os.environ |= {"LOCAL_RANK": str(rank % host), "LOCAL_WORLD_SIZE": str(host)}
            store = dist.FileStore(str(self._folder / "rendezvous"), world_size)
            dist.init_process_group(
                "gloo",
                store=store,
                rank=rank,
                world_size=world_size,
                timeout=GROUP_TIMEOUT,
            )
            # A rank that ends before another has connected to it would be taken for a dead one.
            dist.barrier()
            result = function(rank, *arguments)
            self._result(rank).write_bytes(pickle.dumps(result))
            dist.destroy_process_group()

        context = multiprocessing.get_context("fork")
        self.processes: list[BaseProcess] = [
            context.Process(
                target=rank_main, args=(rank,), name=f"rank {rank} of {world_size}", daemon=True
            )
            for rank in range(world_size)
        ]
        for process in self.processes:
            process.start()

    def _result(self, rank: int) -> Path:
        return self._folder / f"{rank}.pickle"

    def join(self, timeout: float = 60.0, codes: tuple[int, ...] = (0,)) -> list[Any]:
        """Waits until all ranks have ended or one has failed; none is alive after that.

        Args:
            timeout: Seconds for all of them together.
            codes: Exit codes that are no failure; negative: of a signal.

        Returns:
            What the function returned, rank by rank; None where it did not.

        Raises:
            RuntimeError: Names the ranks that failed or hung; of these, stacks stand on stderr.
        """
        end, ranks = time.monotonic() + timeout, self.processes
        try:
            while True:
                failed = [p for p in ranks if p.exitcode not in (None, *codes)]
                living = [p for p in ranks if p.exitcode is None]
                if failed or not living or time.monotonic() > end:
                    break
                time.sleep(0.01)
            if living and not failed:
                for process in living:
                    assert process.pid is not None
                    os.kill(process.pid, signal.SIGUSR2)
                time.sleep(0.5)  # for the stacks
            if failed or living:
                ended = [f"{p.name} ended with exit code {p.exitcode}" for p in failed]
                hung = [f"{p.name} hung for {timeout:.0f} s" for p in living if not failed]
                raise RuntimeError("; ".join(ended + hung))
            files = [self._result(rank) for rank in range(len(ranks))]
            return [pickle.loads(f.read_bytes()) if f.exists() else None for f in files]
        finally:
            for process in ranks:
                process.kill()
                process.join()
            shutil.rmtree(self._folder, ignore_errors=True)
