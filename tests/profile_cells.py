"""Profiles made-up tables in every sharding, on two forked ranks and on one; run as a program."""

import json
import multiprocessing
import os
import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from embeddings.profile import SHARDINGS, Options, profile_cells, sweep
from embeddings.profile_baselines import Reference
from embeddings.sharding import Hardware

RANKS = 2
SMALL = {"tables": [3], "rows": [101], "dim": [16], "batch": [8], "pooling": [3]}


class WrongRows(Reference):
    """One value of one row is wrong."""

    def __init__(self, subject):
        super().__init__(subject)
        self.weights["table_1"][subject.batches[0]["feature_1"].values()[0], 3] += 0.01


class WrongRule(Reference):
    """Sums gradients over ranks instead of averaging them."""

    def update(self, leaves):
        for leaf in leaves.values():
            leaf.grad *= RANKS
        super().update(leaves)


def hardware_of(ranks: int) -> Hardware:
    return Hardware(1, ranks, "cpu", 0, 4 << 30, 1e12, 1e10, 1e10, 1e10, 0.1)


def rank_main(rank: int, ranks: int, root: Path) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
    store = dist.FileStore(str(root / f"rendezvous-{ranks}"), ranks)
    dist.init_process_group(
        "gloo", store=store, rank=rank, world_size=ranks, timeout=timedelta(seconds=60)
    )
    cpu, hardware = torch.device("cpu"), hardware_of(ranks)
    every = sweep(
        **SMALL,
        sharding=SHARDINGS,
        collection=["pooled", "sequence"],
        optimizer=["sgd", "adagrad", "rowwise_adagrad"],
    )
    quick = Options(rounds=2, warmup=0, baselines=False, check=True)
    found = {"all": profile_cells(every, hardware, cpu, quick)}
    if ranks == 1:
        (root / "alone.json").write_text(json.dumps(found))
        return
    one = sweep(**SMALL, collection=["pooled", "sequence"], optimizer=["sgd"])
    full = Options(rounds=5, warmup=1, check=True, trace=root / "trace.json")
    found["full"] = profile_cells(one, hardware, cpu, full)
    for reference in (WrongRows, WrongRule):
        options = Options(rounds=2, warmup=0, baselines=False, check=True, reference=reference)
        found[reference.__name__] = profile_cells(one, hardware, cpu, options)
    if rank == 0:
        (root / "found.json").write_text(json.dumps(found))


def main(root: Path) -> None:
    torch.set_num_threads(1)
    context = multiprocessing.get_context("fork")
    ranks = [context.Process(target=rank_main, args=(rank, RANKS, root)) for rank in range(RANKS)]
    ranks.append(context.Process(target=rank_main, args=(0, 1, root)))
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(150)
    failed = [process.exitcode != 0 for process in ranks]
    for process in ranks:
        process.kill()
    if any(failed):
        raise SystemExit("a rank failed or hung")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
