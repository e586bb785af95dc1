"""Memory of the loader over a log of any size: one epoch, shuffled, resident memory all along.

    python -m benchmarks.loader_memory --folder /tmp --gigabytes 5 --out benchmarks/results/loader_memory.json

The log is one Parquet file of simulated events: a simulated train split, again and again from
another row on, until the file has its size. It is neither compressed nor encoded, so that as many bytes pass
through the loader. It lies in a temporary folder below --folder and is removed at the end. The process
may not allocate more than --allowance beyond what it holds when reading begins.
"""

import argparse
import json
import os
import resource
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from embeddings.ids import HashedIds, SortedKeys
from embeddings.profiling.measure import machine
from trainer.data.loading.loader import EventStream
from trainer.data.loading.row_encoder import RowEncoder
from trainer.data.sources.simulate import simulate
from trainer.data.sources.writer import ROWS_PER_GROUP

MEGABYTE = 2**20
SAMPLES = 200  # of resident memory


def write_log(folder: Path, size: int, events: int, group: int) -> tuple[Path, int]:
    """One Parquet file of at least `size` bytes; returns it and the number of scenarios."""
    info = simulate(folder / "block", users=events // 50, items=5000, scenarios=4, events=events)
    block = pq.read_table(folder / "block/train")
    generator = np.random.default_rng(0)
    file = folder / "log.parquet"
    with pq.ParquetWriter(file, block.schema, compression="none", use_dictionary=False) as writer:
        while file.stat().st_size < size:
            cut = int(generator.integers(len(block)))
            turned = pa.concat_tables([block.slice(cut), block.slice(0, cut)])
            writer.write_table(turned, row_group_size=group)
    return file, len(info.scenarios)


def status(name: str) -> float:
    """A size of this process by the kernel, MB: VmRSS (now resident), VmHWM (its peak), VmData."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(f"{name}:")).split()[1]) / 1024


def read_epoch(
    file: Path, scenarios: int, allowance: int, workers: int, buffer: int
) -> dict[str, Any]:
    """Reads the whole file once in batches of 1,024; memory in MB over the epoch."""
    encoder = RowEncoder(
        users=HashedIds(1_000_000, 0),
        items=HashedIds(1_000_000, 1),
        scenarios=SortedKeys(pa.array(range(1, scenarios + 1), pa.int64())),
        scenario_order=np.arange(scenarios),
        history_length=20,
        joins={},
    )
    limit = int(status("VmData") * MEGABYTE) + allowance
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    before, began, rows = status("VmRSS"), time.perf_counter(), 0
    taken: list[float] = []
    peaks: list[float] = []
    stream = EventStream(
        [file], encoder, 1024, 0, 1, streams=8, shuffle_buffer=buffer, workers=workers, prefetch=8
    )
    every = max(stream.steps // SAMPLES, 1)
    with stream.feed(0, stream.steps) as feed:
        for step, batch in enumerate(feed):
            rows += int(batch.weight.sum())
            if step % every == 0:
                taken.append(round(status("VmRSS"), 1))
                peaks.append(round(status("VmHWM"), 1))
        feed.check()
    seconds = time.perf_counter() - began
    assert rows == stream.total_rows
    tenth = len(taken) // 10
    return {
        "rows": rows,
        "file_bytes": file.stat().st_size,
        "row_groups": pq.read_metadata(file).num_row_groups,
        "workers": workers,
        "shuffle_buffer": buffer,
        "streams": 8,
        "allowance_mb": allowance // MEGABYTE,
        "rows_per_second": round(rows / seconds),
        "resident_before_mb": round(before, 1),
        "peak_mb": {
            "after a tenth": peaks[tenth],
            "after half": peaks[len(peaks) // 2],
            "at the end": peaks[-1],
        },
        "resident_mb": taken,
    }


def main() -> None:
    """Writes the log, reads it, removes it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument(
        "--folder", type=Path, required=True, help="where the log may lie meanwhile"
    )
    parser.add_argument("--gigabytes", type=float, default=5.0, help="10^9 bytes (default: 5)")
    parser.add_argument(
        "--allowance", type=int, default=1000, help="MB beyond the start (default: 1000)"
    )
    parser.add_argument("--events", type=int, default=1_000_000, help="simulated events of a block")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--group", type=int, default=ROWS_PER_GROUP, help="rows of a row group")
    parser.add_argument(
        "--buffer", type=int, default=65_536, help="rows of a stream (default: 65536)"
    )
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        # In a process of its own: what writing leaves in memory is not the loader's.
        read, write = os.pipe()
        if (child := os.fork()) == 0:
            found = write_log(
                Path(folder), int(options.gigabytes * 1e9), options.events, options.group
            )
            os.write(write, str(found[1]).encode())
            os._exit(0)
        _, status = os.waitpid(child, 0)
        if status:
            raise SystemExit("the log could not be written")
        scenarios = int(os.read(read, 16))
        result = {"machine": machine()} | read_epoch(
            Path(folder) / "log.parquet",
            scenarios,
            options.allowance * MEGABYTE,
            options.workers,
            options.buffer,
        )
    if options.out:
        options.out.write_text(json.dumps(result) + "\n")
    print(
        json.dumps({key: value for key, value in result.items() if key != "resident_mb"}, indent=1)
    )


if __name__ == "__main__":
    main()
