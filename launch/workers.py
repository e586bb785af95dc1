"""Several processes of one module on this machine, through torchrun's own launcher."""

import os
import sys

INPUT_WAS_WRONG = 2


def run_workers(module: str, arguments: list[str], processes: int) -> int:
    """Runs `python -m module arguments…` as `processes` ranks.

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
    # One thread per rank unless the user chose: ranks that share cores and oversubscribe crawl.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        run_id="llm4msr",
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        monitor_interval=0.1,
    )
    try:
        elastic_launch(config, sys.executable)("-m", module, *arguments)
    except ChildFailedError as error:
        return max(error.get_first_failure()[1].exitcode, 1)
    except SignalException as error:  # its ranks have got the signal, too, and have ended
        return 128 + error.sigval
    return 0
