"""Drills of the input on several ranks: run as a program, it forks ranks and prints one JSON line.

Every rank notes the rows of each step that it trains on, so what was trained is seen, not inferred.
"""

import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch

import trainer.run.build
import trainer.training.loop
from llm_knowledge.errors import InputError
from tests.helpers.knowledge_data import write_dataset
from tests.helpers.ranks import Ranks
from tests.helpers.training_data import make_config
from trainer.checkpoint.directory import checkpoints, read_state
from trainer.config.run import RunConfig

BATCH, STREAMS, EPOCHS = 40, 4, 3


def dataset(path: Path, rows: int) -> Path:
    """Pairs of user and item that occur once each, in three parts of the train split."""
    path.mkdir()
    pairs = np.random.default_rng(0).permutation(rows)
    events = [
        {
            "user_id": int(pair) // 20,
            "item_id": int(pair) % 20,
            "timestamp": 1_000_000 + at,
            "scenario_id": ("food", "kitchen")[at % 2],
            "label": int(at % 3 == 0),
        }
        for at, pair in enumerate(pairs)
    ]
    items = [{"item_id": item, "title": f"Thing {item}", "categories": []} for item in range(20)]
    few = events[:12]
    splits = {"profile": few, "train": events, "valid": few, "test": few}
    write_dataset(path, splits, items)
    whole = path / "train/part-00000.parquet"
    table = pq.read_table(whole)
    for part, low in enumerate(range(0, rows, -(-rows // 3))):
        file = path / f"train/part-{part:05d}.parquet"
        pq.write_table(table.slice(low, -(-rows // 3)), file, row_group_size=25)
    return path


def configuration(data: Path, output: Path, **changes: object) -> RunConfig:
    """Small chunks, threads and a checkpoint every few steps."""
    return make_config(
        data,
        None,
        output,
        data__train_splits=["train"],
        data__streams=STREAMS,
        data__shuffle_buffer=40,
        data__workers=2,
        data__prefetch_batches=2,
        train__global_batch_size=BATCH,
        train__epochs=EPOCHS,
        train__eval_every=1000,
        train__checkpoint_every=7,
        train__timeout_seconds=30,
        **changes,
    )


def note_rows(file: Path, pause: float, at_step: tuple[int, Any]) -> None:
    """Makes training write the rows of every step to `file`, and act before one step."""
    step, handle = [0], file.open("a", buffering=1)
    build, seed_step = trainer.run.build.build, trainer.training.loop.seed_step

    def seeded(seed: int, rank: int, number: int) -> None:
        step[0] = number
        time.sleep(pause)
        if number == at_step[0]:
            at_step[1]()
        seed_step(seed, rank, number)

    def built(*arguments: Any) -> trainer.run.session.Run:
        run = build(*arguments)

        def note(module: torch.nn.Module, inputs: tuple[Any, ...]) -> None:
            if module.training:
                ids = inputs[0].ids
                users, items = (ids[name].values().tolist() for name in ("user", "item"))
                pairs = list(zip(users, items, strict=True))
                handle.write(json.dumps({"step": step[0], "rows": pairs}) + "\n")

        run.model.register_forward_pre_hook(note)
        return run

    trainer.training.loop.seed_step, trainer.training.loop.build = seeded, built


def rank_main(
    rank: int, config: RunConfig, name: str, pause: float = 0.0, homes: Sequence[Path] = ()
) -> dict[str, Any]:
    """One rank of a run; says how it ended. In homes of their own, rank 1 loses a part at step 9."""
    if homes:
        os.chdir(homes[rank])
    part = Path(config.data.path) / "train/part-00001.parquet"
    at_step = (9 if homes and rank == 1 else -1, part.unlink)
    note_rows(Path(config.output).parent / f"{name}-{rank}.jsonl", pause, at_step)
    try:
        trainer.training.loop.train(config, resume=True)
    except InputError as error:
        return {"ended": str(error), "shared": error.shared}
    return {"ended": "done"}


def trained(root: Path, name: str, low: int, high: int) -> dict[int, list[tuple[int, int]]]:
    """Rows of steps low..high over all ranks, sorted."""
    steps: dict[int, list[tuple[int, int]]] = {}
    for file in root.glob(f"{name}-*.jsonl"):
        for line in file.read_text().splitlines():
            if line.endswith("}") and low <= (found := json.loads(line))["step"] < high:
                steps.setdefault(found["step"], []).extend(map(tuple, found["rows"]))
    return {step: sorted(rows) for step, rows in steps.items()}


def killed_and_resumed(root: Path) -> dict[str, Any]:
    """Kills a run of 2 ranks with SIGKILL; goes on with 1 and with 4 ranks; compares what was trained."""
    data = dataset(root / "data", rows=497)
    whole = configuration(data, root / "whole")
    Ranks(2, rank_main, whole, "whole").join()
    per_epoch = -(-497 // BATCH)
    undisturbed = trained(root, "whole", 0, EPOCHS * per_epoch)

    broken = configuration(data, root / "broken")
    victims = Ranks(2, rank_main, broken, "broken", 0.02)
    deadline = time.monotonic() + 60
    while len(trained(root, "broken", 0, 1000)) < per_epoch + 5:  # in the second epoch
        assert time.monotonic() < deadline
        time.sleep(0.01)
    for number in (signal.SIGSTOP, signal.SIGKILL):  # stopped, the second does not miss the first
        for process in victims.processes:
            assert process.pid is not None
            os.kill(process.pid, number)
    victims.join(codes=(-signal.SIGKILL,))
    position = read_state(checkpoints(root / "broken/checkpoints")[-1]).step
    before = trained(root, "broken", 0, position)
    lost = len(trained(root, "broken", position, 1000))
    wrong = []
    for ranks in (1, 4):
        name = f"on-{ranks}"
        shutil.copytree(root / "broken", root / name)
        config = broken.model_copy(update={"output": str(root / name)})
        file = root / name / "config.yaml"
        file.write_text(file.read_text().replace(str(root / "broken"), str(root / name)))
        Ranks(ranks, rank_main, config, name).join()
        if before | trained(root, name, 0, 1000) != undisturbed:
            wrong.append(name)
        if min(trained(root, name, 0, 1000)) != position:
            wrong.append(f"{name} began elsewhere")
    every = pq.read_table(data / "train").select(["user_id", "item_id"]).to_pydict()
    pairs = sorted((u + 1, i + 1) for u, i in zip(*every.values(), strict=True))
    for epoch in range(EPOCHS):
        steps = range(epoch * per_epoch, (epoch + 1) * per_epoch)
        if sorted(pair for step in steps for pair in undisturbed[step]) != pairs:
            wrong.append(f"epoch {epoch}: not every row once")
    return {"position": position, "lost_steps": lost, "wrong": wrong}


def fewer_rows_than_streams(root: Path) -> list[int]:
    """4 ranks, 3 rows: two streams and more have none; returns rows trained per epoch."""
    # The tables, too, have fewer rows than there are ranks.
    config = configuration(dataset(root / "few", rows=3), root / "few-run")
    ends = Ranks(4, rank_main, config, "few").join()
    assert {end["ended"] for end in ends} == {"done"}
    lines = (root / "few-run/metrics.jsonl").read_text().splitlines()
    assert len(lines) == EPOCHS + 1
    plan = json.loads((root / "few-run/plan.json").read_text())
    assert {table["sharding"] for table in plan if table["rows"] < 4} == {"table_wise"}, plan
    return [len(rows) for rows in trained(root, "few", 0, 1000).values()]


def lost_part(root: Path, everywhere: bool) -> list[dict[str, Any]]:
    """A part vanishes before step 9: from the disk that the ranks share, or from rank 1's own."""
    name = "lost" if everywhere else "lost-on-1"
    homes = [root / name, root / name if everywhere else root / f"{name}-too"]
    for home in set(homes):
        shutil.copytree(root / "data", home / "data")
    config = configuration(Path("data"), root / f"{name}-run")  # relative to the rank's home
    return Ranks(2, rank_main, config, name, 0.01, homes).join()


def main(root: Path) -> None:
    """Runs every drill."""
    torch.set_num_threads(1)
    found = {
        "killed": killed_and_resumed(root),
        "few": fewer_rows_than_streams(root),
        "lost": lost_part(root, everywhere=True),
        "lost_on_one_rank": lost_part(root, everywhere=False),
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
