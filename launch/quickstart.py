"""The whole journey on real data: prepare, extract, train every arm, evaluate, compare, report.

A chain of stages (`launch.stages`): what is complete is skipped, so a second call continues a first.
"""

import json
import logging
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch.stages import (
    Stage,
    is_evaluated,
    is_prepared,
    is_reported,
    is_store,
    is_trained,
    run_stages,
)
from launch.workers import INPUT_WAS_WRONG, run_workers
from llm_knowledge.errors import InputError
from llm_knowledge.levels import LEVELS

if TYPE_CHECKING:
    from trainer.config.run import RunConfig

BASE = Path(__file__).parent / "configs" / "movielens.yaml"
BACKBONES = ("shared_bottom", "star")
# Arm to the kind of its stores (None: the backbone alone) and what it changes of the configuration.
ARMS: dict[str, tuple[str | None, list[str]]] = {
    "": (None, ["model.meta.enabled=false"]),
    "+llm4msr": ("", []),
    "+no_match": ("", ["model.meta.item_knowledge=input"]),
    "+shuffled": ("-shuffled", []),
}
# Arm that others are compared with, and those others. The last is the share of the match of user and
# item knowledge.
BASES: dict[str, list[str]] = {
    "": ["+llm4msr", "+no_match", "+shuffled"],
    "+shuffled": ["+llm4msr"],
    "+no_match": ["+llm4msr"],
}
# Of the differences, those that the terminal shows; the report has all.
SHOWN = ("+llm4msr", "+shuffled")
METRICS = {
    "auc": "test AUC",
    "gauc": "GAUC",
    "logloss": "logloss",
    "recall_at_10": "Recall@10",
    "ndcg_at_10": "NDCG@10",
}
logger = logging.getLogger(__name__)


def quickstart(out: Path, raw: Path | None = None, seeds: int = 3, processes: int = 2) -> Path:
    """Runs every stage below `out`; prints the tables of metrics and differences.

    Args:
        out: Directory for data, knowledge, runs and report.
        raw: MovieLens files; None looks for them, then downloads, then falls back to the simulator.
        seeds: Runs per arm.
        processes: Training and extraction processes on this machine.

    Returns:
        Path of the report.

    Raises:
        InputError: Bad options, or a stage was given bad input.
    """
    if seeds < 1 or processes < 1:
        raise InputError("quickstart: --seeds and --processes must be at least 1")
    out.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    from trainer.report.page import write_report

    data, knowledge, report = out / "data", out / "knowledge", out / "report.html"
    arms = arm_configs(data, knowledge, out / "runs", seeds)
    runs = {arm: [Path(config.output) for config in configs] for arm, configs in arms.items()}
    all_runs = [run for paths in runs.values() for run in paths]
    configs = [config for of_arm in arms.values() for config in of_arm]
    differences = [comparison_file(out, backbone, arm) for backbone in BACKBONES for arm in BASES]
    stages = [
        Stage("data", lambda: is_prepared(data), lambda: _prepare(data, raw)),
        Stage(
            "knowledge",
            lambda: all(is_store(knowledge / level) for level in LEVELS),
            lambda: _extract(data, knowledge, processes),
        ),
        Stage(
            "control",
            lambda: all(is_store(knowledge / f"{level}-shuffled") for level in LEVELS),
            lambda: _shuffle(knowledge),
        ),
        Stage(
            f"training of {len(BACKBONES)} backbones x {len(ARMS)} arms x {seeds} seeds",
            lambda: all([is_trained(config) for config in configs]),
            lambda: _train(configs, out / "configs", processes),
        ),
        Stage(
            "evaluation",
            lambda: all(is_evaluated(run) for run in all_runs),
            lambda: _evaluate(all_runs),
        ),
        Stage(
            "report",
            lambda: is_reported(report, all_runs) and all(file.exists() for file in differences),
            lambda: write_report(all_runs, report, compare_arms(runs, out)),
        ),
    ]
    run_stages(stages)
    print(tables(runs, [json.loads(file.read_text(encoding="utf-8")) for file in differences]))
    print(f"open {report.resolve()}")
    return report


def _prepare(data: Path, raw: Path | None) -> None:
    from trainer.data.dataset import open_dataset
    from trainer.data.sources.movielens import prepare_movielens
    from trainer.data.sources.simulate import simulate

    try:
        prepare_movielens(raw, data)
    except InputError as error:
        if raw is not None:
            raise
        logger.warning("%s; going on with a simulated log instead", error)
        simulate(data, users=2000, items=1000, scenarios=3, events=100_000, seed=0)
    info = open_dataset(data)
    logger.info(
        "%s: %s users, %s items, rows %s",
        info.name,
        f"{info.users:,}",
        f"{info.items:,}",
        info.rows,
    )


