"""What a measurement stands on: the machine, its bandwidths, medians and quartiles."""

import os
import platform
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

# Bytes per second of a GPU's memory by NVIDIA's data sheets (SXM), by what the GPU's name has in it.
MEMORY_BANDWIDTH = {"A100-SXM4-80GB": 2.039e12, "H100": 3.35e12, "H200": 4.8e12}
COPY_BYTES = 256 * 2**20  # far beyond any cache
REPEATS = 5


def summary(values: list[float]) -> dict[str, float]:
    """Median and quartiles."""
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return {"median": middle, "low": low, "high": high}


def machine() -> dict[str, Any]:
    """Hardware and versions that a figure depends on."""
    model = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            model = next(line.split(":")[1].strip() for line in file if "model name" in line)
    except (OSError, StopIteration):
        pass  # not Linux, or a processor without a name
    return {
        "processor": model,
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "load": os.getloadavg()[0],
    }


class Clock:
    """Times calls; on CUDA between two events, with the device idle before and after."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"

    def start(self) -> tuple[float, float, Any]:
        """Begins a measurement."""
        event = None
        if self._cuda:
            torch.cuda.synchronize()
            event = torch.cuda.Event(enable_timing=True)
            event.record()
        return time.perf_counter(), time.process_time(), event

    def stop(self, began: tuple[float, float, Any]) -> tuple[float, float]:
        """Returns seconds passed, and seconds that this process spent on processors."""
        if self._cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            event.synchronize()
            return began[2].elapsed_time(event) / 1e3, time.process_time() - began[1]
        return time.perf_counter() - began[0], time.process_time() - began[1]

    def median(self, call: Callable[[], object]) -> float:
        """Median seconds of a call, after one for warmth."""
        call()
        seconds = []
        for _ in range(REPEATS):
            began = self.start()
            call()
            seconds.append(self.stop(began)[0])
        return statistics.median(seconds)


def data_sheet_bandwidth(gpu: str | None) -> float | None:
    """Bytes per second that the data sheet promises of a GPU's memory.

    Args:
        gpu: Its name as torch has it, like "NVIDIA H100 80GB HBM3"; None on a CPU.

    Returns:
        None of a CPU, of a GPU that is not in the table, and of a card with slower memory than its name's
        (PCIe, NVL).
    """
    if gpu is None or "PCIe" in gpu or "NVL" in gpu:
        return None
    return next((rate for name, rate in MEMORY_BANDWIDTH.items() if name in gpu), None)


def copy_bandwidth(device: torch.device, size: int = COPY_BYTES) -> float:
    """Bytes per second of a large copy, reads and writes both counted."""
    source = torch.ones(size // 4, device=device)
    target = torch.empty_like(source)
    return 2 * size / Clock(device).median(lambda: target.copy_(source))


def gather_bandwidth(
    rows: int, dim: int, count: int, dtype: torch.dtype, device: torch.device
) -> float:
    """Bytes per second of reading `count` random rows [rows, dim] and writing them down, both counted."""
    table = torch.ones(rows, dim, dtype=dtype, device=device)
    chosen = torch.randint(rows, (count,), device=device)
    target = torch.empty(count, dim, dtype=dtype, device=device)
    seconds = Clock(device).median(lambda: torch.index_select(table, 0, chosen, out=target))
    return 2 * target.nbytes / seconds


def link_bandwidth(sent: int, device: torch.device) -> float | None:
    """Bytes per second that a rank sends to the others in an all-to-all of this size.

    Args:
        sent: Bytes that this rank sends to all others together; the same number on every rank.
        device: Where they lie.

    Returns:
        None with a single rank, or when nothing is sent.
    """
    ranks = dist.get_world_size()
    if ranks == 1 or sent == 0:
        return None
    share = max(sent // (ranks - 1), 1)
    source = torch.ones(share * ranks, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    seconds = Clock(device).median(lambda: dist.all_to_all_single(target, source))
    return share * (ranks - 1) / seconds
