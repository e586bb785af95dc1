"""How the benchmarks of the meta layer measure, and how they write what they found.

On CUDA every form is captured several times over in a graph, and the graph is what is timed: a layer takes
tens of microseconds there, and to launch its kernels from Python takes longer.
"""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from embeddings.profiling.measure import machine
from trainer.profiling.meta_layer import interleaved

CAPTURED = 10  # calls in a graph


def captured(call: Callable[[], Any], pool: Any) -> Callable[[], None]:
    """A CUDA graph of CAPTURED calls, as a call; graphs of one pool share their memory."""
    call()  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        for _ in range(CAPTURED):
            call()
    return graph.replay


def timed(calls: dict[str, Callable[[], Any]], rounds: int, device: str) -> dict[str, list[float]]:
    """Seconds of each call per round, by name; on CUDA without the time that launching takes."""
    if device == "cpu":
        return interleaved(calls, rounds, device)
    pool = torch.cuda.graph_pool_handle()
    graphs: dict[str, Callable[[], Any]] = {
        name: captured(call, pool) for name, call in calls.items()
    }
    seconds = interleaved(graphs, rounds, device)
    return {name: [one / CAPTURED for one in found] for name, found in seconds.items()}


def peak_bytes(call: Callable[[], Any], device: str) -> int | None:
    """Most memory of CUDA that a call takes above what was there before it; None on a CPU."""
    if device == "cpu":
        return None
    call()  # compiles
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def begin(rounds: int, dtype: str) -> dict[str, Any]:
    """Prints the machine and gives a report without shapes yet."""
    report: dict[str, Any] = {"machine": machine(), "rounds": rounds, "dtype": dtype, "shapes": []}
    print(report["machine"], end="\n\n")
    return report


def finish(report: dict[str, Any], out: Path | None) -> None:
    """Adds and prints the load, and writes the report if a file is named; it appears whole, by rename."""
    report["load_after"] = os.getloadavg()[0]
    print("load after:", report["load_after"])
    if out:
        out.parent.mkdir(parents=True, exist_ok=True)
        partial = out.with_suffix(".partial")
        partial.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        partial.replace(out)
