"""What the sharded layer adds to its own kernel: the layer, and the same kernel called directly, in turns.

    OMP_NUM_THREADS=1 python -m benchmarks.layer_overhead --out benchmarks/results/layer_overhead.json

One rank, one thread, RowWiseAdagrad, lookup and update. Both arms use the same tables in the same memory, so
what differs is the layer alone (two instances of one kernel differ by several percent by where they lie).
The order within a round is drawn; a batch's KeyedJaggedTensor is made anew for every step.
"""

import argparse
import json
import random
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from embeddings.optimizer import TableOptimizer, fuse_optimizer
from embeddings.profiling.measure import machine
from embeddings.sharding import Hardware, make_planner, shard, sharders
from embeddings.tables import Table, collections

TABLES, ROWS, BATCH, WARM_UP = 26, 100_000, 4096, 5


def measure(dim: int, rounds: int) -> dict[str, list[float]]:
    """Median and quartiles: milliseconds of processor time of both arms, and their ratio by round."""
    tables = [Table(f"t{i}", ROWS, dim, (f"f{i}",)) for i in range(TABLES)]
    model = collections(tables)
    fuse_optimizer(model.parameters(), TableOptimizer("rowwise_adagrad", 0.01))
    hardware = Hardware(1, 1, "cpu", 0, 64 * 2**30, 3e12, 3e11, 4e11, 5e9, 0.1)
    plan = make_planner(tables, {}, BATCH, hardware).plan(model, sharders(model))
    layer = shard(model, plan, torch.device("cpu")).module.pooled
    kernel = layer._lookups[0]._emb_modules[0].emb_module
    gradient = torch.randn(BATCH, TABLES * dim)
    values = [torch.randint(0, ROWS, (TABLES * BATCH,)) for _ in range(4)]
    keys, lengths = [f"f{i}" for i in range(TABLES)], torch.ones(TABLES * BATCH, dtype=torch.long)

    def sharded(ids: KeyedJaggedTensor) -> Tensor:
        return layer(ids).values()

    def direct(ids: KeyedJaggedTensor) -> Tensor:
        return kernel(indices=ids.values(), offsets=ids.offsets())

    spent: dict[str, list[float]] = {"layer": [], "kernel": []}
    for number in range(WARM_UP + rounds):
        arms = [("layer", sharded), ("kernel", direct)]
        random.shuffle(arms)
        for name, forward in arms:
            ids = KeyedJaggedTensor(keys=keys, values=values[number % 4], lengths=lengths)
            began = time.process_time()
            forward(ids).backward(gradient)
            if number >= WARM_UP:
                spent[name].append(1000 * (time.process_time() - began))
    spent["layer / kernel"] = (np.array(spent["layer"]) / np.array(spent["kernel"])).tolist()
    return {name: np.percentile(found, [25, 50, 75]).tolist() for name, found in spent.items()}


def main() -> None:
    """Measures two widths, prints a Markdown table and writes JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    found = {str(dim): measure(dim, options.rounds) for dim in (16, 64)}
    print("| dim | layer, ms | kernel, ms | layer / kernel (quartiles) |\n|---|---|---|---|")
    for dim, row in found.items():
        low, middle, high = row["layer / kernel"]
        print(
            f"| {dim} | {row['layer'][1]:.2f} | {row['kernel'][1]:.2f} | {middle:.3f} "
            f"({low:.3f} to {high:.3f}) |"
        )
    if options.out:
        about = {"machine": machine(), "rounds": options.rounds, "dims": found}
        options.out.write_text(json.dumps(about, indent=1) + "\n")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
