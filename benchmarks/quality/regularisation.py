"""Regularisation, tuned for every arm by the same budget on users that training has not seen.

The data set's own valid split knows all its users, so it cannot say what helps new ones. Tuning holds a
fifth of the training users out as the data set itself did: their events after the profile window are
valid ones. Every arm tries the same variations there, on a few backbones and with the step sizes that the
study's trials chose. The one that is better than the study's own setting on each of these backbones, and
best in the mean, takes its place: then five seeds on the whole training split, for every backbone.
"""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.quality.arms import REGULARISATION, REGULARISED, SEEDS, TUNED_ON, TUNING_USERS
from benchmarks.quality.study import assignments, best_setting, has_tried, is_current
from launch.stages import is_evaluated
from trainer.data.dataset import open_dataset, split_files
from trainer.data.sources.writer import connect, output_directory, write_info, write_sorted

UNCHANGED = "as in the study"
SETTINGS: dict[str, dict[str, Any]] = {UNCHANGED: {}, **REGULARISATION}


def make_data(work: Path, name: str) -> Path:
    """Writes the data set that is tuned on: `TUNING_USERS` of the training users are held out.

    Profile events of these go to the introduction, later ones to valid; test is valid once more, so that
    an evaluation tells its users apart and the real test events are not looked at.
    """
    data, out = work / name / "data", work / name / "tuning" / "data"
    if (out / "dataset.json").exists():
        return out
    info = open_dataset(data)
    moves = {"profile": "introduction", "train": "valid"}
    with output_directory(out) as folder, connect(folder / "scratch") as connection:
        files: dict[str, list[Path]] = {}
        rows: dict[str, int] = {}
        for split in ("profile", "introduction", "train", "valid"):
            for part in split_files(data, split):
                table = pq.read_table(part)
                held_out = _held_out(table["user_id"])
                for target, mask in ((split, ~held_out), (moves.get(split, split), held_out)):
                    number = len(files.setdefault(target, []))
                    files[target].append(folder / "scratch" / f"{target}-{number}.parquet")
                    pq.write_table(table.filter(pa.array(mask)), files[target][-1])
                    rows[target] = rows.get(target, 0) + int(mask.sum())
        schema = pq.read_schema(split_files(data, "train")[0])
        for split, pieces in files.items():
            write_sorted(connection, pieces, schema, folder / split, rows[split])
        (folder / "test").mkdir()
        for part in (folder / "valid").iterdir():
            os.link(part, folder / "test" / part.name)
        os.link(data / "items.parquet", folder / "items.parquet")
        introduction = rows.pop("introduction")
        changes = {"rows": rows | {"test": rows["valid"]}, "introduction_rows": introduction}
        write_info(folder, info.model_copy(update=changes))
    return out


def _held_out(users: pa.ChunkedArray) -> np.ndarray:
    """Which rows [n] are of users held out of tuning; the id alone decides.

    Not by the checksum that the data set's own held-out users have: of them none is left here.
    """
    found = users.combine_chunks().dictionary_encode()
    chosen = [
        int.from_bytes(hashlib.sha256(str(user).encode()).digest()[:4], "big") / 2**32
        < TUNING_USERS
        for user in found.dictionary.to_pylist()
    ]
    return np.array(chosen, dtype=bool)[found.indices.to_numpy()]


def trial(work: Path, name: str, backbone: str, arm: str, setting: str) -> tuple[Path, list[str]]:
    """Run directory and assignments of one trial, with seed 0."""
    run = work / name / "tuning" / "runs" / backbone / arm / _words(setting)
    changes = {
        **best_setting(work, name, backbone, arm)[1],
        **SETTINGS[setting],
        "data.path": str(work / name / "tuning" / "data"),
        "knowledge.other_dataset": True,  # of the whole, whose events up to here are the same
    }
    return run, assignments(work, name, backbone, arm, 0, run, changes)


