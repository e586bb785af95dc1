"""Steps of sharded and of replicated tables: run as a program, it forks ranks and saves their tables.

A program of its own, since threads of a test session do not survive a fork.
"""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from tests.helpers.ranks import Ranks
from tests.helpers.training_data import make_config
from trainer.checkpoint.loop_state import LoopState
from trainer.checkpoint.restore import load_checkpoint
from trainer.checkpoint.writer import CheckpointWriter
from trainer.config.run import RunConfig
from trainer.data.loading.batch import Batch
from trainer.distributed.process_group import distributed
from trainer.run.build import build
from trainer.run.inputs import open_inputs
from trainer.run.session import Run

RANKS = 2
RULES = ("sgd", "adagrad", "rowwise_adagrad")


def user_table(run: Run) -> np.ndarray:
    """The whole user table on every rank."""
    weight = run.model.state_dict()["sparse.pooled.embedding_bags.user.weight"]
    if isinstance(weight, torch.Tensor) and not hasattr(weight, "local_shards"):
        return weight.detach().numpy().copy()
    pieces: list[Any] = [None] * dist.get_world_size()
    own = [(s.metadata.shard_offsets, s.tensor.detach().numpy()) for s in weight.local_shards()]
    dist.all_gather_object(pieces, own)
    whole = np.full(tuple(weight.size()), np.nan, dtype=np.float32)
    for (row, column), piece in (one for part in pieces for one in part):
        whole[row : row + piece.shape[0], column : column + piece.shape[1]] = piece
    return whole


def configuration(root: Path, kind: str, rule: str) -> RunConfig:
    return make_config(
        root / "data",
        root / "knowledge",
        root / "run",
        tables__sharding=f"{{user: {kind}, user_knowledge: {kind}}}",
        tables__optimizer=rule,
        tables__dim=8,
        model__dropout=0.0,
        model__meta__noise=0.0,
        model__meta__dropout=0.0,
    )


def steps(run: Run, batches: list[Batch]) -> np.ndarray:
    """The user table after training on some batches."""
    run.model.train()
    source = iter(batches)
    for _ in batches:
        run.pipeline.progress(source)
    return user_table(run)


def rank_main(rank: int, root: Path, out: Path) -> None:
    """Steps of one rank: row_wise, its checkpoint continued data_parallel, that one's sharded again."""
    tables: dict[str, np.ndarray] = {}
    with distributed(30) as runtime:
        for rule in RULES:

            def start(kind: str, rule: str = rule) -> Run:
                config = configuration(root, kind, rule)
                folder = out / f"{rule}-{kind}"
                folder.mkdir(exist_ok=True)
                return build(config, runtime, folder, open_inputs(config, runtime))

            def save(run: Run, step: int) -> Path:
                CheckpointWriter(run, run.folder).save(LoopState(step=step, best_step=step))
                return run.folder / f"step-{step:08d}"

            sharded = start("row_wise")
            batches = list(sharded.stream(["train"], shuffle=True).batches())[:6]
            steps(sharded, batches[:2])
            after_two = save(sharded, 2)
            tables[f"{rule} row_wise 4"] = steps(sharded, batches[2:4])
            tables[f"{rule} row_wise 6"] = steps(sharded, batches[4:6])

            replicated = start("data_parallel")
            load_checkpoint(after_two, replicated)
            tables[f"{rule} data_parallel 4"] = steps(replicated, batches[2:4])
            after_four = save(replicated, 4)
            tables[f"{rule} data_parallel 6"] = steps(replicated, batches[4:6])

            for kind in ("row_wise", "column_wise"):
                again = start(kind)
                load_checkpoint(after_four, again)
                tables[f"{rule} {kind} again 4"] = user_table(again)
                tables[f"{rule} {kind} again 6"] = steps(again, batches[4:6])
    np.savez(out / f"rank-{rank}.npz", **tables)


if __name__ == "__main__":
    Ranks(RANKS, rank_main, Path(sys.argv[1]), Path(sys.argv[2])).join(90)
