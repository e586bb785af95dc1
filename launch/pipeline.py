"""The stages of one run in order, inside one job; each is skipped when its output is complete.

Every rank of the job calls it. A stage that one process does is done by rank 0 while the others wait
at the job's key-value store, which no collective's timeout bounds.
"""

import shlex
from datetime import timedelta
from functools import partial
from pathlib import Path

from launch.stages import (
    Stage,
    is_evaluated,
    is_extracted,
    is_reported,
    is_trained,
    run_stages,
)
from llm_knowledge.errors import InputError
from llm_knowledge.extraction.config import ExtractConfig
from llm_knowledge.levels import LEVELS
from trainer.config.run import RunConfig


def pipeline(config: RunConfig, extraction: str = "", timeout_minutes: float = 720.0) -> Path:
    """Extracts the knowledge that a run joins, trains, evaluates on the test split, reports.

    Args:
        config: The run.
        extraction: Further arguments of `knowledge extract`, as one line.
        timeout_minutes: How long ranks wait for each other within a stage of one process.

    Returns:
        Path of the report.

    Raises:
        InputError: Bad input; nothing of a later stage was begun.
    """
    from llm_knowledge.extraction.extract import check, extract
    from llm_knowledge.extraction.job import lead
    from llm_knowledge.extraction.workers import connect
    from trainer.distributed.host_check import check_hosts
    from trainer.distributed.process_group import distributed
    from trainer.evaluation.metrics import write_evaluation
    from trainer.report.page import write_report
    from trainer.training.loop import train

    folder = Path(config.output)
    report = folder / "report.html"
    jobs = extractions(config, extraction)
    chain = [
        Stage(f"extract {job.level}", partial(is_extracted, job), partial(extract, job), True)
        for job in jobs
    ]
    chain += [
        Stage("train", partial(is_trained, config), partial(train, config, resume=True), True),
        Stage("evaluate", partial(is_evaluated, folder), partial(write_evaluation, folder)),
        Stage(
            "report",
            partial(is_reported, report, [folder]),
            partial(write_report, [folder], report),
        ),
    ]

    def check_all() -> None:
        for job in jobs:
            check(job)
        is_trained(config)  # another run in its folder is refused before anything starts

    # The group stays open: the store that extractions share lives as long as it does.
    with distributed(config.train.timeout_seconds):
        check_hosts(folder, [config.model_dump(), extraction])
        with connect(timedelta(minutes=timeout_minutes)) as workers:
            lead(workers, "pipeline/check", check_all)
            run_stages(chain, workers)
    return report


def extractions(config: RunConfig, arguments: str = "") -> list[ExtractConfig]:
    """The extraction jobs whose stores a run joins; one for all levels where their folder is one.

    Raises:
        InputError: `arguments` are not those of an extraction, or name what the run decides.
    """
    import argparse

    from llm_knowledge.extraction.config import add_arguments, config_from

    stores = {level: getattr(config.knowledge, level) for level in LEVELS}
    for level, path in stores.items():
        if isinstance(path, list):
            raise InputError(
                f"knowledge.{level}: a list names stores that exist; name the directory that the dated "
                "stores are to lie in"
            )
    joined = {level: Path(path) for level, path in stores.items() if path is not None}
    parser = argparse.ArgumentParser(prog="--extract", exit_on_error=False, add_help=False)
    add_arguments(parser)

    def job(level: str, out: Path) -> ExtractConfig:
        words = ["--data", config.data.path, "--level", level, "--out", str(out)]
        try:
            options, rest = parser.parse_known_args([*shlex.split(arguments), *words])
        except (argparse.ArgumentError, ValueError) as error:
            raise InputError(f"--extract {arguments!r}: {error}") from error
        if rest:
            raise InputError(f"--extract {arguments!r}: unknown: {' '.join(rest)}")
        return config_from(options)

    parents = {path.parent for path in joined.values()}
    if len(joined) == 3 and len(parents) == 1 and all(p.name == k for k, p in joined.items()):
        return [job("all", parents.pop())]
    return [job(level, path) for level, path in joined.items()]
