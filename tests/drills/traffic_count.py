"""Counts the bytes that collectives are given on four gloo ranks, two hosts of two.

Run as a program, it forks ranks and prints one JSON line per case: what was counted and what
`embeddings.planning.traffic` predicts, both as [ranks][ranks] of bytes per step, stage by stage.
"""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from embeddings.optimizer import TableOptimizer, fuse_optimizer
from embeddings.placement import Placement
from embeddings.planning.memory import BATCHES_IN_FLIGHT, plan_memory
from embeddings.planning.traffic import SPLITS_BYTES, plan_traffic
from embeddings.sharding import Hardware, describe_plan, plan_sharding, shard
from embeddings.tables import FrozenTables, SparseFeatures, Table
from tests.helpers.ranks import Ranks

RANKS, HOSTS, BATCH = 4, 2, 8
POOLED = [
    Table("a", 64, 16, ("a",)),
    Table("b", 128, 16, ("b1", "b2"), ids_per_sample=(4, 2)),
    Table("c", 32, 32, ("c",), ids_per_sample=(4,)),
]
SEQUENCES = [
    Table("s", 64, 16, ("s1", "s2"), sequence=True, ids_per_sample=(1, 4)),
    Table("t", 256, 16, ("t",), sequence=True, ids_per_sample=(2,)),
]
FROZEN = [Table("k", 64, 32, ("k",), bytes_per_value=2, frozen=True)]
CASES = {
    "pooled": ("row_wise", "table_wise", "column_wise", "table_row_wise", "grid_shard"),
    "sequence": ("row_wise", "table_wise", "column_wise"),
    "frozen": ("row_wise", "table_wise"),
}
STAGES = ("input", "output", "backward", "gradients", "splits")


