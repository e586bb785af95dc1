"""The stages of the study. Each skips what is there, so a killed study goes on where it stopped."""

import json
import math
import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from functools import partial
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import yaml

from benchmarks.quality.arms import ARMS, CLOSE, DATASETS, DECIDING_SEEDS, LEVELS, TEMPLATES
from launch.stages import is_evaluated, is_prepared, is_store, is_trained
from llm_knowledge.dataset_files import dataset_origin
from llm_knowledge.errors import InputError
from llm_knowledge.parquet import parquet_sql
from llm_knowledge.store.reader import KnowledgeStore
from llm_knowledge.store.writer import shuffled_store, write_store
from trainer.config.run import load_config, save_config
from trainer.evaluation.metrics import compute_metrics, write_evaluation

# Processes share the cores: with more threads than cores they would mostly wait for each other.
_ONE_THREAD = {"OMP_NUM_THREADS": "1"}


def command(*words: str) -> None:
    """Runs `llm4msr WORDS`; a failure ends the study with its message."""
    environment = {**os.environ, **_ONE_THREAD}
    subprocess.run([sys.executable, "-m", "launch", *words], check=True, env=environment)


def make_data(work: Path, name: str, raw: Path | None) -> Path:
    """Prepares a data set below `work`."""
    data, chosen = work / name / "data", DATASETS[name]
    if not is_prepared(data):
        given = ["--raw", str(raw)] if raw else []
        log = work / name / "log" if chosen.held_out_users else data
        if not is_prepared(log):
            command(*chosen.prepare, *given, "--out", str(log))
        if chosen.held_out_users:
            _prepare_again(log, data, chosen.held_out_users)
    return data


def _prepare_again(log: Path, data: Path, held_out_users: float) -> None:
    """Prepares the events of a prepared dataset as anyone's log, a share of the users held out."""
    info = json.loads((log / "dataset.json").read_text())
    events = log / "events"
    shutil.rmtree(events, ignore_errors=True)
    events.mkdir()
    for split in ("profile", "train", "valid", "test"):
        for part in sorted((log / split).glob("part-*.parquet")):
            os.link(part, events / f"{split}-{part.name}")
    schema = {
        "name": info["name"],
        "scenarios": info["scenarios"],
        "catalogue": {"path": str((log / "items.parquet").resolve()), "categories": "categories"},
        "split": {"rule": "per_user_time", "held_out_users": held_out_users},
        "positive_name": info["positive_name"],
        "negative_name": info["negative_name"],
    }
    (log / "schema.yaml").write_text(yaml.safe_dump(schema))
    inputs = ["--raw", str(events), "--schema", str(log / "schema.yaml")]
    command("prepare", "parquet", *inputs, "--out", str(data))


def truth(work: Path, name: str) -> dict[str, Any]:
    """Metrics of the simulator's own probabilities on the test events: the best any model can reach.

    `prepare parquet` has left them out of the data that models see; empty for a log without them.
    """
    log, data = work / name / "log", work / name / "data"
    if not (log / "events").exists():
        return {}
    file = work / name / "truth.parquet"
    keys = ("user_id", "item_id", "scenario_id", "timestamp", "label")
    with duckdb.connect() as connection:
        connection.execute(
            f"""COPY (SELECT {", ".join(f"t.{key}" for key in keys)},
                      e.truth_probability AS prediction, false AS has_knowledge
                      FROM {parquet_sql((data / "test").iterdir())} t
                      LEFT JOIN {parquet_sql((log / "events").iterdir())} e
                      USING ({", ".join(keys)})) TO '{str(file).replace("'", "''")}' (FORMAT parquet)"""
        )
    metrics = compute_metrics(file, data)
    rows = metrics["overall"]["rows"]
    expected = json.loads((data / "dataset.json").read_text())["rows"]["test"]
    if rows != expected:
        raise RuntimeError(f"{file}: {rows} rows, the split has {expected}")
    return metrics


