"""Every checkpoint restored by every layout: run as a program, it forks ranks and prints one JSON line.

A layout is a number of ranks and a sharding. Forking after one import makes a layout cost a second.
"""

import itertools
import json
import multiprocessing
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from tests.training_data import make_config, make_inputs
from trainer.checkpoint import LoopState, load_checkpoint, save_checkpoint
from trainer.distributed import distributed
from trainer.run import Run, build, open_inputs

RANKS = (1, 2, 4)
SHARDINGS = ("row_wise", "table_wise", "column_wise")
LAYOUTS = list(itertools.product(RANKS, SHARDINGS))


def whole_state(run: Run) -> dict[str, np.ndarray]:
    """Gathers tables, accumulators (means over column shards: [rows]) and dense state."""
    model = run.model
    tensors: dict[str, Any] = {
        k: v for k, v in model.state_dict().items() if k.startswith("sparse.")
    }
    for name, values in model.fused_optimizer.state_dict()["state"].items():
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
    dist.all_gather_object(everywhere, own)  # a rank that owns no part of a table may not name it
    found: dict[str, np.ndarray] = {}
    for name, (size, _) in {
        name: part for parts in everywhere for name, part in parts.items()
    }.items():
        full = np.full(size, np.nan, dtype=np.float32)
        for offsets, piece in itertools.chain(
            *(parts[name][1] for parts in everywhere if name in parts)
        ):
            full[tuple(slice(o, o + n) for o, n in zip(offsets, piece.shape, strict=True))] = piece
        if name.startswith("accumulator."):
            table = name.removeprefix("accumulator.")
            full = full.reshape(-1, found[table].shape[0]).mean(0)
        found[name] = full
    for name, parameter in model.module.dense.named_parameters():
        found[name] = parameter.detach().numpy().copy()
        for key, value in run.optimizer.state.get(parameter, {}).items():
            found[f"{name}.{key}"] = value.numpy().copy()
    return found


def layout_name(layout: tuple[int, str]) -> str:
    """Names a layout's folder."""
    return f"{layout[0]}-{layout[1]}"


def rank_main(rank: int, layout: tuple[int, str], root: Path, task: str) -> None:
    """One rank of one layout: trains three steps and saves, or restores every saved checkpoint."""
    ranks, sharding = layout
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
    store = dist.FileStore(str(root / f"rendezvous-{task}-{layout_name(layout)}"), ranks)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks)
    kinds = f"{{user: {sharding}, item: {sharding}}}"
    config = make_config(
        root / "inputs/data",
        root / "inputs/knowledge",
        root / "run",
        tables__sharding=kinds,
        tables__dim=16,
    )
    with distributed(30) as runtime:
        folder = root / f"{task}-{layout_name(layout)}"
        folder.mkdir(exist_ok=True)
        run = build(config, runtime, folder, open_inputs(config, runtime))
        if task == "save":
            run.model.train()
            batches = iter(run.stream(["train"], shuffle=True).batches())
            for _ in range(3):
                run.pipeline.progress(batches)
            state = LoopState(step=3, best_step=3, fingerprints=run.fingerprints)
            save_checkpoint(folder, run.model, run.optimizer, state, runtime.is_main)
            whole = whole_state(run)
            if runtime.is_main:
                np.savez(folder / "whole.npz", **whole)
            return
        wrong = []
        for source in LAYOUTS:
            saved = root / f"save-{layout_name(source)}"
            load_checkpoint(saved / "step-00000003", run.model, run.optimizer, run.fingerprints)
            restored = whole_state(run)
            with np.load(saved / "whole.npz") as expected:
                assert set(expected.files) == set(restored)
                # Means over column shards depend on the order of additions; all else is bit-equal.
                wrong += [
                    f"{layout_name(source)} to {layout_name(layout)}: {name}"
                    for name in expected.files
                    if not (
                        np.allclose(expected[name], restored[name], rtol=1e-6, atol=0)
                        if name.startswith("accumulator.")
                        else np.array_equal(expected[name], restored[name])
                    )
                ]
        if runtime.is_main:
            (folder / "wrong.json").write_text(json.dumps(wrong))


def main(root: Path) -> None:
    """Saves from every layout, then restores all of them in every layout."""
    torch.set_num_threads(1)
    make_inputs(root / "inputs")
    context = multiprocessing.get_context("fork")
    for task in ("save", "restore"):
        for layout in LAYOUTS:
            ranks = [
                context.Process(target=rank_main, args=(rank, layout, root, task))
                for rank in range(layout[0])
            ]
            for process in ranks:
                process.start()
            for process in ranks:
                process.join(60)
                if process.exitcode != 0:
                    for other in ranks:
                        other.kill()
                    raise SystemExit(f"{task} {layout_name(layout)}: a rank failed or hung")
    wrong = [
        line
        for layout in LAYOUTS
        for line in json.loads((root / f"restore-{layout_name(layout)}/wrong.json").read_text())
    ]
    print(json.dumps({"cells": len(LAYOUTS) ** 2, "wrong": wrong}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
