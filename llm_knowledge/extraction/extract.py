"""The extraction job: profiles -> prompts -> frozen model -> knowledge store.

Keys are cut into chunks; each becomes one part, written by rename. A run that was killed is
continued by starting it again: parts that are there are kept. The result does not depend on the
number of workers. Start it as `torchrun --nproc-per-node 2 -m llm_knowledge.extraction --data DATA
...` or without torchrun.
"""

from __future__ import annotations

import argparse
from datetime import timedelta
from pathlib import Path

from llm_knowledge.errors import InputError
from llm_knowledge.extraction.config import (
    ExtractConfig,
    config_from,
)
from llm_knowledge.levels import LEVELS


def check(config: ExtractConfig) -> None:
    """Refuses what can be refused without loading the model: cheap, for use before torchrun starts.

    Raises:
        InputError: dataset, template, model directory, an option or the output directory.
    """
    from llm_knowledge.encoding.encoder import find_model, model_kind, weights_hash
    from llm_knowledge.profiles.dataset import Dataset
    from llm_knowledge.prompts import load_template

    if config.level == "all" and config.template:
        raise InputError("--template: belongs to one level; extract the levels one by one")
    dataset = Dataset.open(config.data)
    for level_config in _jobs(config):
        dataset.files(level_config.level, level_config.cutoff)
        if config.template:
            load_template(config.template, level_config.level)
    if config.model is None or Path(config.model).is_dir():
        from llm_knowledge.encoding.encoder import read_json

        path, _, _ = find_model(config.model, config.revision)
        weights_hash(path)
        model_kind(read_json(path / "config.json"))
    out = config.out
    if out.exists() and not out.is_dir():
        raise InputError(f"--out {out}: is a file; name a directory")


def extract(config: ExtractConfig) -> Path:
    """Runs an extraction, or this worker's share of it, and returns `config.out`.

    Every worker returns after the stores are complete and verified. A complete store of the same
    job is left as it is.

    Raises:
        InputError: bad input, or the directory holds another job or is in use.
    """
    from llm_knowledge.encoding.encoder import Encoder
    from llm_knowledge.extraction.job import Job, lead
    from llm_knowledge.extraction.workers import connect

    with connect(timedelta(minutes=config.timeout_minutes)) as workers:
        lead(workers, "check", lambda: check(config))
        encoder = Encoder(**config.encoder_options())
        for level_config in _jobs(config):
            Job(level_config, encoder, workers).run()
    return config.out


def _jobs(config: ExtractConfig) -> list[ExtractConfig]:
    """One configuration per store; items come from the catalogue alone and have no date."""
    from llm_knowledge.profiles.dataset import Dataset
    from llm_knowledge.store.dated import cutoff_times

    jobs = [config]
    if config.level == "all":
        jobs = [config.replace(level=level, out=config.out / level) for level in LEVELS]
    if not config.cutoffs:
        return jobs
    if config.level == "item":
        raise InputError("--cutoffs: items are known from the catalogue alone, which has no date")
    times = cutoff_times(config.cutoffs, Dataset.open(config.data))
    dated = []
    for job in jobs:
        if job.level == "item":
            dated.append(job.replace(cutoffs=()))
            continue
        for time in times:
            out = job.out / f"cutoff-{time}"
            dated.append(job.replace(cutoffs=(), cutoff=time, out=out))
    return dated


def main(args: argparse.Namespace) -> int:
    """Runs from parsed options; returns 0.

    Raises:
        InputError: see `extract`. `shared` is set where rank 0 raises the same.
    """
    import os
    import time

    try:
        out = extract(config_from(args))
    except InputError as error:
        if error.shared:
            # Rank 0 says why. torchrun stops all workers when one ends: leave it the time.
            time.sleep(1)
        raise
    if os.environ.get("RANK", "0") == "0":
        print(out)
    return 0
