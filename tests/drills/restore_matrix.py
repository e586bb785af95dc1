"""Every checkpoint restored by every layout: run as a program, it forks ranks and prints one JSON line.

A layout is a number of ranks and a sharding; table_row_wise and grid_shard are four ranks that take
themselves for two hosts. Forking after one import makes a layout cost a second.
"""

import itertools
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from tests.helpers.ranks import Ranks
from tests.helpers.training_data import make_config, make_inputs
from trainer.checkpoint.loop_state import LoopState
from trainer.checkpoint.restore import load_checkpoint
from trainer.checkpoint.state import local_parts
from trainer.checkpoint.writer import CheckpointWriter
from trainer.distributed.process_group import distributed
from trainer.run.build import build
from trainer.run.inputs import open_inputs
from trainer.run.session import Run

RANKS = (1, 2, 4)
SHARDINGS = ("row_wise", "table_wise", "column_wise")
TWO_HOSTS = ("table_row_wise", "grid_shard")
POOLED_ONLY = (*TWO_HOSTS, "data_parallel")  # the item table, of sequences, is row-wise then
LAYOUTS = [
    *itertools.product(RANKS, SHARDINGS),
    *((4, kind) for kind in TWO_HOSTS),
    (2, "data_parallel"),
    (4, "data_parallel"),
]
OPTIMIZERS = ("rowwise_adagrad", "adagrad")


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
            [(offsets, part.numpy().copy()) for part, offsets in local_parts(tensor)],
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
        if name.startswith("accumulator.") and len(size) == 1:
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


def rank_main(rank: int, layout: tuple[int, str], root: Path, task: str) -> list[str]:
    """One rank of one layout: trains three steps and saves, or names what it restores otherwise."""
    _, sharding = layout
    wrong = []
    of_items = "row_wise" if sharding in POOLED_ONLY else sharding
    with distributed(30) as runtime:
        for optimizer in OPTIMIZERS:
            config = make_config(
                root / "inputs/data",
                None,
                root / "run",
                tables__sharding=f"{{user: {sharding}, item: {of_items}}}",
                tables__dim=16,
                tables__optimizer=optimizer,
                model__backbone="shared_bottom",
            )
            folder = root / f"{task}-{layout_name(layout)}-{optimizer}"
            folder.mkdir(exist_ok=True)
            run = build(config, runtime, folder, open_inputs(config, runtime))
            if task == "save":
                save(run, folder)
            else:
                wrong += restore(run, root, layout_name(layout), optimizer)
    return wrong


def save(run: Run, folder: Path) -> None:
    """Trains three steps and saves, with the state as it is gathered."""
    run.model.train()
    batches = iter(run.stream(["train"], shuffle=True).batches())
    for _ in range(3):
        run.pipeline.progress(batches)
    CheckpointWriter(run, folder).save(LoopState(step=3, best_step=3))
    whole = whole_state(run)
    if run.runtime.is_main:
        np.savez(folder / "whole.npz", **whole)


def restore(run: Run, root: Path, name: str, optimizer: str) -> list[str]:
    """Restores what every layout saved; names what is not as it was."""
    wrong = []
    for source in LAYOUTS:
        saved = root / f"save-{layout_name(source)}-{optimizer}"
        load_checkpoint(saved / "step-00000003", run)
        restored = whole_state(run)
        with np.load(saved / "whole.npz") as expected:
            assert set(expected.files) == set(restored)
            # Means over column shards depend on the order of additions; all else is bit-equal.
            wrong += [
                f"{layout_name(source)} to {name}, {optimizer}: {key}"
                for key in expected.files
                if not (
                    np.allclose(expected[key], restored[key], rtol=1e-6, atol=0)
                    if key.startswith("accumulator.") and optimizer == "rowwise_adagrad"
                    else np.array_equal(expected[key], restored[key])
                )
            ]
    return wrong


def run_layouts(layouts: list[tuple[int, str]], root: Path, task: str) -> list[str]:
    """Runs some layouts at once and waits for all of them; what rank 0 of each found wrong."""
    groups = [
        Ranks(
            layout[0], rank_main, layout, root, task, per_host=2 if layout[1] in TWO_HOSTS else None
        )
        for layout in layouts
    ]
    return [line for group in groups for line in group.join(90)[0]]


def main(root: Path) -> None:
    """Saves from every layout, then restores all of them in every layout."""
    torch.set_num_threads(1)
    make_inputs(root / "inputs")
    wrong = []
    for task in ("save", "restore"):
        for start in range(0, len(LAYOUTS), 2):
            wrong += run_layouts(LAYOUTS[start : start + 2], root, task)
    print(json.dumps({"cells": len(LAYOUTS) ** 2 * len(OPTIMIZERS), "wrong": wrong}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
