"""The stages of one run in order, inside one job; each is skipped when its output is complete.

Every rank of the job calls it. A stage that one process does is done by rank 0 while the others wait
at the job's key-value store, which no collective's timeout bounds.
"""

import shlex
import sys
from datetime import timedelta
from pathlib import Path

from llm_knowledge.errors import InputError
from llm_knowledge.extraction.config import ExtractConfig
from trainer.config.run import RunConfig

LEVELS = ("user", "scenario", "item")


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
    from trainer.training.loop import train

    folder = Path(config.output)
    report = folder / "report.html"
    jobs = extractions(config, extraction)
    # The group stays open: the store that extractions share lives as long as it does.
    with distributed(config.train.timeout_seconds) as runtime:

        def say(stage: str, state: str) -> None:
            if runtime.is_main:
                print(f"pipeline: {stage}: {state}", file=sys.stderr, flush=True)

        check_hosts(folder, [config.model_dump(), extraction])
        with connect(timedelta(minutes=timeout_minutes)) as workers:

            def look() -> list[bool]:
                for job in jobs:
                    check(job)
                return [_trained(config), *(_extracted(job) for job in jobs)]

            trained, *extracted = lead(workers, "pipeline/look", look)
            for job, there in zip(jobs, extracted, strict=True):
                say(f"extract {job.level}", "complete" if there else "begins")
                if not there:
                    extract(job)
            say("train", "complete" if trained else "begins")
            if not trained:
                train(config, resume=True)

            def finish() -> None:
                from trainer.evaluation.metrics import write_evaluation
                from trainer.report.page import write_report

                # Both read their source's state; they are cheap beside what precedes them.
                for stage, out, work in (
                    ("evaluate", folder / "evaluation.json", lambda: write_evaluation(folder)),
                    ("report", report, lambda: write_report([folder], report)),
                ):
                    there = trained and out.exists()
                    say(stage, "complete" if there else "begins")
                    if not there:
                        work()

            lead(workers, "pipeline/finish", finish)
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
            raise InputError(f"knowledge.{level}: a list names stores that exist; name the directory that "
                             f"the dated stores are to lie in")  # fmt: skip
    wanted = {level: Path(path) for level, path in stores.items() if path is not None}
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

    parents = {path.parent for path in wanted.values()}
    if len(wanted) == 3 and len(parents) == 1 and all(p.name == k for k, p in wanted.items()):
        return [job("all", parents.pop())]
    return [job(level, path) for level, path in wanted.items()]


def _extracted(job: ExtractConfig) -> bool:
    from llm_knowledge.store.reader import KnowledgeStore

    stores = [job.out / level for level in LEVELS] if job.level == "all" else [job.out]
    try:
        for store in stores:
            KnowledgeStore.open(store)
    except InputError:
        return False
    return True


def _trained(config: RunConfig) -> bool:
    """Whether the run is complete; another run in its folder is refused before anything starts."""
    import yaml

    folder = Path(config.output)
    saved = folder / "config.yaml"
    if saved.exists() and yaml.safe_load(saved.read_text("utf-8")) != config.model_dump():
        raise InputError(
            f"{saved}: differs from the configuration to resume; choose another output"
        )
    return (folder / "summary.json").exists()
