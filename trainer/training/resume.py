"""What a run was trained on and with; a run that goes on from another one on the rows since."""

import shutil
from pathlib import Path
from typing import Any

from llm_knowledge.dataset_files import dataset_fingerprint
from llm_knowledge.errors import InputError
from llm_knowledge.files import new_directory, write_json
from llm_knowledge.json_files import read_json
from trainer.checkpoint.directory import best_of, checkpoints, read_state
from trainer.config.run import DataConfig, RunConfig, differences, load_config, save_config
from trainer.data.dataset import DatasetInfo, open_dataset, split_files
from trainer.data.fingerprint import new_training_rows
from trainer.features.encoder import FILE as ENCODER
from trainer.run.session import Continuation


def find_continuation(
    continue_from: str | None, data: DataConfig, dataset: DatasetInfo
) -> Continuation | None:
    """What `train.continue_from` means for this data; None without it.

    Raises:
        InputError: There is no such run, it has no checkpoint, or this data does not continue its data.
    """
    if continue_from is None:
        return None
    earlier = Path(continue_from)
    saved = checkpoints(earlier / "checkpoints")
    if not saved or not (earlier / "data.json").exists():
        raise InputError(
            f"train.continue_from: {earlier} is no run with a checkpoint and data.json; train it first"
        )
    if "train" not in data.train_splits:
        raise InputError(
            "train.continue_from: new rows are in the split train; add it to data.train_splits"
        )
    best = best_of(earlier / "checkpoints", read_state(saved[-1]))
    trained_on = _trained_on(earlier)["fingerprint"]
    parts, rows = new_training_rows(dataset, Path(data.path), trained_on)
    return Continuation(best, split_files(data.path, "train")[parts:], dataset.rows["train"] - rows)


def _trained_on(run: Path) -> dict[str, Any]:
    """What a run's data.json says: "path" and "fingerprint" of its data."""
    remedy = "it says what the run was trained on: put it back from a copy, or train a new run"
    return read_json(run / "data.json", {"path": str, "fingerprint": str}, remedy)


def note_data(data: str, folder: Path) -> None:
    """Writes RUN/data.json; for a run that has one, checks that its data is still the same.

    The position of a run counts rows: in other data it would point elsewhere, without a word.

    Raises:
        InputError: The data has changed since the run began.
    """
    file, present = folder / "data.json", dataset_fingerprint(data)
    if not file.exists():
        write_json(file, {"path": data, "fingerprint": present})
    elif _trained_on(folder)["fingerprint"] != present:
        raise InputError(
            f"{data}: has changed since {folder} began, whose position in it would be wrong; "
            "put the old data back, or start a new run (with train.continue_from after "
            "`prepare parquet --append-to`)"
        )


def check_data(data: str, folder: Path) -> None:
    """Checks that a finished run is scored on the data that it was trained on, wherever that now lies.

    Raises:
        InputError: It is other data, or none.
    """
    open_dataset(data)  # says so if there is none
    file, present = folder / "data.json", dataset_fingerprint(data)
    known = _trained_on(folder) if file.exists() else {"fingerprint": present}
    if known["fingerprint"] != present:
        raise InputError(
            f"data.path: {data} (fingerprint {present}) is not the data of {folder}, which was "
            f"trained on {known['path']} (fingerprint {known['fingerprint']}); nothing was changed; give "
            "the place where that dataset lies now, or train a run on this one"
        )


def copy_vocabularies(earlier: Path, folder: Path) -> None:
    """Gives a run that goes on from another one its ids and encoder: rows keep their meaning."""
    encoder, ids = earlier / ENCODER, earlier / "ids"
    if encoder.is_file():
        shutil.copyfile(encoder, folder / ENCODER)
    if ids.is_dir() and not (folder / "ids").exists():
        with new_directory(folder / "ids") as copied:
            shutil.copytree(ids, copied, dirs_exist_ok=True)


# What a run may change when it is resumed: none of it shows in the result.
CHANGEABLE = (
    "tables.sharding",
    "hardware",
    "train.checkpoint_every",
    "train.checkpoint_async",
    "train.keep_checkpoints",
    "train.keep_best",
    "train.log_every",
    "train.timeout_seconds",
    "train.hang_seconds",
    "train.grace_seconds",
    "train.guard",
    "train.trackers",
    "train.eval_batch_size",
)


def check_same_run(saved: Path, config: RunConfig) -> bool:
    """Checks that a saved configuration is of the run that `config` describes.

    Returns:
        Whether they differ at all, in what a run may change.

    Raises:
        InputError: They differ in anything else.
    """
    changed = differences(load_config(saved).model_dump(), config.model_dump())
    if wrong := [line for line in changed if not line.startswith(CHANGEABLE)]:
        raise InputError(
            f"{saved}: differs from the configuration to resume ({'; '.join(wrong)}); change it back, or "
            "choose another output"
        )
    return bool(changed)


def resume_config(saved: Path, config: RunConfig) -> None:
    """Checks that a run is resumed with its own configuration, and saves what may change of it.

    Raises:
        InputError: If anything else differs.
    """
    if check_same_run(saved, config):
        save_config(config, saved)
