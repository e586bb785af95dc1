"""Profiles made-up tables in every sharding, on two forked ranks and on one; run as a program."""

import json
import sys
from pathlib import Path
from typing import Any

import torch

from embeddings.profiling.baselines import Reference
from embeddings.profiling.measure_tables import SHARDINGS, Options, profile_cells, sweep
from embeddings.sharding import Hardware
from tests.helpers.ranks import Ranks

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


def rank_main(rank: int, ranks: int, root: Path) -> dict[str, list[dict[str, Any]]]:
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
        return found
    one = sweep(**SMALL, collection=["pooled", "sequence"], optimizer=["sgd"])
    full = Options(rounds=5, warmup=1, check=True, trace=root / "trace.json")
    found["full"] = profile_cells(one, hardware, cpu, full)
    for reference in (WrongRows, WrongRule):
        options = Options(rounds=2, warmup=0, baselines=False, check=True, reference=reference)
        found[reference.__name__] = profile_cells(one, hardware, cpu, options)
    return found


def main(root: Path) -> None:
    torch.set_num_threads(1)
    groups = {"found": Ranks(RANKS, rank_main, RANKS, root), "alone": Ranks(1, rank_main, 1, root)}
    for name, group in groups.items():
        (root / f"{name}.json").write_text(json.dumps(group.join(150)[0]))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