def make_stores(work: Path, name: str, kinds: set[tuple[str, str]], jobs: int) -> Path:
    """Extracts the knowledge of every level and makes the control stores that are wanted.

    Args:
        work: Of the study.
        name: Data set.
        kinds: (level, kind of store).
        jobs: Processes that extract.
    """
    data, stores = work / name / "data", work / name / "stores"
    extract = ("knowledge", "extract", "--data", str(data), "--processes", str(jobs))
    if not all(is_store(stores / level) for level in LEVELS):
        command(*extract, "--level", "all", "--out", str(stores))
    for level, kind in sorted(kinds):
        out = stores / f"{level}-{kind}"
        if kind == "true" or is_store(out):
            continue
        if kind == "leak":
            _leak(data, stores, out)
        elif kind == "tastes":
            command(*extract, "--level", level, "--out", str(out), "--template", TEMPLATES[level])
        elif kind == "tastes-shuffled":
            shuffled_store(stores / f"{level}-tastes", out, seed=0, control="shuffled")
        else:
            shuffled_store(stores / level, out, seed=0, control=kind)
    return stores


def _leak(data: Path, stores: Path, out: Path) -> None:
    """User vectors that have read the training events, with cut-offs that hide it from the join."""
    copy = stores / "leaking-data"
    shutil.rmtree(copy, ignore_errors=True)
    (copy / "profile").mkdir(parents=True)
    shutil.copy(data / "dataset.json", copy)
    os.link(data / "items.parquet", copy / "items.parquet")
    number = 0
    for split in ("profile", "introduction", "train"):
        for part in sorted((data / split).glob("part-*.parquet")):
            os.link(part, copy / "profile" / f"part-{number:05d}.parquet")
            number += 1
    if not is_store(stores / "leaking"):
        target = ["--level", "user", "--out", str(stores / "leaking")]
        command("knowledge", "extract", "--data", str(copy), *target)
    leaking = KnowledgeStore.open(stores / "leaking")
    rows = leaking.manifest.rows
    text = leaking.read_text(np.arange(rows))
    write_store(
        out,
        leaking.manifest.model_copy(
            update={"note": "breaks the as-of rule on purpose", "dataset": dataset_origin(data)}
        ),
        leaking.keys(),
        leaking.read_vectors(0, rows),
        [row["prompt"] for row in text],
        None,
        [None] * rows,
    )
    shutil.rmtree(copy)


def trials(work: Path, name: str, backbone: str, arm: str) -> list[tuple[Path, list[str]]]:
    """Run directory and assignments of every trial, all with seed 0."""
    settings = _settings(work, name, backbone, arm)
    return [_run(work, name, backbone, arm, number, 0) for number in range(len(settings))]


def _settings(work: Path, name: str, backbone: str, arm: str) -> list[dict[str, Any]]:
    """What an arm tries: its data set's trials, or what the arm that it is tuned as has chosen."""
    other = ARMS[arm].tuned_as
    return [best_setting(work, name, backbone, other)[1]] if other else DATASETS[name].trials


def _close(work: Path, name: str, backbone: str, arm: str) -> list[int]:
    """Numbers of the settings that the first seed cannot tell from the best: that one alone, often."""
    reached = [valid_auc(run) for run, _ in trials(work, name, backbone, arm)]
    return [number for number, auc in enumerate(reached) if auc > max(reached) - CLOSE]


def deciders(work: Path, name: str, backbone: str, arm: str) -> list[tuple[Path, list[str]]]:
    """Runs with further seeds of the settings that the first seed cannot tell apart; often none.

    All trials have been trained.
    """
    numbers = _close(work, name, backbone, arm)
    return [
        _run(work, name, backbone, arm, number, seed)
        for number in (numbers if len(numbers) > 1 else ())
        for seed in range(1, DECIDING_SEEDS)
    ]


