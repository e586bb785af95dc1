"""Training with the loader in and out: the same steps fed by the files, and by batches in memory.

    python -m benchmarks.loader --data data/movielens --knowledge knowledge/movielens --processes 2 \
        --out benchmarks/results/loader.json

The model is launch/configs/movielens.yaml. In each round every arm trains the same steps, in turn. Each
begins with a new reader, so opening and the first chunk count, which a run pays once. Batches of the
arm `memory` are read before its clock starts.
"""

import argparse
import itertools
import json
import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch.distributed as dist

from embeddings.profiling.measure import machine
from launch.workers import run_workers
from trainer.config.run import load_config
from trainer.data.loading.batch import Batch
from trainer.distributed.process_group import Runtime, distributed, seed_step
from trainer.run.build import build
from trainer.run.inputs import open_inputs
from trainer.run.session import Run

CONFIG = Path(__file__).parent.parent / "launch/configs/movielens.yaml"
ARMS = ("memory", "files, no thread", "files")


def batches(run: Run, arm: str, start: int, stop: int) -> Iterator[Batch]:
    """The batches of some steps: made while they are used, or all before."""
    data = run.config.data.model_copy(update={"workers": 0} if arm != "files" else {})
    config = run.config.model_copy(update={"data": data})
    reader = Run(**{**vars(run), "config": config}).stream(list(data.train_splits), shuffle=True)
    feed = reader.feed(start, stop)
    if arm != "memory":
        return feed
    with feed:
        return iter(list(feed))


def train_seconds(run: Run, arm: str, start: int, stop: int) -> tuple[float, float]:
    """Seconds of all ranks for steps start..stop; processor seconds of this one, all threads."""
    found = batches(run, arm, start, stop)
    dist.barrier()
    began, used = time.perf_counter(), time.process_time()
    for step in range(start, stop):
        seed_step(run.config.train.seed, run.runtime.rank, step)
        run.pipeline.progress(found)
    used = time.process_time() - used  # waiting for the slower rank takes processor time, too
    dist.barrier()
    return time.perf_counter() - began, used


def read_seconds(run: Run, start: int, stop: int) -> float:
    """Seconds to make the batches of steps start..stop without using them, threads included."""
    stream = run.stream(list(run.config.data.train_splits), shuffle=True)
    dist.barrier()
    began = time.perf_counter()
    with stream.feed(start, stop) as feed:
        for _ in feed:
            pass
    dist.barrier()
    return time.perf_counter() - began


def quartiles(values: list[float]) -> dict[str, float]:
    """Median and quartiles."""
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return {"median": middle, "quartiles": [low, high]}  # type: ignore[dict-item]


def shares(taken: dict[str, list[float]]) -> dict[str, dict[str, float]]:
    """Speed of each arm over that of `memory`, round by round."""
    return {
        arm: quartiles([m / s for m, s in zip(taken["memory"], taken[arm], strict=True)])
        for arm in ARMS[1:]
    }


def measure(runtime: Runtime, options: argparse.Namespace) -> dict[str, Any]:
    """Rounds of all arms, each round in another order."""
    changes = [f"data.path={options.data}", *options.set]
    changes += [f"knowledge.{n}={options.knowledge / n}" for n in ("user", "scenario", "item")]
    with tempfile.TemporaryDirectory() as folder:
        shared = [folder]
        dist.broadcast_object_list(shared)  # vocabularies are rank 0's to write
        config = load_config(CONFIG, [*changes, f"output={shared[0]}"])
        run = build(config, runtime, Path(shared[0]), open_inputs(config, runtime))
        run.model.train()
        train_seconds(run, "files", 0, options.warm_up)
        seconds: dict[str, list[float]] = {arm: [] for arm in ARMS}
        processor: dict[str, list[float]] = {arm: [] for arm in ARMS}
        reading = []
        orders = itertools.cycle(itertools.permutations(ARMS))
        for number, order in zip(range(options.rounds), orders, strict=False):
            start = number * options.steps
            for arm in order:
                taken, used = train_seconds(run, arm, start, start + options.steps)
                seconds[arm].append(taken)
                processor[arm].append(used)
            reading.append(read_seconds(run, start, start + options.steps))
        dist.barrier()
    samples = options.steps * config.train.global_batch_size
    return {
        "machine": machine(),
        "ranks": runtime.world_size,
        "global_batch_size": config.train.global_batch_size,
        "steps_per_round": options.steps,
        "rounds": options.rounds,
        "warm_up_steps": options.warm_up,
        "samples_per_second": {
            **{arm: quartiles([samples / s for s in all_]) for arm, all_ in seconds.items()},
            "files alone, nothing trained": quartiles([samples / one for one in reading]),
        },
        "share_of_memory": shares(seconds),
        "share_of_memory_by_processor_time": shares(processor),
    }


def main() -> int:
    """Starts the ranks; rank 0 prints the result."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="prepared dataset")
    parser.add_argument("--knowledge", type=Path, required=True, help="folder of the stores")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--steps", type=int, default=160, help="per arm and round")
    parser.add_argument("--warm-up", type=int, default=80, help="steps")
    parser.add_argument("--set", action="append", default=[], metavar="A.B=C")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if "RANK" not in os.environ:
        import sys

        return run_workers("benchmarks.loader", sys.argv[1:], options.processes)
    with distributed(600) as runtime:
        result = measure(runtime, options)
        if runtime.is_main:
            text = json.dumps(result, indent=1)
            print(text)
            if options.out:
                options.out.write_text(text + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
