"""Drills of dying, preempted, stopped and starved ranks: run as a program, prints one JSON line.

Ranks are forked from a process that has imported everything, so that a life costs a second.
"""

import json
import math
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import FileSystemWriter

import trainer.run.build
import trainer.training.loop
from llm_knowledge.errors import InputError
from tests.drills.input_drill import dataset, note_rows
from tests.helpers.ranks import Ranks
from tests.helpers.training_data import make_config
from trainer.checkpoint.directory import checkpoints, problem_of, read_state
from trainer.config.run import RunConfig
from trainer.data.loading.row_encoder import RowEncoder
from trainer.observe.anomalies import incidents

KILLS, STEPS_PER_LIFE = 20, 9
ROWS, BATCH = 497, 40
STEPS_PER_EPOCH = -(-ROWS // BATCH)
EPOCHS = 20  # more steps than all lives can make, with some left for those made between two looks
assert EPOCHS * STEPS_PER_EPOCH > 1.4 * KILLS * STEPS_PER_LIFE


def rank_main(
    rank: int, config: RunConfig, name: str, pause: float, prepare: dict[int, Callable[[], None]]
) -> None:
    """One rank of one life of a run; `prepare` breaks something on ranks."""
    root = Path(config.output).parent
    errors = (root / f"{name}-{rank}.err").open("w")
    os.dup2(errors.fileno(), 2)
    note_rows(root / f"{name}-{rank}.jsonl", pause, (-1, None))
    if rank in prepare:
        prepare[rank]()
    try:
        trainer.training.loop.train(config, resume=True)
    except InputError as error:
        (root / f"{name}-{rank}.refused").write_text(str(error))
        sys.exit(2)


class Life:
    """The ranks of a run from their start to their end."""

    def __init__(
        self,
        config: RunConfig,
        name: str,
        ranks: int = 2,
        pause: float = 0.0,
        prepare: dict[int, Callable[[], None]] | None = None,
    ) -> None:
        self.root, self.name, self.config = Path(config.output).parent, name, config
        self.began = time.monotonic()
        self.group = Ranks(ranks, rank_main, config, name, pause, prepare or {})
        self.ranks = self.group.processes

    def steps(self) -> dict[int, list[tuple[int, int]]]:
        """Rows of every step that all ranks have begun, sorted."""
        found: dict[int, list[tuple[int, int]]] = {}
        counts: dict[int, int] = {}
        for file in self.root.glob(f"{self.name}-*.jsonl"):
            for line in file.read_text().splitlines():
                if line.endswith("}"):
                    one = json.loads(line)
                    found.setdefault(one["step"], []).extend(map(tuple, one["rows"]))
                    counts[one["step"]] = counts.get(one["step"], 0) + 1
        return {
            step: sorted(rows) for step, rows in found.items() if counts[step] == len(self.ranks)
        }

    def wait_for_steps(self, count: int, until: float = math.inf) -> None:
        """Waits until so many steps have begun, or the life or the time `until` is over."""
        end = time.monotonic() + 60
        while len(self.steps()) < count and any(rank.is_alive() for rank in self.ranks):
            if time.monotonic() > until:
                return
            assert time.monotonic() < end, f"{self.name}: {self.errors()}"
            time.sleep(0.01)

    def signal(self, number: int, *ranks: int) -> None:
        """Sends a signal to ranks."""
        for rank in ranks:
            pid = self.ranks[rank].pid
            assert pid is not None
            if self.ranks[rank].is_alive():
                os.kill(pid, number)

    def end(self, *codes: int) -> float:
        """Waits for the end; every rank's exit code must be one of `codes`. Seconds that it took."""
        began = time.monotonic()
        try:
            self.group.join(codes=codes)
        except RuntimeError as error:
            raise SystemExit(f"{self.name}: {error}\n{self.errors()}") from error
        return time.monotonic() - began

    def errors(self) -> str:
        """What the ranks printed."""
        files = sorted(self.root.glob(f"{self.name}-*.err"))
        return "\n".join(file.read_text()[-3000:] for file in files)


def losses(run: Path) -> dict[int, float]:
    """Loss by step; every step must stand there once."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    found = [(line["step"], line["loss"]) for line in lines if line["kind"] == "train"]
    assert len(dict(found)) == len(found), f"{run}: a step was trained twice"
    return dict(found)


class Drill:
    """An undisturbed run, and what differs from it in a disturbed one."""

    def __init__(self, root: Path, ranks: int = 2, **changes: object) -> None:
        self.root, self.ranks = root, ranks
        if not (root / "data").exists():
            dataset(root / "data", rows=ROWS)
        self.changes: dict[str, object] = {
            "data__train_splits": ["train"],
            "data__streams": 4,
            "data__shuffle_buffer": 40,
            "data__workers": 2,
            "data__prefetch_batches": 2,
            "train__global_batch_size": BATCH,
            "train__epochs": EPOCHS,
            "train__eval_every": 10,
            "train__checkpoint_every": 3,
            "train__timeout_seconds": 30,
        } | changes
        self.name = f"whole-{ranks}-{len(changes)}"
        whole = Life(self.config(self.name), f"{self.name}-life", ranks)
        whole.end(0)
        self.rows, self.losses = whole.steps(), losses(root / self.name)

    def config(self, name: str, **changes: object) -> RunConfig:
        """The configuration of a run of that name."""
        return make_config(self.root / "data", None, self.root / name, **(self.changes | changes))

    def wrong(self, name: str, lives: list[Life], rel: float = 1e-6) -> list[str]:
        """What differs: rows of any step in any life, losses, steps left out."""
        found = []
        for life in lives:
            found += [
                f"{life.name}: other rows in step {step}"
                for step, rows in life.steps().items()
                if rows != self.rows[step]
            ]
        mine = losses(self.root / name)
        steps = lives[0].config.train.epochs * STEPS_PER_EPOCH  # fewer epochs: the same beginning
        if list(mine) != list(self.losses)[:steps]:
            found.append(f"{name}: has steps {list(mine)}")
        found += [
            f"{name}: loss of step {step} is {mine[step]}, undisturbed {loss}"
            for step, loss in self.losses.items()
            if step in mine and abs(mine[step] - loss) > rel * abs(loss)
        ]
        return found


def random_kills(drill: Drill, seed: int) -> dict[str, Any]:
    """Kills one rank or all at 20 random times of a run: starting, training, evaluating, writing."""
    draw = random.Random(seed)
    lives, began_at, recovery, survivors = [], [], [], []
    for kill in range(KILLS):
        config = drill.config("killed", train__checkpoint_async=draw.random() < 0.5)
        life = Life(config, f"killed-{kill}")
        lives.append(life)
        if draw.random() < 0.2:
            # perhaps before the first step
            life.wait_for_steps(STEPS_PER_LIFE, until=time.monotonic() + draw.uniform(0.05, 1.0))
        else:
            life.wait_for_steps(1)
            recovery.append(time.monotonic() - life.began)
            life.wait_for_steps(draw.randint(1, STEPS_PER_LIFE))
            time.sleep(draw.uniform(0, 0.05))
        victims = draw.choice([(0,), (1,), (0, 1)])
        life.signal(signal.SIGKILL, *victims)
        survivors.append(life.end(-9, 1, 2, 0))
        began_at.append(min(life.steps(), default=None))
        if all(rank.exitcode == 0 for rank in life.ranks):
            raise SystemExit(f"seed {seed}: finished before kill {kill}")
    last = Life(drill.config("killed"), "killed-last")
    last.end(0)
    return {
        "seed": seed,
        "kills": KILLS,
        "began_at": began_at,
        "seconds_to_first_step": recovery,
        "seconds_until_survivors_end": survivors,
        "wrong": drill.wrong("killed", [*lives, last]),
    }


def told_to_end(drill: Drill) -> dict[str, Any]:
    """SIGTERM to one of two ranks: both save their last step and end so that they are started again."""
    config = drill.config("told", train__epochs=3)
    life = Life(config, "told-1", pause=0.02)
    life.wait_for_steps(8)
    life.signal(signal.SIGTERM, 1)
    seconds = life.end(143)
    newest = checkpoints(drill.root / "told/checkpoints")[-1]
    assert problem_of(newest) is None
    saved, trained = read_state(newest).step, max(life.steps()) + 1
    again = Life(config, "told-2")
    again.end(0)
    return {
        "seconds": seconds,
        "saved": saved,
        "trained": trained,
        "went_on": min(again.steps()),
        "wrong": drill.wrong("told", [life, again]),
    }


def shrinks_and_grows(root: Path) -> dict[str, Any]:
    """Four ranks are killed, two go on and are killed, four go on."""
    drill = Drill(root, 4, train__epochs=3, model__dropout=0.0)  # masks are drawn per rank
    lives = []
    for at, (ranks, steps) in enumerate(((4, 10), (2, 12), (4, 1000))):
        lives.append(Life(drill.config("elastic"), f"elastic-{at}", ranks, pause=0.01))
        lives[-1].wait_for_steps(steps)
        if at < 2:
            lives[-1].signal(signal.SIGSTOP, *range(ranks))
            lives[-1].signal(signal.SIGKILL, *range(ranks))
        lives[-1].end(0 if at == 2 else -9)
    positions = [min(life.steps()) for life in lives]
    return {"positions": positions, "wrong": drill.wrong("elastic", lives, rel=1e-4)}


def stopped_rank(drill: Drill) -> dict[str, Any]:
    """SIGSTOP: the rank that stops answering is named; it goes on when it is let go on."""
    life = Life(
        drill.config("stopped", train__epochs=3, train__hang_seconds=1.5), "stopped", pause=0.02
    )
    life.wait_for_steps(8)
    life.signal(signal.SIGSTOP, 1)
    began, report = time.monotonic(), drill.root / "stopped/hang/report.txt"
    while not report.exists():
        assert time.monotonic() < began + 30, life.errors()
        time.sleep(0.02)
    seconds = time.monotonic() - began
    time.sleep(0.1)
    life.signal(signal.SIGCONT, 1)
    life.end(0)
    stacks = (drill.root / "stopped/hang/rank-0.txt").read_text()
    return {
        "seconds": seconds,
        "report": report.read_text(),
        "stacks": stacks,
        "collectives": (drill.root / "stopped/hang/rank-0-fr_trace_json.json").stat().st_size,
        "wrong": drill.wrong("stopped", [life]),
    }


def starved_rank(drill: Drill) -> dict[str, Any]:
    """Rank 1's storage does not give its rows for a while."""

    def starve() -> None:
        encode, calls = RowEncoder.encode, [0]

        def slow(self: RowEncoder, *arguments: Any, **named: Any) -> Any:
            calls[0] += 1
            if calls[0] == 9:
                time.sleep(4)
            return encode(self, *arguments, **named)

        RowEncoder.encode = slow  # type: ignore[method-assign]

    config = drill.config("starved", train__epochs=3, train__hang_seconds=1.5)
    life = Life(config, "starved", prepare={1: starve})
    life.end(0)
    folder = drill.root / "starved/hang"
    return {
        "report": (folder / "report.txt").read_text(),
        "stacks": [(folder / f"rank-{rank}.txt").read_text() for rank in (0, 1)],
        "wrong": drill.wrong("starved", [life]),
    }


def bad_storage(drill: Drill) -> dict[str, Any]:
    """Checkpoints are written slowly on rank 1, and then not at all: the disk is full."""
    write, calls = FileSystemWriter.write_data, [0]

    def troubled(self: FileSystemWriter, *arguments: Any, **named: Any) -> Any:
        calls[0] += 1
        if calls[0] == 2:
            time.sleep(3)
        if calls[0] == 4:
            raise OSError(28, "No space left on device")
        return write(self, *arguments, **named)

    def break_storage() -> None:
        FileSystemWriter.write_data = troubled  # type: ignore[method-assign]

    config = drill.config("storage", train__epochs=3, train__hang_seconds=1.5)
    life = Life(config, "storage-1", prepare={1: break_storage})
    life.end(2)
    report = (drill.root / "storage/hang/report.txt").read_text()
    refused = [(drill.root / f"storage-1-{rank}.refused").read_text() for rank in (0, 1)]
    again = Life(config, "storage-2")
    again.end(0)
    return {
        "report": report,
        "refused": refused,
        "went_on": min(again.steps()),
        "wrong": drill.wrong("storage", [life, again]),
    }


def poisoned(drill: Drill) -> dict[str, Any]:
    """A batch of rank 1 without a finite loss, by policy; a rank that drifts apart from the other."""

    def poison() -> None:
        at_batch(7, lambda run, batch: batch.label.fill_(float("inf")))

    def drift() -> None:
        at_batch(7, lambda run, batch: next(run.model.module.dense.parameters()).data.add_(1e-6))

    found: dict[str, Any] = {}
    for name, broken, options in (
        ("stop", poison, {}),
        ("skip", poison, {"train__guard": "{non_finite: skip}"}),
        ("rollback", poison, {"train__guard": "{non_finite: rollback}"}),
        ("apart", drift, {}),
    ):
        config = drill.config(f"guard-{name}", train__epochs=2, **options)
        life = Life(config, f"guard-{name}-life", prepare={1: broken})
        life.end(2 if name in ("stop", "apart") else 0)
        refused = [drill.root / f"{life.name}-{rank}.refused" for rank in (0, 1)]
        found[name] = {
            "refused": [file.read_text() for file in refused if file.exists()],
            "incidents": incidents(drill.root / f"guard-{name}"),
            "losses": losses(drill.root / f"guard-{name}"),
            "saved": [one.name for one in checkpoints(drill.root / f"guard-{name}/checkpoints")],
        }
    return found | {"undisturbed": drill.losses}


def at_batch(number: int, act: Callable[[trainer.run.session.Run, Any], object]) -> None:
    """Lets something happen to this process before it trains its n-th batch, from 0."""
    build, calls = trainer.training.loop.build, [0]

    def built(*arguments: Any) -> trainer.run.session.Run:
        run = build(*arguments)

        def before(module: torch.nn.Module, inputs: tuple[Any, ...]) -> None:
            if module.training:
                if calls[0] == number:
                    act(run, inputs[0])
                calls[0] += 1

        run.model.register_forward_pre_hook(before)
        return run

    trainer.training.loop.build = built


def main(root: Path, seed: int) -> None:
    """Runs every drill."""
    torch.set_num_threads(1)
    os.environ["TORCH_FR_BUFFER_SIZE"] = "100"
    drill = Drill(root)
    found, seconds = {}, {}
    chosen = sys.argv[3:]
    for name, act in {
        "told": told_to_end,
        "stopped": stopped_rank,
        "starved": starved_rank,
        "storage": bad_storage,
        "guard": poisoned,
        "kills": lambda drill: random_kills(drill, seed),
        "elastic": lambda drill: shrinks_and_grows(drill.root),
    }.items():
        if chosen and name not in chosen:
            continue
        began = time.monotonic()
        found[name] = act(drill)
        seconds[name] = round(time.monotonic() - began, 1)
    print(json.dumps(found | {"seconds": seconds}))
    shutil.rmtree(root / "data")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
