"""Two commands at once on one directory, begun at random moments: run as a program, prints one JSON line.

Commands are forked from a process that has imported everything, so that a pair costs a second or two.
"""

import json
import multiprocessing
import os
import random
import re
import shutil
import sys
import time
from collections.abc import Callable
from itertools import compress
from pathlib import Path
from typing import Any

import torch

from llm_knowledge.errors import InputError
from tests.drills.fault_drill import losses
from tests.helpers.log_data import SCHEMA, random_log, write_log
from tests.helpers.training_data import make_config, make_inputs
from trainer.config.run import RunConfig
from trainer.data.sources.append import append_parquet
from trainer.data.sources.parquet_log import prepare_parquet
from trainer.evaluation.metrics import write_evaluation
from trainer.training.loop import train
from trainer.training.scoring import predict

PAIRS = 20
NIGHT = 1_700_000_100  # between the two days of a log
RULES = SCHEMA | {"split": {"rule": "global_time"}}
# What the second of a pair may be told: who is at work there, or what the first one has left.
TOLD = re.compile(
    r"another run is writing here \(process \d+ on \S+ since .*UTC\)|a run is already there|"
    r"no checkpoint to score with|another command has written it meanwhile|is not empty"
)


def evaluate(folder: Path) -> None:
    """The command of that name."""
    predict(folder, "test")
    write_evaluation(folder)


class Pair:
    """Two commands in processes of their own."""

    def __init__(self, folder: Path, commands: list[Callable[[], Any]], pause: float) -> None:
        folder.mkdir(parents=True)
        context = multiprocessing.get_context("fork")
        self.messages = [folder / f"{number}.message" for number in range(2)]
        self.processes = []
        for number, command in enumerate(commands):
            process = context.Process(target=self._run, args=(command, number), daemon=True)
            process.start()
            self.processes.append(process)
            time.sleep(pause * (1 - number))

    def _run(self, command: Callable[[], Any], number: int) -> None:
        torch.set_num_threads(1)
        errors = self.messages[number].with_suffix(".err").open("w")
        os.dup2(errors.fileno(), 2)
        try:
            command()
        except InputError as error:
            self.messages[number].write_text(str(error))
            sys.exit(2)

    @classmethod
    def alone(cls, folder: Path, command: Callable[[], Any]) -> None:
        """One command, which must succeed; this process itself runs none: threads do not survive a fork."""
        process = cls(folder, [command], 0.0)
        [code] = process.end()
        if code != 0:
            raise SystemExit(f"{folder}: exit code {code}: {process.errors(0)}")

    def errors(self, number: int) -> str:
        """The end of what a command printed, and what it was told."""
        told = self.messages[number]
        printed = told.with_suffix(".err").read_text()[-1500:]
        return printed + (told.read_text() if told.exists() else "")

    def end(self, seconds: float = 60.0) -> list[int | None]:
        """Waits for both; their exit codes, None for one that hung."""
        until = time.monotonic() + seconds
        for process in self.processes:
            process.join(max(until - time.monotonic(), 0.1))
        codes = [process.exitcode for process in self.processes]
        for process in self.processes:
            process.kill()
            process.join()
        return codes

    def wrong(self, codes: list[int | None], name: str) -> list[str]:
        """What is not as it should be: other codes than 0 and 2, both refused, other messages."""
        found = []
        if set(codes) - {0, 2} or 0 not in codes:
            found.append(f"{name}: exit codes {codes}: {self.errors(0)} {self.errors(1)}")
        for file in self.messages:
            if file.exists() and not TOLD.search(file.read_text()):
                found.append(f"{name}: told {file.read_text()}")
        return found


