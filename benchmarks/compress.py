"""Compression of a large store: 100,000 vectors of 4,096 numbers, written, made smaller, verified.

The vectors are random with a decaying spectrum (rank 256) and noise, so that there is something to keep
and something to lose. Every step runs in a process of its own: its peak of resident memory is its own.

Example: python -m benchmarks.compress --rows 100000 --out benchmarks/results/compress.json
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

DIM, RANK, NOISE, ROWS_PER_PART = 4_096, 256, 0.02, 4_096


def write_source(path: Path, rows: int) -> None:
    """A float16 store of random vectors, part by part."""
    from llm_knowledge.files import new_directory
    from llm_knowledge.store.manifest import Cutoff, Manifest, ModelInfo, TemplateInfo
    from llm_knowledge.store.writer import write_manifest, write_part

    rng = np.random.default_rng(0)
    directions = rng.normal(size=(RANK, DIM)).astype(np.float32) / DIM**0.5
    directions *= (1 + np.arange(RANK, dtype=np.float32))[:, None] ** -0.5
    wanted = Manifest(
        level="user",
        complete=False,
        model=ModelInfo(name="random", weights_hash="none", max_tokens=1),
        template=TemplateInfo(name="none", version=1, hash="none"),
        pooling="last",
        layer=-1,
        dim=DIM,
        dtype="float16",
        key_type="int64",
        rows=rows,
        cutoff=Cutoff(kind="per_key"),
        input_fingerprint="benchmark",
        normalized=False,
    )
    with new_directory(path) as building:
        parts = []
        for index, start in enumerate(range(0, rows, ROWS_PER_PART)):
            count = min(ROWS_PER_PART, rows - start)
            vectors = rng.normal(size=(count, RANK)).astype(np.float32) @ directions
            vectors += NOISE / DIM**0.5 * rng.normal(size=(count, DIM)).astype(np.float32)
            keys = np.arange(start, start + count)
            texts = [f"what is known of user {key}" for key in keys]
            parts.append(
                write_part(building, index, wanted, keys, vectors, texts, None, keys.tolist())
            )
        write_manifest(building, wanted.model_copy(update={"parts": parts, "complete": True}))


def run_step(step: str, folder: Path, rows: int) -> dict[str, Any]:
    """One step, named "write", "verify DTYPE" or "compress DIM DTYPE"."""
    from llm_knowledge.store.compress import compress
    from llm_knowledge.store.reader import verify

    words, facts = step.split(), {}
    start = time.perf_counter()
    if words[0] == "write":
        write_source(folder / "source", rows)
    elif words[0] == "verify":
        verify(folder / "-".join(words[1:]))
    else:
        out = folder / f"{words[1]}-{words[2]}"
        done = compress(folder / "source", out, int(words[1]), "pca", words[2])  # type: ignore[arg-type]
        assert done.compression is not None
        facts = done.compression.model_dump(exclude={"method", "projection", "source_dim"})
        facts["mib"] = round(sum(file.stat().st_size for file in out.glob("part-*")) / 2**20)
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {
        "step": step,
        "seconds": round(seconds, 1),
        "rows_per_second": round(rows / seconds),
        "resident_peak_mib": round(peak),
        **facts,
    }


def main() -> None:
    """Run the steps one after the other and write JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--rows", type=int, default=100_000, help="vectors")
    parser.add_argument("--dims", type=int, nargs="+", default=[128, 256], help="to keep")
    parser.add_argument("--folder", type=Path, help="for the stores; default: a temporary one")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/compress.json"))
    parser.add_argument("--step", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.step:
        print(json.dumps(run_step(options.step, options.folder, options.rows)))
        return
    steps = ["write", "verify source"]
    for dim in options.dims:
        for dtype in ("float16", "int8"):
            steps += [f"compress {dim} {dtype}", f"verify {dim} {dtype}"]
    found = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        for step in steps:
            command = [
                sys.executable,
                "-m",
                "benchmarks.compress",
                "--step",
                step,
                "--folder",
                str(folder),
                "--rows",
                str(options.rows),
            ]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            found.append(json.loads(done.stdout))
            print(found[-1], flush=True)
    about = {
        "machine": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "load": [round(value, 1) for value in os.getloadavg()],
        "numpy": np.__version__,
        "python": platform.python_version(),
        "rows": options.rows,
        "dim": DIM,
        "threads": os.environ.get("OMP_NUM_THREADS", "all"),
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps({"about": about, "steps": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