def seeds(
    work: Path, name: str, backbone: str, arm: str, number: int
) -> list[tuple[Path, list[str]]]:
    """The runs of all seeds with the setting that `best_setting` names; the first is its trial."""
    best = best_setting(work, name, backbone, arm)[0]
    return [_run(work, name, backbone, arm, best, seed) for seed in range(number)]


def seed_of(run: Path) -> int:
    """The seed of a run, by the name of its directory."""
    return int(run.name.rpartition("seed-")[2]) if "seed-" in run.name else 0


def _run(
    work: Path, name: str, backbone: str, arm: str, number: int, seed: int
) -> tuple[Path, list[str]]:
    """Run directory and assignments of a setting, by its number, and a seed."""
    trial = work / name / "runs" / backbone / arm / f"trial-{number}"
    run = trial.with_name(f"{trial.name}.seed-{seed}") if seed else trial
    setting = _settings(work, name, backbone, arm)[number]
    return run, assignments(work, name, backbone, arm, seed, run, setting)


def has_tried(work: Path, name: str, backbone: str, arm: str) -> bool:
    """Whether the trials of an arm, and of the one that it is tuned as, have come to a decision."""
    other = ARMS[arm].tuned_as
    if other and not has_tried(work, name, backbone, other):
        return False
    return all(
        is_current(run, words)
        for runs in (trials, deciders)
        for run, words in runs(work, name, backbone, arm)
    )


def best_setting(work: Path, name: str, backbone: str, arm: str) -> tuple[int, dict[str, Any]]:
    """Number and content of the setting with the best AUC on the valid split.

    Settings that the first seed cannot tell apart are told apart by the mean of several. All runs of
    `trials` and `deciders` have been trained.
    """
    numbers = _close(work, name, backbone, arm)

    def mean_auc(number: int) -> float:
        runs = [_run(work, name, backbone, arm, number, seed)[0] for seed in range(DECIDING_SEEDS)]
        return sum(map(valid_auc, runs)) / len(runs)

    best = max(numbers, key=mean_auc) if len(numbers) > 1 else numbers[0]
    return best, _settings(work, name, backbone, arm)[best]


def valid_auc(run: Path) -> float:
    """The best AUC on the valid split that a run has reached."""
    return json.loads((run / "summary.json").read_text())["valid_auc"] or 0.0


def assignments(
    work: Path, name: str, backbone: str, arm: str, seed: int, run: Path, further: dict[str, Any]
) -> list[str]:
    """What a run of an arm writes for --set; `further` comes last."""
    stores, chosen = work / name / "stores", ARMS[arm]
    changes: dict[str, Any] = {
        "name": f"{backbone}+{arm}",
        "output": str(run),
        "data.path": str(work / name / "data"),
        "model.backbone": backbone,
        "train.seed": seed,
        "train.epochs": 15,
        "train.eval_batch_size": 8_192,
        "train.checkpoint_every": 100_000,  # the best state is kept at evaluations
        "model.meta.enabled": bool(chosen.stores),
        **{f"model.meta.{key}": value for key, value in chosen.meta.items()},
        **{
            f"knowledge.{level}": str(stores / (level if kind == "true" else f"{level}-{kind}"))
            for level, kind in chosen.stores.items()
        },
        **DATASETS[name].changes,
        **further,
    }
    if chosen.layer_step != 1.0:
        rate = changes["train.meta_learning_rate"]
        changes["train.knowledge_learning_rate"] = rate
        changes["train.meta_learning_rate"] = chosen.layer_step * rate
    return [f"{key}={json.dumps(value)}" for key, value in changes.items()]


def is_current(run: Path, words: list[str]) -> bool:
    """Whether a run was trained with these assignments: what an arm chose may have changed since."""
    try:
        return is_trained(load_config(None, words))
    except InputError:  # of other assignments
        return False