def pairs_on_a_run(root: Path, draw: random.Random, count: int) -> list[str]:
    """Fresh trainings, resumed ones and evaluations in one run directory, two at a time."""
    data, stores = root / "inputs/data", root / "inputs/knowledge"
    Pair.alone(root / "making", lambda: make_inputs(root / "inputs"))

    def config(name: str) -> RunConfig:
        return make_config(data, stores, root / name, train__epochs=2, train__checkpoint_every=2)

    def finish(run: RunConfig) -> None:
        train(run, resume=True)
        evaluate(Path(run.output))

    began, whole = time.monotonic(), root / "whole"
    Pair.alone(root / "training", lambda: finish(config("whole")))
    seconds = time.monotonic() - began
    wanted = json.loads((whole / "evaluation.json").read_text())["overall"]["auc"]
    wrong: list[str] = []
    for number in range(count):
        mine = config(f"run-{number}")
        folder = Path(mine.output)
        commands: dict[str, Callable[[], Any]] = {
            "train": lambda mine=mine: train(mine),
            "resume": lambda mine=mine: train(mine, resume=True),
            "evaluate": lambda folder=folder: evaluate(folder),
        }
        first = draw.choice(["train", "resume", "evaluate"])
        if first == "evaluate":
            shutil.copytree(whole, folder)
            saved = (folder / "config.yaml").read_text()
            (folder / "config.yaml").write_text(saved.replace(str(whole), str(folder)))
        second = draw.choice(["train", "resume", "evaluate"]) if folder.exists() else "resume"
        if first == "train" and draw.random() < 0.5:
            second = "train"
        name = f"run-{number}: {first}, {second}"
        pair = Pair(
            root / f"pair-{number}",
            [commands[first], commands[second]],
            draw.uniform(0, seconds / 2),
        )
        wrong += pair.wrong(pair.end(), name)
        # Whatever the pair left, the run goes on to its end.
        Pair.alone(root / f"end-{number}", lambda mine=mine: finish(mine))  # type: ignore[misc]
        if losses(folder) != losses(whole):
            wrong.append(f"{name}: other losses")
        if json.loads((folder / "evaluation.json").read_text())["overall"]["auc"] != wanted:
            wrong.append(f"{name}: another AUC")
    return wrong


def pairs_on_a_dataset(root: Path, draw: random.Random, count: int) -> list[str]:
    """Two preparations or two appends into one place."""
    root.mkdir(parents=True)
    later, schema = root / "second/log.parquet", root / "first/schema.yaml"

    def make() -> None:
        log = random_log()
        for name, early in (("first", True), ("second", False)):
            kept = [(time < NIGHT) == early for time in log["timestamp"]]
            write_log(root / name, {key: list(compress(log[key], kept)) for key in log}, RULES)
        prepare_parquet(root / "first/log.parquet", root / "base", schema)
        append_parquet(later, root / "base", root / "whole", schema)

    Pair.alone(root / "making", make)
    wanted = contents(root / "whole")
    wrong: list[str] = []
    for number in range(count):
        out = root / f"appended-{number}"

        def command(out: Path = out) -> None:
            append_parquet(later, root / "base", out, schema)

        pair = Pair(root / f"append-{number}", [command, command], draw.uniform(0, 0.3))
        codes = pair.end()
        wrong += pair.wrong(codes, out.name)
        if sorted(map(str, codes)) != ["0", "2"]:
            wrong.append(f"{out.name}: exit codes {codes}")
        if contents(out) != wanted:
            wrong.append(f"{out.name}: other files")
    return wrong


def contents(folder: Path) -> dict[str, bytes]:
    """Every Parquet file of a dataset."""
    return {str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.rglob("*.parquet"))}


def main() -> None:
    """`python -m tests.drills.pair_drill FOLDER SEED [PAIRS]`."""
    root, seed = Path(sys.argv[1]), int(sys.argv[2])
    pairs = int(sys.argv[3]) if len(sys.argv) > 3 else PAIRS
    draw = random.Random(seed)
    torch.set_num_threads(1)
    appends = pairs // 4
    wrong = pairs_on_a_run(root / "runs", draw, pairs - appends)
    wrong += pairs_on_a_dataset(root / "datasets", draw, appends)
    print(json.dumps({"seed": seed, "pairs": pairs, "wrong": wrong}))


if __name__ == "__main__":
    main()