def check(work: Path, name: str, arms: list[str]) -> None:
    """Says what has to be run before the arms can be tuned: they keep the step sizes of their trials.

    Raises:
        SystemExit: With the command that is missing.
    """
    cells = [(b, arm) for b in TUNED_ON for arm in arms if not has_tried(work, name, b, arm)]
    if cells:
        backbones, missing = (" ".join(dict.fromkeys(words)) for words in zip(*cells, strict=True))
        raise SystemExit(
            f"{work}: trials of the study are missing; first: python -m benchmarks.quality run "
            f"--work {work} --datasets {name} --backbones {backbones} --arms {missing}"
        )


def trials(work: Path, name: str, arm: str) -> list[tuple[Path, list[str]]]:
    """What an arm tries: every setting on every backbone of `TUNED_ON`."""
    return [
        trial(work, name, backbone, arm, setting) for backbone in TUNED_ON for setting in SETTINGS
    ]


def _words(setting: str) -> str:
    return setting.replace(" ", "-").replace("-.", "-0.")


def evaluations(work: Path, name: str, arm: str) -> dict[str, list[dict[str, Any]]]:
    """Setting to its evaluations, one per backbone of `TUNED_ON`; empty before all have been trained."""
    found: dict[str, list[dict[str, Any]]] = {}
    if not all(has_tried(work, name, backbone, arm) for backbone in TUNED_ON):
        return {}
    for setting in SETTINGS:
        for backbone in TUNED_ON:
            run, words = trial(work, name, backbone, arm, setting)
            if not is_current(run, words) or not is_evaluated(run):
                return {}
            read = json.loads((run / "evaluation.json").read_text())
            found.setdefault(setting, []).append(read)
    return found


def auc(
    found: dict[str, list[dict[str, Any]]], segment: str | None = None
) -> dict[str, list[float]]:
    """AUC of every setting and backbone, of all users or, for example, "new_user"."""
    return {
        setting: [
            (read["segments"][segment] if segment else read["overall"])["auc"] for read in reads
        ]
        for setting, reads in found.items()
    }


def choose(reached: dict[str, list[float]]) -> str:
    """The setting with the best mean of those that beat the study's own on every backbone, else that.

    A difference in one run is as large as seeds make it; three in the same direction are rarer.
    """
    own = reached[UNCHANGED]
    better = [
        setting
        for setting, values in reached.items()
        if all(value > base for value, base in zip(values, own, strict=True))
    ]
    return max(better, key=lambda setting: sum(reached[setting]), default=UNCHANGED)


def chosen(work: Path, name: str) -> dict[str, str]:
    """Arm to its setting, of the arms whose trials have all been trained."""
    found = {arm: evaluations(work, name, arm) for arm in REGULARISED}
    return {arm: choose(auc(reads)) for arm, reads in found.items() if reads}


def seeds(
    work: Path, name: str, backbone: str, arm: str, setting: str
) -> list[tuple[Path, list[str]]]:
    """All seeds' runs of a setting; none of the study's own, whose runs are there."""
    if setting == UNCHANGED:
        return []
    folder = work / name / "regularisation" / backbone / arm / _words(setting)
    changes = {**best_setting(work, name, backbone, arm)[1], **SETTINGS[setting]}
    return [
        (run, assignments(work, name, backbone, arm, seed, run, changes))
        for seed in range(SEEDS)
        for run in [folder / f"seed-{seed}"]
    ]


def complete(
    work: Path, name: str, backbone: str, settings: dict[str, str], before: dict[str, list[Path]]
) -> dict[str, list[Path]]:
    """Arm to its runs of all seeds with the setting that it chose, where all are there.

    Args:
        work: Of the study.
        name: Data set.
        backbone: Backbone.
        settings: Of `chosen`.
        before: Arm to the study's own runs.
    """
    found: dict[str, list[Path]] = {}
    for arm, setting in settings.items():
        if len(before.get(arm, [])) == SEEDS:
            tuned = seeds(work, name, backbone, arm, setting)
            if all(is_current(*run) and is_evaluated(run[0]) for run in tuned):
                found[arm] = [run for run, _ in tuned] or before[arm]
    return found