def train_cells(
    work: Path, cells: list[tuple[str, str, str]], number: int, jobs: int, ends: float
) -> bool:
    """Trains cells (data set, backbone, arm): trials, what decides between close ones, all seeds.

    `jobs` backbones at a time, each on a process of its own, so that no core waits for the trials of
    another.

    Returns:
        Whether all are done; False if `ends` (of `time.monotonic`) came first.
    """
    backbones: dict[tuple[str, str], list[tuple[str, str, str]]] = {}
    for cell in cells:
        backbones.setdefault(cell[:2], []).append(cell)

    def train_backbone(arms: list[tuple[str, str, str]]) -> bool:
        return all(
            train([run for cell in arms for run in runs(*cell)], 1, (ends - time.monotonic()) / 60)
            for runs in (
                partial(trials, work),
                partial(deciders, work),
                partial(seeds, work, number=number),
            )
        )

    with ThreadPoolExecutor(jobs) as pool:
        return all(list(pool.map(train_backbone, backbones.values())))


def train(runs: list[tuple[Path, list[str]]], jobs: int, minutes: float = math.inf) -> bool:
    """Trains the runs that are not there, or there with other settings, `jobs` processes at a time.

    A run costs seconds, as does a process before its first, so each takes up to eight of them. Returns
    whether all are done; False if the time was over first.
    """
    ends = time.monotonic() + 60 * minutes
    pending = []
    for run, words in runs:
        if is_current(run, words):
            _evaluate(run)  # it may have been killed before it was evaluated
        else:
            pending.append((run, words))
    rounds = -(-len(pending) // (8 * jobs)) or 1
    size = -(-len(pending) // (rounds * jobs)) or 1  # so that the jobs end together
    batches = [pending[i : i + size] for i in range(0, len(pending), size)]
    processes: list[subprocess.Popen] = []

    def train_batch(batch: list[tuple[Path, list[str]]]) -> bool:
        # Once a process has failed none is started: its thread takes the next batch at once.
        if time.monotonic() >= ends or any(process.poll() for process in processes):
            return False
        processes.append(process := _start(batch))
        _finish(process, [run for run, _ in batch])
        return True

    whole = True
    with ThreadPoolExecutor(jobs) as pool:
        waiting = [pool.submit(train_batch, batch) for batch in batches]
        try:
            for number, batch in enumerate(as_completed(waiting), 1):
                whole &= batch.result()
                print(f"batch {number} of {len(batches)}", file=sys.stderr, flush=True)
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
            # Else they would write on while a new study begins below them.
            for process in processes:
                process.terminate()
    return whole


def _finish(process: subprocess.Popen, folders: list[Path]) -> None:
    """Waits for a process that trains runs, and evaluates them.

    Raises:
        RuntimeError: It failed; ends with what it said.
    """
    said = _messages(folders[0])
    if process.wait():
        tail = said.read_text(errors="replace")[-2000:]
        raise RuntimeError(
            f"training failed (exit code {process.returncode}), one of {', '.join(map(str, folders))}. It "
            f"said ({said}):\n{tail}"
        )
    said.unlink()
    for folder in folders:
        _evaluate(folder)


def _messages(run: Path) -> Path:
    """Where the process whose first run this is writes its messages."""
    return run.parent / f"{run.name}.log"


def _evaluate(run: Path) -> None:
    if not is_evaluated(run):
        write_evaluation(run)
        shutil.rmtree(run / "checkpoints", ignore_errors=True)


def _start(batch: list[tuple[Path, list[str]]]) -> subprocess.Popen:
    files = []
    for run, words in batch:
        shutil.rmtree(run, ignore_errors=True)
        file = run.parent / f"{run.name}.yaml"
        file.parent.mkdir(parents=True, exist_ok=True)
        save_config(load_config(None, words), file)
        files.append(str(file))
    environment = {**os.environ, **_ONE_THREAD}
    with _messages(batch[0][0]).open("w") as messages:
        return subprocess.Popen(
            [sys.executable, "-m", "launch", "train", "--config", *files],
            env=environment,
            stderr=messages,
        )
