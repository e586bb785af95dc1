"""Counts on two gloo ranks what `trainer/planning/scaling.py` and `embeddings/planning/memory.py` predict.

Run as a program with an empty folder, it forks ranks and writes `found.json`: per case, what was counted
and what is predicted, bytes per rank.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from embeddings.planning.memory import moved_bytes, plan_memory
from embeddings.profiling.measure_tables import Cell
from embeddings.profiling.measure_tables import build as build_cell
from embeddings.profiling.phases import count_memory_bytes
from embeddings.sharding import Hardware, TablePlan
from tests.drills.traffic_count import make_batch
from tests.helpers.ranks import Ranks
from tests.helpers.training_data import make_config, make_inputs
from trainer.checkpoint.loop_state import LoopState
from trainer.checkpoint.state import live_state, local_parts, saved_tensors
from trainer.checkpoint.writer import CheckpointWriter
from trainer.distributed.process_group import distributed
from trainer.planning.scaling import DENSE_SAVED_BYTES, saved_bytes
from trainer.run.build import build
from trainer.run.inputs import open_inputs

RANKS = 2
RUNS = [
    ("row_wise", "rowwise_adagrad"),
    ("column_wise", "rowwise_adagrad"),
    ("row_wise", "adagrad"),
]
CELLS = [
    Cell(2, 256, 16, 8, 1, sharding, "fused", collection, rule)
    for sharding in ("row_wise", "table_wise", "column_wise")
    for collection in ("pooled", "sequence")
    for rule in ("sgd", "rowwise_adagrad", "adagrad")
]


def everywhere(value: Any) -> list[Any]:
    """A value of every rank."""
    found: list[Any] = [None] * RANKS
    dist.all_gather_object(found, value)
    return found


def count_run(root: Path, sharding: str, optimizer: str) -> dict[str, Any]:
    """Builds a run with knowledge, adds up its shards, writes a checkpoint and looks at its files."""
    folder = root / f"{sharding}-{optimizer}"
    config = make_config(
        root / "inputs/data",
        root / "inputs/knowledge",
        folder,
        tables__dim=16,
        tables__sharding=f"{{user: {sharding}, item: {sharding}}}",
        tables__optimizer=optimizer,
    )
    with distributed(30) as runtime:
        if runtime.is_main:
            folder.mkdir()
        dist.barrier()
        run = build(config, runtime, folder, open_inputs(config, runtime))
        run.model.train()
        run.pipeline.progress(iter(run.stream(["train"], shuffle=True).batches()))
        counted = {"tables": 0, "optimizer": 0, "frozen": 0}
        for name, value in run.model.state_dict().items():
            if name.startswith(("sparse.", "knowledge.")):
                part = "frozen" if name.startswith("knowledge.") else "tables"
                counted[part] += sum(tensor.nbytes for tensor, _ in local_parts(value))
        for values in run.model.fused_optimizer.state_dict()["state"].values():
            parts = [part for value in values.values() for part, _ in local_parts(value)]
            counted["optimizer"] += sum(part.nbytes for part in parts)
        tables, batch = run.model.module.tables, config.train.global_batch_size // RANKS
        memory = plan_memory(tables, run.tables, {}, optimizer, batch, RANKS)
        CheckpointWriter(run, folder).save(LoopState(step=1))
        names = {name for names in everywhere(list(live_state(run))) for name in names}
        saved = saved_tensors(folder / "step-00000001")
        assert names == set(saved)
        dense = sum(parameter.numel() for parameter in run.model.module.dense.parameters())
        buffers = [n for n in names if n.startswith("dense_optimizer.") and n.endswith(".step")]
        return {
            "memory": {
                part: {"counted": everywhere(size), "predicted": getattr(memory, part).tolist()}
                for part, size in counted.items()
            },
            "checkpoint": {
                # Beside it, Adam's count of steps: four bytes per parameter tensor.
                "predicted": float(saved_bytes(tables, run.tables, optimizer, RANKS).sum())
                + DENSE_SAVED_BYTES * dense
                + 4 * len(buffers),
                "metadata": sum(
                    one.size.numel() * one.properties.dtype.itemsize for one in saved.values()
                ),
                "disk": sum(file.stat().st_size for file in (folder / "step-00000001").iterdir()),
                "pieces": sum(len(one.chunks) for one in saved.values()),
            },
        }


def count_moved(cell: Cell) -> dict[str, Any]:
    """Bytes that memory moves in a step of made-up tables, no row looked up twice."""
    hardware = Hardware(1, RANKS, "cpu", 0, 4 << 30, 1e12, 1e10, 1e10, 1e10, 0.1)
    subject = build_cell(cell, hardware, torch.device("cpu"))
    ids = make_batch(subject.tables)
    values = ids.values() + dist.get_rank()
    subject.batches = [type(ids)(ids.keys(), values, lengths=ids.lengths())]
    counted = everywhere(sum(count_memory_bytes(subject, 0).values()))
    predicted: Any = 0
    for table in subject.tables:
        plan = TablePlan(table.name, cell.sharding, "", table.rows, table.dim, [0] * RANKS, [])
        plan.pieces.extend(pieces_of(subject.module, table.name, cell.sharding))
        predicted = predicted + moved_bytes(table, plan, cell.optimizer, cell.batch)
    return {"cell": cell.name, "counted": counted, "predicted": predicted.tolist()}


def pieces_of(module: Any, table: str, sharding: str) -> Any:
    """Where a table's pieces lie, as torchrec's plan says."""
    from embeddings.sharding import Piece

    found = []
    for shard in module.module_sharding_plan[table].sharding_spec.shards:
        (row, column), (rows, columns) = shard.shard_offsets, shard.shard_sizes
        found.append(Piece(shard.placement.rank(), row, column, rows, columns))
    return found


def rank_main(_: int, root: Path) -> dict[str, Any]:
    """One rank through all cases."""
    return {
        "runs": [count_run(root, *one) for one in RUNS],
        "moved": [count_moved(cell) for cell in CELLS],
    }


def main(root: Path) -> None:
    """Makes the inputs and forks the ranks."""
    make_inputs(root / "inputs")
    found = Ranks(RANKS, rank_main, root).join(90)[0]
    (root / "found.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
