"""Sharded tables against `nn.EmbeddingBag` and bare FBGEMM: lookup and update, one thread, paired.

    OMP_NUM_THREADS=1 python -m benchmarks.embeddings --out benchmarks/results/embeddings

All arms run once per round, in an order drawn anew, and ratios are taken round by round. What is measured
is `embeddings.profiling.measure_tables`; the sizes are those of docs/results/speed.md.
"""

import argparse
import os
from pathlib import Path

from launch.main import main

SIZES = [  # tables, rows, dim, batch, mean ids per sample and table
    (26, 100_000, 16, 4096, 1),
    (26, 100_000, 64, 4096, 1),
    (26, 100_000, 64, 1024, 10),
]
RULES = ["sgd", "adagrad", "rowwise_adagrad"]

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder of one report per size")
    parser.add_argument("--rounds", type=int, default=41, help="measurements (default: 41)")
    options = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    for size in SIZES:
        words = ["profile", "embeddings", "--optimizer", *RULES, "--rounds", str(options.rounds)]
        for name, value in zip(("tables", "rows", "dim", "batch", "pooling"), size, strict=True):
            words += [f"--{name}", str(value)]
        place = options.out / "-".join(map(str, size))
        if code := main([*words, "--out", str(place)]):
            raise SystemExit(code)
