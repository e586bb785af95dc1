"""The run directory: created, or accepted to be resumed."""

import json
import os
from dataclasses import asdict
from pathlib import Path

from embeddings.versions import versions
from llm_knowledge.errors import InputError
from trainer.config.run import RunConfig, save_config
from trainer.distributed.process_group import Runtime
from trainer.run.session import Run
from trainer.training.resume import copy_vocabularies, note_data, resume_config


def prepare_folder(config: RunConfig, runtime: Runtime, resume: bool) -> Path:
    """Creates the run directory on rank 0, or accepts the one to resume.

    Raises:
        InputError: If the directory holds another run, or cannot be written.
    """
    folder = Path(config.output)
    if not runtime.is_main:
        return folder
    saved = folder / "config.yaml"
    try:
        if not saved.exists():
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "versions.json").write_text(json.dumps(versions(), indent=1))
            # By rename and last: where config.yaml is, a run can be resumed.
            if config.train.continue_from is not None:
                copy_vocabularies(Path(config.train.continue_from), folder)
            note_data(config.data.path, folder)
            save_config(config, folder / ".config.yaml.partial")
            os.replace(folder / ".config.yaml.partial", saved)
        elif not resume:
            raise InputError(
                f"{folder}: a run is already there; pass --resume, remove it, or choose another output"
            )
        else:
            resume_config(saved, config)
            note_data(config.data.path, folder)
    except OSError as error:
        raise InputError(f"{folder}: cannot write the run directory ({error.strerror})") from error
    return folder


def write_plan(run: Run) -> None:
    """Writes what a training was planned as; scoring, on as many ranks as it likes, leaves it alone."""
    (run.folder / "plan.txt").write_text(run.plan)
    (run.folder / "plan.json").write_text(
        json.dumps([asdict(table) for table in run.tables], indent=1)
    )
