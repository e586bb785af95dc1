"""The stages from a log to a report, and one rule of when each of them is complete.

A stage is complete when the file that it writes last is there and can be read, was made with what is
asked for now, and is not older than what it was made from. A stage that is complete is skipped, so the
same command again continues what was interrupted. Prepare, extract, train, evaluate and report are such
stages wherever they run: one after the other (`launch.pipeline`), for many arms (`launch.quickstart`),
for many data sets (`benchmarks.quality`).

Nothing heavy is imported before a stage needs it.
"""

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llm_knowledge.errors import InputError
from llm_knowledge.levels import LEVELS

if TYPE_CHECKING:
    from llm_knowledge.extraction.config import ExtractConfig
    from llm_knowledge.extraction.workers import Workers
    from trainer.config.run import RunConfig

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Stage:
    """One stage of a chain.

    Attributes:
        name: Shown, and the key under which ranks agree about it.
        is_complete: Says whether there is nothing to do.
        work: Does it.
        on_every_rank: Whether all ranks work on it together; else rank 0 does while the others wait.
    """

    name: str
    is_complete: Callable[[], bool]
    work: Callable[[], Any]
    on_every_rank: bool = False


def run_stages(stages: Iterable[Stage], workers: "Workers | None" = None) -> None:
    """Runs the stages that are not complete, in order.

    A stage is looked at when its turn has come, since those before it decide about it.

    Args:
        stages: The chain.
        workers: The ranks that call this function; None: this process alone.

    Raises:
        InputError: A stage's input is wrong, on all ranks.
    """
    from llm_knowledge.extraction.job import lead
    from llm_knowledge.extraction.workers import OneWorker

    workers = workers or OneWorker()
    for stage in stages:
        complete = lead(workers, f"stage/{stage.name}/look", stage.is_complete)
        if workers.rank == 0:
            logger.info("%s: %s", stage.name, "complete" if complete else "begins")
        if complete:
            continue
        if stage.on_every_rank:
            stage.work()
        else:
            lead(workers, f"stage/{stage.name}/work", partial(_without_result, stage.work))


def is_prepared(data: Path) -> bool:
    """Whether `data` holds a dataset.

    Raises:
        InputError: Its dataset.json cannot be read.
    """
    from trainer.data.dataset import open_dataset

    if not (data / "dataset.json").exists():
        return False
    open_dataset(data)
    return True


def is_store(store: Path) -> bool:
    """Whether `store` is a complete knowledge store, extracted or made from another one."""
    from llm_knowledge.store.reader import KnowledgeStore

    try:
        KnowledgeStore.open(store)
    except InputError:
        return False
    return True


def is_extracted(job: "ExtractConfig") -> bool:
    """Whether every store of an extraction is complete.

    That a store was made by this very job, from this dataset and with this model, is checked by the
    extraction itself, which refuses another one.
    """
    return all(is_store(store) for store in stores_of(job))


def stores_of(job: "ExtractConfig") -> list[Path]:
    """Lists the stores that an extraction writes: one of each level and cut-off."""
    from llm_knowledge.profiles.dataset import Dataset
    from llm_knowledge.store.dated import cutoff_times

    levels = [(level, job.out / level) for level in LEVELS]
    if job.level != "all":
        levels = [(job.level, job.out)]
    if not job.cutoffs:
        return [store for _, store in levels]
    times = cutoff_times(job.cutoffs, Dataset.open(job.data))
    # Items are known from the catalogue alone, which has no date.
    return [
        dated
        for level, store in levels
        for dated in ([store] if level == "item" else [store / f"cutoff-{time}" for time in times])
    ]


def is_trained(config: "RunConfig") -> bool:
    """Whether the run that `config` describes has been trained to its end.

    Raises:
        InputError: The run directory holds a run of another configuration.
    """
    from trainer.training.resume import check_same_run

    folder = Path(config.output)
    if not (folder / "config.yaml").exists():
        return False
    check_same_run(folder / "config.yaml", config)
    return (folder / "summary.json").exists()


def is_evaluated(run: Path, split: str = "test") -> bool:
    """Whether the evaluation of a split is there, made after the run was trained."""
    from trainer.evaluation.metrics import evaluation_file

    return _is_newer(evaluation_file(run, split), [run / "summary.json"])


def is_reported(page: Path, runs: Iterable[Path]) -> bool:
    """Whether a report is there, made after its runs were evaluated."""
    from trainer.evaluation.metrics import evaluation_file

    return _is_newer(page, [evaluation_file(run) for run in runs])


def _is_newer(output: Path, inputs: Iterable[Path]) -> bool:
    """Whether `output` exists and none of its inputs was written after it."""
    if not output.exists():
        return False
    written = output.stat().st_mtime_ns
    return all(path.exists() and path.stat().st_mtime_ns <= written for path in inputs)


def _without_result(work: Callable[[], Any]) -> None:
    """Drops what a stage returns: ranks exchange JSON only."""
    work()
