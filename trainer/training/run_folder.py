"""The run directory: created, or accepted to be resumed."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from embeddings.versions import versions
from llm_knowledge.errors import InputError
from llm_knowledge.files import remove_abandoned, write_json, write_text
from llm_knowledge.locks import hold_directory, release_lock
from trainer.config.run import RunConfig, save_config
from trainer.distributed.process_group import Runtime, on_all_ranks
from trainer.run.session import Run
from trainer.training.resume import copy_vocabularies, note_data, resume_config


@contextmanager
def run_owner(folder: Path, runtime: Runtime) -> Iterator[None]:
    """Holds a run directory for one command, so that no two write there; made where it is missing.

    Raises:
        InputError: On all ranks: another command holds it (the message says which process on which host
            since when), or the directory cannot be written.
    """
    lock = on_all_ranks(lambda: hold_directory(folder) if runtime.is_main else None)
    try:
        if runtime.is_main:
            remove_abandoned(folder)
        yield
    finally:
        if lock is not None:
            release_lock(folder, lock)


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
            write_json(folder / "versions.json", versions())
            if config.train.continue_from is not None:
                copy_vocabularies(Path(config.train.continue_from), folder)
            note_data(config.data.path, folder)
            save_config(config, saved)  # last: where it is, a run can be resumed
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
    write_text(run.folder / "plan.txt", run.plan)
    write_json(run.folder / "plan.json", [asdict(table) for table in run.tables])
