"""Zero-collision tables over ranks: run as a program, it forks ranks and prints one JSON line.

Every layout trains on the same rows and saves; every layout restores every checkpoint and goes on.
"""

import itertools
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from embeddings.zero_collision.policy import EVICTIONS
from tests.helpers.ranks import Ranks
from tests.helpers.training_data import make_config, make_inputs
from trainer.checkpoint.loop_state import LoopState
from trainer.checkpoint.restore import load_checkpoint
from trainer.checkpoint.writer import CheckpointWriter
from trainer.distributed.process_group import distributed
from trainer.run.build import build
from trainer.run.inputs import open_inputs
from trainer.run.session import Run

LAYOUTS = [(1, "row_wise"), (2, "row_wise"), (4, "row_wise"), (2, "column_wise")]
STEPS, MORE_STEPS = 6, 3


def whole(run: Run) -> dict[str, np.ndarray]:
    """Gathers tables, accumulators (per row: a mean over column shards) and row owners on every rank."""
    tensors: dict[str, Any] = {
        name: value
        for name, value in run.model.state_dict().items()
        if name.startswith(("sparse.", "row_owners.")) and name != "row_owners.step"
    }
    for name, values in run.model.fused_optimizer.state_dict()["state"].items():
        if name.startswith("sparse."):
            tensors |= {f"accumulator.{name}": value for value in values.values()}
    own = {
        name: (
            tuple(tensor.size()),
            [
                (s.metadata.shard_offsets, s.tensor.detach().numpy().copy())
                for s in tensor.local_shards()
            ],
        )
        for name, tensor in tensors.items()
    }
    everywhere: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everywhere, own)
    found: dict[str, np.ndarray] = {}
    for name, (size, _) in {n: p for parts in everywhere for n, p in parts.items()}.items():
        pieces = [piece for parts in everywhere if name in parts for piece in parts[name][1]]
        found[name] = np.zeros(size, dtype=pieces[0][1].dtype)
        for offsets, piece in pieces:
            at = tuple(slice(o, o + n) for o, n in zip(offsets, piece.shape, strict=True))
            found[name][at] = piece
        if name.startswith("accumulator."):
            rows = len(found[name.removeprefix("accumulator.")])
            found[name] = (
                found[name].reshape(-1, rows).mean(0) if found[name].ndim == 1 else found[name]
            )
    return found


def train_steps(run: Run, count: int, skip: int) -> None:
    """Trains on the batches after the first `skip` of the epoch."""
    run.model.train()
    stream = run.stream(["train"], shuffle=True).batches(skip=skip)
    batches = run.remap_ids(itertools.islice(stream, count), assign=True)
    for _ in range(count):
        run.pipeline.progress(batches)


def check_clean(run: Run) -> list[str]:
    """Gives rows to ids never seen, and says what is wrong with those rows."""
    wrong = []
    owners = run.model.module.row_owners
    keys = np.random.default_rng(7).integers(-(2**62), 2**62, 8)
    own = keys[run.runtime.rank :: run.runtime.world_size]  # what this rank asks for
    ids = KeyedJaggedTensor(
        ["user", "item", "history"],
        torch.from_numpy(np.tile(own, 3)),
        lengths=torch.ones(3 * len(own), dtype=torch.int64),
    )
    for _ in range(3):  # admission takes two steps
        remapped, fresh = owners.remap(ids, assign=True)
        owners(fresh)
    state = whole(run)
    rows_everywhere: list[Any] = [None] * run.runtime.world_size
    dist.all_gather_object(rows_everywhere, remapped.values().numpy())
    tables = {"user": "sparse.pooled.embedding_bags", "item": "sparse.sequences.embeddings"}
    for place, (table, prefix) in enumerate(tables.items()):
        asked = np.concatenate(
            [keys[r :: len(rows_everywhere)] for r in range(len(rows_everywhere))]
        )
        rows = np.concatenate([np.split(values, 3)[place] for values in rows_everywhere])
        rows = rows[np.argsort(asked)]  # some buckets are too small for all of theirs
        given = rows[rows > 0]
        if len(given) < 5 or len(set(given.tolist())) != len(given):
            wrong.append(f"{table}: rows {rows.tolist()}")
        if state[f"accumulator.{prefix}.{table}.weight"][given].any():
            wrong.append(f"{table}: accumulators were not emptied")
        vectors = state[f"{prefix}.{table}.weight"][given]
        np.save(run.folder / f"first-{table}-{run.runtime.rank}.npy", vectors)
    return wrong