class Model(torch.nn.Module):
    """One collection, looked up as the trainer does."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.tables = {"pooled": POOLED, "sequence": SEQUENCES, "frozen": FROZEN}[kind]
        self.frozen = FrozenTables(FROZEN) if kind == "frozen" else None
        pooled, sequences = (POOLED, []) if kind == "pooled" else ([], SEQUENCES)
        self.trained = SparseFeatures(pooled, sequences, 0.01) if kind != "frozen" else None

    def forward(self, ids: KeyedJaggedTensor) -> torch.Tensor:
        if self.frozen is not None:
            return self.frozen(ids).values().sum()
        assert self.trained is not None
        if self.kind == "pooled":
            return self.trained.pooled(ids).values().sum()
        return torch.stack([t.values().sum() for t in self.trained.sequences(ids).values()]).sum()


def make_batch(tables: list[Table]) -> KeyedJaggedTensor:
    """Ids that fall evenly on every quarter of every table."""
    values, lengths, keys = [], [], []
    for table in tables:
        for feature, ids in zip(
            table.features, table.ids_per_sample or (1,) * len(table.features), strict=True
        ):
            count = int(BATCH * ids)
            values.append(torch.arange(count) * table.rows // count)
            lengths.append(torch.full((BATCH,), int(ids)))
            keys.append(feature)
    return KeyedJaggedTensor(keys, torch.cat(values), lengths=torch.cat(lengths))


@contextmanager
def counting(
    found: dict[str, np.ndarray], phase: list[str], held: dict[str, int]
) -> Iterator[None]:
    """Adds what every collective is given to `found[stage][destination]`.

    `held` gets bytes of received ids and lengths, and of vectors and gradients given and received.
    """

    def add(stage: str, group: Any, sizes: list[float]) -> None:
        for position, size in enumerate(sizes):
            target = dist.get_global_rank(group, position)
            if target != dist.get_rank():
                found[stage][target] += size

    def wrap(name: str, sizes: Callable[..., tuple[str, list[float]]]) -> Any:
        original = getattr(dist, name)

        def collective(*args: Any, **options: Any) -> Any:
            stage, given = sizes(*args, **options)
            add(stage, options.get("group"), given)
            output, source = _tensors(*args, **options)
            if stage == "input":
                held["ids"] += output.nbytes
            elif stage != "splits":
                held["vectors"] += output.nbytes + source.nbytes
            return original(*args, **options)

        return mock.patch.object(dist, name, collective)

    def all_to_all(
        output: torch.Tensor,
        input: torch.Tensor,
        output_split_sizes: list[int] | None = None,
        input_split_sizes: list[int] | None = None,
        group: Any = None,
        async_op: bool = False,
    ) -> tuple[str, list[float]]:
        if input_split_sizes is None:
            return "splits", [input.nbytes / group.size()] * group.size()
        row = input.nbytes / max(len(input), 1)
        stage = phase[0] if input.is_floating_point() else "input"
        return stage, [split * row for split in input_split_sizes]

    def reduce_scatter(
        output: torch.Tensor, input: torch.Tensor, group: Any = None, **_: Any
    ) -> tuple[str, list[float]]:
        return phase[0], [float(output.nbytes)] * group.size()

    def all_gather(
        output: torch.Tensor, input: torch.Tensor, group: Any = None, **_: Any
    ) -> tuple[str, list[float]]:
        return phase[0], [float(input.nbytes)] * group.size()

    with (
        wrap("all_to_all_single", all_to_all),
        wrap("reduce_scatter_tensor", reduce_scatter),
        wrap("all_gather_into_tensor", all_gather),
    ):
        yield


def _tensors(
    output: torch.Tensor, input: torch.Tensor, *_: Any, **__: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    return output, input


def count_case(kind: str, sharding: str) -> dict[str, Any]:
    """One step of one collection under one sharding."""
    model = Model(kind)
    if kind != "frozen":
        fuse_optimizer(model.parameters(), TableOptimizer("sgd", 0.1))
    gib = 2**30
    hardware = Hardware(HOSTS, RANKS // HOSTS, "cpu", 0, 16 * gib, 1e12, 1e11, 1e11, 1e10, 0.0)
    placements = {table.name: Placement(sharding) for table in model.tables}
    plan = plan_sharding(model, model.tables, placements, BATCH, hardware)
    sharded = shard(model, plan, torch.device("cpu"))
    found = {stage: np.zeros(RANKS) for stage in STAGES}
    for module in sharded.modules():
        for lookup in getattr(module, "_lookups", []):
            if isinstance(lookup, DistributedDataParallel):
                lookup.register_comm_hook(None, _counting_hook(found))
    phase, held = ["output"], {"ids": 0, "vectors": 0}
    with counting(found, phase, held):
        loss = sharded(make_batch(model.tables))
        phase[0] = "backward"
        if kind != "frozen":
            loss.backward()
    everyone: list[Any] = [None] * RANKS
    dist.all_gather_object(everyone, {stage: row.tolist() for stage, row in found.items()})
    held_by: list[Any] = [None] * RANKS
    dist.all_gather_object(held_by, BATCHES_IN_FLIGHT * held["ids"] + held["vectors"])
    plans = describe_plan(plan, model.tables, RANKS)
    memory = plan_memory(model.tables, plans, placements, "sgd", BATCH, RANKS)
    predicted = plan_traffic(model.tables, plans, BATCH, RANKS, HOSTS)
    splits = SPLITS_BYTES * (1 - np.eye(RANKS)) * (sharding != "data_parallel")
    return {
        "case": f"{kind} {sharding}",
        "counted": {stage: [rank[stage] for rank in everyone] for stage in STAGES},
        "held": {"counted": held_by, "predicted": memory.activations.tolist()},
        "predicted": {stage: getattr(predicted, stage).tolist() for stage in STAGES[:-1]}
        | {"splits": splits.tolist()},
    }


def _counting_hook(found: dict[str, np.ndarray]) -> Callable[..., Any]:
    def hook(group: Any, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
        others = np.arange(RANKS) != dist.get_rank()
        found["gradients"][others] += 2 * bucket.buffer().nbytes / RANKS
        return allreduce_hook(dist.group.WORLD, bucket)

    return hook


def rank_main(_: int) -> list[dict[str, Any]]:
    """One rank through all cases."""
    return [
        count_case(kind, sharding)
        for kind, shardings in CASES.items()
        for sharding in (*shardings, *["data_parallel"] * (kind == "pooled"))
    ]


if __name__ == "__main__":
    for case in Ranks(RANKS, rank_main, per_host=RANKS // HOSTS).join()[0]:
        print(json.dumps(case))