def _extract(data: Path, knowledge: Path, processes: int) -> None:
    words = ["knowledge", "extract", "--data", str(data), "--level", "all", "--out", str(knowledge)]
    if not sys.stderr.isatty():
        words.append("--no-progress")
    _run_workers(words, processes)


def _shuffle(knowledge: Path) -> None:
    from llm_knowledge.store.writer import shuffled_store

    for level in LEVELS:
        control = knowledge / f"{level}-shuffled"
        if not is_store(control):
            shuffled_store(knowledge / level, control, seed=0)


def arm_configs(
    data: Path, knowledge: Path, runs: Path, seeds: int
) -> "dict[str, list[RunConfig]]":
    """The runs of every arm of every backbone, one per seed, each with a directory below `runs`."""
    from trainer.config.run import load_config

    arms: dict[str, list[RunConfig]] = {}
    for backbone in BACKBONES:
        for arm, (kind, changes_of_arm) in ARMS.items():
            name = backbone + arm
            changes = [f"name={name}", f"data.path={data}", f"model.backbone={backbone}"]
            for level in LEVELS:
                store = "null" if kind is None else knowledge / (level + kind)
                changes.append(f"knowledge.{level}={store}")
            arms[name] = [
                load_config(
                    BASE,
                    [
                        *changes,
                        *changes_of_arm,
                        f"output={runs / name / f'seed-{seed}'}",
                        f"train.seed={seed}",
                    ],
                )
                for seed in range(seeds)
            ]
    return arms


def _train(configs: "list[RunConfig]", folder: Path, processes: int) -> None:
    """Trains what is not trained yet, all in one set of processes."""
    from trainer.config.run import save_config

    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for config in configs:
        if not is_trained(config):
            file = folder / f"{config.name}-seed-{config.train.seed}.yaml"
            save_config(config, file)
            files.append(str(file))
    # The terminal gets one line per run; plan, versions and metrics lie in the run's directory.
    _run_workers(["train", "--log-level", "warning", "--resume", "--config", *files], processes)


def _run_workers(words: list[str], processes: int) -> None:
    code = run_workers("launch", words, processes)
    if code == INPUT_WAS_WRONG:
        raise InputError(f"stopped by the message above, in: llm4msr {' '.join(words)}")
    if code:
        raise RuntimeError(f"failed with exit code {code}: llm4msr {' '.join(words)}")


def _evaluate(runs: list[Path]) -> None:
    from trainer.evaluation.metrics import write_evaluation

    for run in runs:
        if not is_evaluated(run):
            write_evaluation(run)


def compare_arms(runs: dict[str, list[Path]], out: Path) -> list[dict[str, Any]]:
    """Compares arms of a backbone with those of `BASES`; writes each comparison below `out`."""
    from trainer.evaluation.compare import compare, write_comparison

    comparisons = []
    for backbone in BACKBONES:
        for base, others in BASES.items():
            names = [backbone + arm for arm in (base, *others)]
            comparison = compare([(name, runs[name]) for name in names])
            write_comparison(comparison, comparison_file(out, backbone, base))
            comparisons.append(comparison)
    return comparisons


def comparison_file(out: Path, backbone: str, base: str) -> Path:
    """Where the comparison of a backbone's arms with one of them is kept."""
    return out / f"comparison-{backbone}{base}.json"


def tables(runs: dict[str, list[Path]], comparisons: list[dict[str, Any]]) -> str:
    """Formats the means of every arm and the differences, those that are not significant included."""
    from tabulate import tabulate

    means = []
    for arm, of_arm in runs.items():
        overall = [json.loads((run / "evaluation.json").read_text())["overall"] for run in of_arm]
        means.append([arm, *(sum(e[key] for e in overall) / len(overall) for key in METRICS)])
    differences = [
        [
            f"{row['group']} - {comparison['base']}",
            f"{row['difference']:+.4f}",
            f"[{row['low']:+.4f}, {row['high']:+.4f}]",
            row["verdict"],
        ]
        for comparison in comparisons
        for row in comparison["table"]
        if row["section"] == "overall" and row["metric"] == "auc" and row["group"].endswith(SHOWN)
    ]
    return "\n\n".join(
        [
            tabulate(means, ["mean of the seeds", *METRICS.values()], floatfmt=".4f"),
            tabulate(
                differences,
                ["difference in test AUC", "value", "95 % interval", "verdict"],
                disable_numparse=True,
            ),
        ]
    )
