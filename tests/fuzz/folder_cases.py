"""Damaged or hostile stores, datasets, runs and checkpoints, read by every command that opens them."""

import shutil
from pathlib import Path
from random import Random

from tests.fuzz.damage import damage, unpack
from tests.fuzz.verdicts import run, untouched

LEVELS = ("user", "item", "scenario")
IDS = ("vocabulary", "zero_collision")
EPOCH = ["--set", "train.epochs=1"]


def store_case(draw: Random, folder: Path) -> str:
    """A store that is verified, looked at, compressed or shuffled: 2, or 0 where it is whole."""
    unpack(folder)
    store = folder / "knowledge" / draw.choice(LEVELS)
    command = draw.choice(["verify", "inspect", "compress", "shuffle"])
    if command == "compress":  # the others are compressed already
        store = folder / "knowledge/scenario"
    damage(draw, store)
    words = {
        "verify": [],
        "inspect": ["--key", draw.choice(["1", "x", "", "é", "9" * 30])],
        "compress": ["--out", "made", "--dim", draw.choice(["1", "2"]), "--dtype", "int8"],
        "shuffle": ["--out", "made"],
    }[command]
    with untouched(folder / "knowledge", folder / "data"):
        ended = run("knowledge", command, str(store), *words)
    return f"{command}: {'done' if ended.code == 0 else 'refused'}"


def dataset_case(draw: Random, folder: Path) -> str:
    """A prepared dataset that prompts are read from, or that a run is evaluated on."""
    unpack(folder)
    damage(draw, folder / "data")
    run_folder = folder / "runs" / draw.choice(IDS)
    if draw.random() < 0.5:
        words = ["evaluate", str(run_folder)]
    else:
        config = f"configs/{run_folder.name}.yaml"
        words = ["train", "--config", config, "--set", "output=made", *EPOCH]
    with untouched(folder / "data", folder / "knowledge"):
        ended = run(*words)
    return f"{words[0]}: {'done' if ended.code == 0 else 'refused'}"


def run_case(draw: Random, folder: Path) -> str:
    """A run directory that is evaluated, resumed, started from, compared or reported."""
    unpack(folder)
    name = draw.choice(IDS)
    run_folder, config = folder / "runs" / name, f"configs/{name}.yaml"
    command = draw.choice(
        ["evaluate", "evaluate", "reuse", "resume", "resume", "start", "report", "compare"]
    )
    if command in ("resume", "start") and draw.random() < 0.7:
        shutil.rmtree(run_folder / "checkpoints/step-00000076")
    only = draw.choice(
        [run_folder, run_folder / "checkpoints", run_folder / "predictions", run_folder]
    )
    damage(draw, only if only.exists() else run_folder)
    kept = [folder / "data", folder / "knowledge"]
    words = {
        "evaluate": ["evaluate", str(run_folder), "--split", draw.choice(["test", "valid"])],
        "reuse": ["evaluate", str(run_folder), "--reuse-predictions"],
        "resume": ["train", "--config", config, "--resume"],
        "start": [
            "train",
            "--config",
            config,
            "--set",
            "output=made",
            *EPOCH,
            "--set",
            f"train.start_from={run_folder}",
        ],
        "report": ["report", str(run_folder), "--out", "made.html"],
        "compare": ["compare", str(run_folder), f"runs/{IDS[name == IDS[0]]}", "--samples", "100"],
    }[command]
    if command in ("start", "compare"):  # a report evaluates again what is outdated
        kept.append(run_folder)
    with untouched(*kept):
        ended = run(*words)
    return f"{command}: {'done' if ended.code == 0 else 'refused'}"