def rank_main(rank: int, layout: tuple[int, str], root: Path, task: str) -> list[str]:
    """One rank of one layout: trains and saves, or restores every checkpoint and goes on."""
    ranks, sharding = layout
    name = f"{ranks}-{sharding}"
    config = make_config(
        root / "inputs/data",
        None,
        root / "run",
        tables__ids="zero_collision",
        tables__zero_collision="{user_rows: 16, item_rows: 24, eviction_interval: 1, admission: 2}",
        tables__sharding=f"{{user: {sharding}, item: {sharding}}}",
        tables__dim=16,
        train__global_batch_size=16,
        model__dropout=0.0,
    )
    with distributed(30) as runtime:
        folder = root / f"{task}-{name}"
        folder.mkdir(exist_ok=True)
        run = build(config, runtime, folder, open_inputs(config, runtime))
        if task == "save":
            train_steps(run, STEPS, skip=0)
            CheckpointWriter(run, folder).save(LoopState(step=STEPS, best_step=STEPS))
            found = whole(run)
            if runtime.is_main:
                np.savez(folder / "whole.npz", **found)
            return []
        wrong: list[str] = []
        for source in LAYOUTS:
            saved = root / f"save-{source[0]}-{source[1]}"
            checkpoint = saved / f"step-{STEPS:08d}"
            load_checkpoint(checkpoint, run)
            restored = whole(run)
            with np.load(saved / "whole.npz") as expected:
                wrong += [
                    f"{saved.name} to {name}: {key} is missing"
                    for key in set(expected.files) ^ set(restored)
                ]
                wrong += [
                    f"{saved.name} to {name}: {key}"
                    for key in expected.files
                    if not np.array_equal(expected[key], restored[key])
                ]
            train_steps(run, MORE_STEPS, skip=STEPS)
            found = whole(run)
            if runtime.is_main:
                np.savez(folder / f"{saved.name}.npz", **found)
        return wrong + check_clean(run)


def same(name: str, a: Any, b: Any, place: Path) -> bool:
    """Whether two layouts agree: owners bit for bit, what they own but for the order of additions."""
    if name.startswith("row_owners."):
        return np.array_equal(a[name], b[name])
    if "column_wise" in place.parent.name:  # an accumulator per half of a row: other updates
        return True
    table = name.split(".")[-2]
    owned = a[f"row_owners.{table}.last"] >= 0
    return np.allclose(a[name][owned], b[name][owned], rtol=1e-3, atol=1e-6)


def compare(root: Path) -> list[str]:
    """Says where layouts differ after training, and after going on from the same checkpoint."""
    wrong = []
    files = [[root / f"save-{n}-{kind}/whole.npz" for n, kind in LAYOUTS]]
    for source, kind in LAYOUTS:
        files.append([root / f"restore-{n}-{k}/save-{source}-{kind}.npz" for n, k in LAYOUTS])
    for first, *others in files:
        with np.load(first) as a:
            for table in ("user", "item"):
                if a[f"row_owners.{table}.tally"][:, EVICTIONS].sum() < 5:
                    wrong.append(f"{table}: hardly an eviction, the test is too easy")
            for other in others:
                with np.load(other) as b:
                    wrong += [
                        f"{first.parent.name}, {other.parent.name}: {name}"
                        for name in a.files
                        if not same(name, a, b, other)
                    ]
    for table in ("user", "item"):
        vectors = [np.load(file) for file in sorted(root.glob(f"*/first-{table}-*.npy"))]
        if not vectors or any(not np.array_equal(vector, vectors[0]) for vector in vectors):
            wrong.append(f"{table}: first vectors differ")
        if vectors and not 0.005 < vectors[0].std() < 0.02:
            wrong.append(f"{table}: first vectors deviate by {vectors[0].std()}")
    return wrong


def main(root: Path) -> None:
    """Saves from every layout, restores all of them in every layout, compares."""
    torch.set_num_threads(1)
    make_inputs(root / "inputs")
    wrong: list[str] = []
    for task in ("save", "restore"):
        for layout in LAYOUTS:
            wrong += Ranks(layout[0], rank_main, layout, root, task).join()[0]
    print(json.dumps({"cells": len(LAYOUTS) ** 2, "wrong": wrong + compare(root)}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
