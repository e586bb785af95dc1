"""Several processes of one module on this machine, through torchrun's own launcher."""

import os
import sys
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from llm_knowledge import job_store

INPUT_WAS_WRONG = 2


def run_workers(module: str, arguments: list[str], processes: int) -> int:
    """Runs `python -m module arguments…` as `processes` ranks.

    The launcher and the ranks meet in files below a folder that only this user can open, and ranks
    exchange numbers over the loopback interface: no port is open to other machines.

    Returns:
        0, or the exit code of the rank that failed first (so that 2 still means bad input); 128 and
        the signal's number if one ended this process.
    """
    import logging

    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    # A rank says itself what was wrong; the launcher's own lines about its exit code add nothing.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    with tempfile.TemporaryDirectory(prefix="llm4msr-") as folder:
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=processes,
            run_id=uuid.uuid4().hex,
            rdzv_backend="c10d",
            rdzv_configs={"store_type": "file"},
            rdzv_endpoint=str(Path(folder) / "launcher"),
            max_restarts=0,
            monitor_interval=0.1,
        )
        with _environment(Path(folder)):
            try:
                elastic_launch(config, sys.executable)("-m", module, *arguments)
            except ChildFailedError as error:
                return max(error.get_first_failure()[1].exitcode, 1)
            except SignalException as error:  # its ranks have got the signal, too, and have ended
                return 128 + error.sigval
    return 0


@contextmanager
def _environment(folder: Path) -> Iterator[None]:
    """What ranks inherit; the user's own choices stay, the store's place does not."""
    before = dict(os.environ)
    # One thread per rank unless the user chose: ranks that share cores and oversubscribe crawl.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    # Else the launcher opens a second store for the ranks, behind a port.
    os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    os.environ[job_store.FILE] = str(folder / "ranks")
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
