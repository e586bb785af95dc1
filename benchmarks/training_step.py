"""What LLM4MSR adds to a training step: its backbone with and without it, in turns, on the same batches.

    python -m benchmarks.training_step --data quickstart/data --knowledge quickstart/knowledge

One process, the quickstart's configuration and batches held in memory. Rounds alternate between the
arms; a round is a number of steps, its figure the time per step. Printed: the median ratio to the
backbone and its quartiles, wall-clock and processor time, and how many operators a step calls.
"""

import argparse
import itertools
import json
import os
import platform
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

_NO_LAYERS = {"user_layers": 0, "scenario_layers": 0}
_INPUTS = {"item_knowledge": "match", "inputs": ["user"]}
# Arm to the settings that make it: each adds one part to the one before. Then two replace the kind, and
# the last has the layers alone, without items, match or the user's vector as an input.
ARMS = {
    "backbone": {"model.meta.enabled": False},
    "item input": _NO_LAYERS | {"item_knowledge": "input"},
    "+ match": _NO_LAYERS | {"item_knowledge": "match"},
    "+ user input": _NO_LAYERS | _INPUTS,
    "+ scenario layer": _INPUTS | {"kind": "gate", "user_layers": 0},
    "LLM4MSR": _INPUTS | {"kind": "gate"},
    "LLM4MSR, core": _INPUTS | {"kind": "core"},
    "LLM4MSR, low rank": _INPUTS | {"kind": "low_rank"},
    "layers alone": {"kind": "gate"},
}


def main() -> None:
    """Measures and prints a Markdown table and, with --out, JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="prepared dataset")
    parser.add_argument("--knowledge", type=Path, required=True, help="stores user, scenario, item")
    parser.add_argument("--backbone", default="star")
    parser.add_argument("--batch", type=int, default=1024)
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="of every arm, as in train"
    )
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--steps", type=int, default=10, help="per round")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        found = measure(options, Path(scratch))
    print(f"{found['hardware']}; {found['versions']}; load {found['load']}")
    print(
        f"backbone {options.backbone} {' '.join(options.set)}, batch {options.batch}, "
        f"{options.rounds} rounds of {options.steps} steps each, after one round of warm-up"
    )
    print("\n| arm | ms a step | to the backbone, wall | to the backbone, processor | operators |")
    print("|---|---|---|---|---|")
    for name, arm in found["arms"].items():
        wall, busy = arm["wall_ratio"], arm["processor_ratio"]
        print(
            f"| {name} | {arm['milliseconds']:.1f} | {wall[1]:.2f} ({wall[0]:.2f} to {wall[2]:.2f}) "
            f"| {busy[1]:.2f} ({busy[0]:.2f} to {busy[2]:.2f}) | {arm['operators']} |"
        )
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(found, indent=1) + "\n")


def _operators(step: Callable[[], object]) -> int:
    """How many operators a step calls, forward and backward."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Counter(TorchDispatchMode):
        calls = 0

        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            self.calls += 1
            return func(*args, **(kwargs or {}))

    with Counter() as counter:
        step()
    return counter.calls


def measure(options: argparse.Namespace, scratch: Path) -> dict:
    """Times of every arm, round by round, and their ratios."""
    import torch

    from embeddings.versions import versions
    from trainer.distributed.process_group import distributed

    load = os.getloadavg()[0]
    steps: dict[str, list[float]] = {name: [] for name in ARMS}
    busy: dict[str, list[float]] = {name: [] for name in ARMS}
    with distributed(60) as runtime:
        arms = {name: _arm(options, name, scratch, runtime) for name in ARMS}
        operators = {}
        for name, step in arms.items():
            step()
            operators[name] = _operators(step)
        for number in range(options.rounds + 1):
            for name, step in arms.items():
                began, used = time.perf_counter(), time.process_time()
                for _ in range(options.steps):
                    step()
                if number:  # the first round warms up
                    steps[name].append((time.perf_counter() - began) / options.steps)
                    busy[name].append((time.process_time() - used) / options.steps)
    base, base_busy = np.array(steps["backbone"]), np.array(busy["backbone"])
    quartiles = [25, 50, 75]
    return {
        "hardware": f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads",
        "versions": versions(),
        "load": f"{load:.1f} at the start, {os.getloadavg()[0]:.1f} at the end",
        "backbone": options.backbone,
        "set": options.set,
        "batch": options.batch,
        "rounds": options.rounds,
        "steps_per_round": options.steps,
        "arms": {
            name: {
                "milliseconds": 1000 * float(np.median(steps[name])),
                "operators": operators[name],
                "wall_ratio": np.percentile(np.array(steps[name]) / base, quartiles).tolist(),
                "processor_ratio": np.percentile(
                    np.array(busy[name]) / base_busy, quartiles
                ).tolist(),
            }
            for name in ARMS
        },
    }


def _arm(options: argparse.Namespace, name: str, scratch: Path, runtime):  # type: ignore[no-untyped-def]
    """A function that trains one step of the arm, on batches that are read once."""
    from trainer.config.run import load_config
    from trainer.run.build import build
    from trainer.run.inputs import open_inputs
    from trainer.training.run_folder import prepare_folder

    changes = {
        "name": "step",
        "output": str(scratch / name),
        "data.path": str(options.data),
        "model.backbone": options.backbone,
        "train.global_batch_size": options.batch,
    }
    if name == "backbone":
        changes |= ARMS[name]
    else:
        meta = {"enabled": True, **ARMS[name]}
        changes |= {f"model.meta.{key}": value for key, value in meta.items()}
        items = meta.get("item_knowledge", "none")
        levels = [] if items == "none" else ["item"]
        levels += ["user"] if items == "match" or meta.get("user_layers", 1) else []
        levels += ["scenario"] if meta.get("scenario_layers", 1) else []
        changes |= {f"knowledge.{level}": str(options.knowledge / level) for level in levels}
    words = [f"{key}={json.dumps(value)}" for key, value in changes.items()]
    config = load_config(None, [*words, *options.set])
    inputs = open_inputs(config, runtime)
    run = build(config, runtime, prepare_folder(config, runtime, resume=False), inputs)
    run.model.train()
    events = run.stream(["train"], shuffle=True)
    batches = itertools.cycle(list(itertools.islice(events.batches(0, 0), options.steps)))
    return lambda: run.pipeline.progress(batches)


if __name__ == "__main__":
    main()
