"""The whole journey on real data: prepare, extract, train every arm, compare, report.

Each stage is skipped when its output is complete, so a second call continues a first one.
"""

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from launch.workers import INPUT_WAS_WRONG, run_workers
from llm_knowledge.errors import InputError

BASE = Path(__file__).parent / "configs" / "movielens.yaml"
LEVELS = ("user", "scenario", "item")
BACKBONES = ("shared_bottom", "star")
# Arm to the kind of its stores (None: the backbone alone) and what it changes of the configuration.
ARMS: dict[str, tuple[str | None, list[str]]] = {
    "": (None, ["model.meta.enabled=false"]),
    "+llm4msr": ("", []),
    "+no_match": ("", ["model.meta.item_knowledge=input"]),
    "+shuffled": ("-shuffled", []),
}


def quickstart(out: Path, raw: Path | None = None, seeds: int = 3, processes: int = 2) -> Path:
    """Runs every stage below `out`; prints the table of differences and the report's path.

    Args:
        out: Directory for data, knowledge, runs and report.
        raw: MovieLens files; None looks for them, then downloads, then falls back to the simulator.
        seeds: Runs per arm.
        processes: Training and extraction processes on this machine.

    Returns:
        Path of the report.
    """
    began = time.perf_counter()
    if seeds < 1 or processes < 1:
        raise InputError("quickstart: --seeds and --processes must be at least 1")
    out.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    say = _Speaker(began)
    say("1/5 data")
    data = _prepare(out / "data", raw)
    say("2/5 knowledge: a frozen language model reads one prompt per user, scenario and item")
    knowledge = _extract(data, out / "knowledge", processes)
    say(
        f"3/5 training: {len(BACKBONES)} backbones x {len(ARMS)} arms x {seeds} seeds on "
        f"{processes} processes"
    )
    arms = _train(data, knowledge, out, seeds, processes)
    say("4/5 evaluation")
    comparisons = _evaluate(arms, out)
    say("5/5 report")
    from trainer.report.page import write_report

    runs = [run for paths in arms.values() for run in paths]
    report = write_report(runs, out / "report.html", comparisons)
    _print_table(arms, comparisons)
    say(f"done; open {report.resolve()}")
    return report


class _Speaker:
    """Says which stage begins, with the seconds since the start."""

    def __init__(self, began: float) -> None:
        self._began = began

    def __call__(self, text: str) -> None:
        print(f"[{time.perf_counter() - self._began:5.0f} s] {text}", file=sys.stderr, flush=True)


def _prepare(data: Path, raw: Path | None) -> Path:
    from trainer.data.dataset import open_dataset
    from trainer.data.sources.movielens import prepare_movielens
    from trainer.data.sources.simulate import simulate

    if not (data / "dataset.json").exists():
        try:
            prepare_movielens(raw, data)
        except InputError as error:
            if raw is not None:
                raise
            print(f"{error}\nGoing on with a simulated log instead.", file=sys.stderr)
            simulate(data, users=2000, items=1000, scenarios=3, events=100_000, seed=0)
    info = open_dataset(data)
    print(
        f"        {info.name}: {info.users:,} users, {info.items:,} items, rows {info.rows}",
        file=sys.stderr,
    )
    return data


def _extract(data: Path, knowledge: Path, processes: int) -> Path:
    from llm_knowledge.store.writer import shuffled_store

    complete = [knowledge / level / "manifest.json" for level in LEVELS]
    if not all(path.exists() for path in complete):
        words = [
            "knowledge",
            "extract",
            "--data",
            str(data),
            "--level",
            "all",
            "--out",
            str(knowledge),
        ]
        _workers(words, processes)
    for level in LEVELS:
        if not (knowledge / f"{level}-shuffled" / "manifest.json").exists():
            shuffled_store(knowledge / level, knowledge / f"{level}-shuffled", seed=0)
    return knowledge


def _train(
    data: Path, knowledge: Path, out: Path, seeds: int, processes: int
) -> dict[str, list[Path]]:
    """Trains what is not trained yet, all in one set of processes; returns run directories by arm."""
    from trainer.config.run import RunConfig, load_config, save_config

    arms: dict[str, list[Path]] = {}
    pending: list[Path] = []
    for backbone in BACKBONES:
        for arm, (kind, own) in ARMS.items():
            name = backbone + arm
            changes = [f"name={name}", f"data.path={data}", f"model.backbone={backbone}", *own]
            for level in LEVELS:
                store = "null" if kind is None else knowledge / (level + kind)
                changes.append(f"knowledge.{level}={store}")
            for seed in range(seeds):
                run = out / "runs" / name / f"seed-{seed}"
                arms.setdefault(name, []).append(run)
                if (run / "summary.json").exists():
                    continue
                config: RunConfig = load_config(
                    BASE, [*changes, f"output={run}", f"train.seed={seed}"]
                )
                file = out / "configs" / f"{name}-seed-{seed}.yaml"
                file.parent.mkdir(parents=True, exist_ok=True)
                save_config(config, file)
                pending.append(file)
    if pending:
        _workers(["train", "--resume", "--config", *map(str, pending)], processes)
    return arms


def _workers(words: list[str], processes: int) -> None:
    code = run_workers("launch", words, processes)
    if code == INPUT_WAS_WRONG:
        raise InputError(f"stopped by the message above, in: llm4msr {' '.join(words)}")
    if code:
        raise RuntimeError(f"failed with exit code {code}: llm4msr {' '.join(words)}")


def _evaluate(arms: dict[str, list[Path]], out: Path) -> list[dict[str, Any]]:
    from trainer.evaluation.compare import compare, write_comparison
    from trainer.evaluation.metrics import write_evaluation

    for runs in arms.values():
        for run in runs:
            write_evaluation(run)
    comparisons: list[dict[str, Any]] = []
    for backbone in BACKBONES:
        _, lifted, without, control = (backbone + arm for arm in ARMS)
        # The last difference is the share of the match of user and item knowledge.
        for base, others in (
            (backbone, [lifted, without, control]),
            (control, [lifted]),
            (without, [lifted]),
        ):
            result = compare([(name, arms[name]) for name in (base, *others)])
            comparisons.append(result)
            write_comparison(result, out / f"comparison-{base}.json")
    return comparisons


def _print_table(arms: dict[str, list[Path]], comparisons: list[dict[str, Any]]) -> None:
    """Prints what was found, not significant differences included."""
    print(
        f"\n{'arm':<26}{'test AUC':>9}{'GAUC':>8}{'logloss':>9}{'Recall@10':>11}{'NDCG@10':>9}  (means)"
    )
    for name, runs in arms.items():
        found = [json.loads((run / "evaluation.json").read_text())["overall"] for run in runs]
        mean = {
            key: sum(one[key] for one in found) / len(found)
            for key in ("auc", "gauc", "logloss", "recall_at_10", "ndcg_at_10")
        }
        print(
            f"{name:<26}{mean['auc']:>9.4f}{mean['gauc']:>8.4f}{mean['logloss']:>9.4f}"
            f"{mean['recall_at_10']:>11.4f}{mean['ndcg_at_10']:>9.4f}"
        )
    print(f"\n{'difference in test AUC':<52}{'value':>9}  {'95 % interval':<20} verdict")
    for result in comparisons:
        for row in result["table"]:
            if row["section"] == "overall" and row["metric"] == "auc":
                interval = f"[{row['low']:+.4f}, {row['high']:+.4f}]"
                label = f"{row['group']} - {result['base']}"
                print(f"{label:<52}{row['difference']:>+9.4f}  {interval:<20} {row['verdict']}")
