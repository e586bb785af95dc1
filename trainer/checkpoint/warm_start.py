"""Starting a new run from a checkpoint of another: rows follow their ids, what is new starts fresh.

A resumed run must be the run that was saved. Here it may be another one: a new day's log with new users
and items, a feature or a table more, other stores. Sorted vocabularies number their rows anew when ids
are added, so rows are carried over by id, with their optimizer state.
"""

import logging
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor

from embeddings.ids import IdMap, Vocabulary
from llm_knowledge.errors import InputError
from llm_knowledge.files import write_json
from trainer.checkpoint.directory import (
    best_of,
    checkpoints,
    problem_of,
    read_description,
    read_state,
)
from trainer.checkpoint.reader import CheckpointReader
from trainer.checkpoint.state import (
    ACCUMULATOR_PREFIX,
    DENSE_OPTIMIZER_PREFIX,
    MODEL_PREFIX,
    Route,
    follow,
    live_state,
    names_on_all_ranks,
    reading,
    routes,
    saved_tensors,
    table_of,
)
from trainer.features.encoder import FILE, FeatureEncoder
from trainer.features.steps import GAP_ROWS
from trainer.run.session import Run

logger = logging.getLogger(__name__)

PROJECTIONS_PREFIX = f"{MODEL_PREFIX}dense.features.projections."
TABLES_PREFIX = f"{MODEL_PREFIX}sparse."
# A table that a new sequence reads is in another collection than before.
COLLECTION = re.compile(r"(?<=\bsparse\.)[a-z_0-9.]+?\.embedding(_bag)?s(?=\.)")


@dataclass
class Carried:
    """What was carried over, and what was not.

    Attributes:
        checkpoint: Where from.
        tables: Table name to rows carried over, rows that are new, rows that were left behind.
        fresh: Names that the checkpoint has not, or has in another size.
        left: Names of the checkpoint that the model has not.
        notes: Anything else that the user should know.
    """

    checkpoint: str
    tables: dict[str, dict[str, int]] = field(default_factory=dict)
    fresh: list[str] = field(default_factory=list)
    left: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def lines(self) -> list[str]:
        """The same in words."""
        return [
            f"started from {self.checkpoint}",
            *(
                f"  table {name}: {rows['carried']:,} rows carried over, {rows['new']:,} new, "
                f"{rows['left']:,} left behind"
                for name, rows in self.tables.items()
            ),
            *(f"  starts fresh: {name}" for name in self.fresh),
            *(f"  left behind: {name}" for name in self.left),
            *(f"  {note}" for note in self.notes),
        ]


def find_start(source: Path) -> Path:
    """The checkpoint that a path means: itself, or the best one of a run.

    Raises:
        InputError: If there is none, or it is damaged.
    """
    folder = source / "checkpoints"
    if folder.is_dir():
        whole = [path for path in checkpoints(folder) if problem_of(path) is None]
        if not whole:
            raise InputError(f"train.start_from: {source} has no checkpoint that is whole")
        source = best_of(folder, read_state(whole[-1]))
    if problem := problem_of(source):
        raise InputError(
            f"train.start_from: {source}: {problem}; name a run or one of its checkpoints"
        )
    return source


def warm_start(run: Run, source: Path) -> Carried:
    """Fills a fresh run from a checkpoint and says on rank 0 what became of everything.

    Raises:
        InputError: If tables cannot be carried over: another width, another kind of ids.
    """
    checkpoint = find_start(source)
    description = read_description(checkpoint)
    live, saved = live_state(run), saved_tensors(checkpoint)
    carried = Carried(str(checkpoint))
    planned = _plan_tables(run, checkpoint, description, live, saved, carried)
    if description["fingerprints"] != run.fingerprints:
        carried.notes.append("the knowledge stores are others than the checkpoint's")

    def fits(name: str) -> bool:
        if name.startswith(DENSE_OPTIMIZER_PREFIX):  # moments go with their parameter
            owner = name.removeprefix(DENSE_OPTIMIZER_PREFIX).rsplit(".", 1)[0]
            if not fits(f"{MODEL_PREFIX}dense.{owner}"):
                return False
        return name in saved and saved[name].size == live[name].size()

    dense = {
        name: value
        for name, value in live.items()
        if not name.startswith((TABLES_PREFIX, ACCUMULATOR_PREFIX))
    }
    chosen = {name: value for name, value in dense.items() if fits(name)}
    with reading(checkpoint):
        dcp.load(chosen, storage_reader=CheckpointReader(checkpoint))
    follow(checkpoint, planned)
    if run.model.module.row_owners is not None:
        run.model.module.row_owners.rebuild()
    fresh = [name for name in dense if name not in chosen]
    carried.fresh += fresh
    for name in fresh:
        if name.startswith(PROJECTIONS_PREFIX):  # a new feature has no say yet: all scores stay
            live[name].detach().zero_()
    moved = _names_before(live, saved).values()
    carried.left += sorted(saved.keys() - names_on_all_ranks(live) - set(moved))
    if run.runtime.is_main:
        for line in carried.lines():
            logger.info(line)
        write_json(run.folder / "start_from.json", carried.__dict__)
    return carried


def _names_before(live: dict[str, Any], saved: dict[str, Any]) -> dict[str, str]:
    """Name of every table and accumulator to that in the checkpoint, where there is one."""
    known = {COLLECTION.sub("", name): name for name in saved}
    names = {name: known.get(COLLECTION.sub("", name)) for name in live}
    return {
        name: name if name in saved else before
        for name, before in names.items()
        if before is not None and name.startswith((TABLES_PREFIX, ACCUMULATOR_PREFIX))
    }


def _plan_tables(
    run: Run,
    checkpoint: Path,
    description: dict[str, Any],
    live: dict[str, Any],
    saved: dict[str, Any],
    carried: Carried,
) -> list[Route]:
    """Plans the rows of all tables and of their optimizer state."""
    planned: list[Route] = []
    old_rows: dict[str, Tensor] = {}
    before = _names_before(live, saved)
    for name in (name for name in live if name.startswith(TABLES_PREFIX)):
        table = name.rsplit(".", 2)[1]
        if name not in before:
            carried.fresh.append(name)
            continue
        (rows, width), (rows_before, width_before) = live[name].size(), saved[before[name]].size
        if width != width_before:
            kind, _, feature = table.partition("_")
            option = f"features.use.{feature}.dim" if kind in ("feature", "gap") else "tables.dim"
            raise InputError(
                f"train.start_from: table {table} of {checkpoint} is {width_before} wide, {option} is "
                f"{width}; set it to {width_before}"
            )
        ids_before = _old_rows(run, checkpoint, description, table)
        count = int((ids_before >= 0).sum())
        carried.tables[table] = {
            "carried": count,
            "new": rows - count,
            "left": rows_before - count,
        }
        old_rows[name] = ids_before
        planned += routes(name, live, saved, ids_before, before[name])
    for name in (name for name in live if name.startswith(ACCUMULATOR_PREFIX)):
        owner = table_of(name)
        if name not in before or owner not in old_rows:
            carried.fresh.append(name)  # another optimizer, or a new table
        elif len(saved[before[name]].size) != live[name].dim():
            carried.fresh.append(
                name
            )  # one value per row there, one per element here, or vice versa
        else:
            planned += routes(name, live, saved, old_rows[owner], before[name])
    return planned


def _old_rows(run: Run, checkpoint: Path, description: dict[str, Any], table: str) -> Tensor:
    """int64 [rows]: the row in the checkpoint of every row of the run's table, -1 for new ids."""
    if table.startswith("gap_"):
        return torch.arange(GAP_ROWS)
    if table.startswith("feature_"):
        return _old_feature_rows(run, checkpoint, table)
    kind, now = description["config"]["tables"], run.config.tables
    if (kind.get("ids"), kind.get("hash_rows")) != (now.ids, now.hash_rows):
        raise InputError(
            f"train.start_from: {checkpoint} has tables.ids {kind.get('ids')} with hash_rows "
            f"{kind.get('hash_rows')}, the configuration {now.ids} with {now.hash_rows}; they must be the "
            "same, or rows would go to other ids"
        )
    if now.ids == "zero_collision":
        streams = description["config"]["data"].get("streams")
        same = streams == run.config.data.streams
        if not same or kind.get("zero_collision") != now.zero_collision.model_dump():
            raise InputError(
                f"train.start_from: {checkpoint} has another tables.zero_collision or data.streams; "
                "both must be the same, or rows would go to other ids"
            )
    elif now.ids not in ("vocabulary", "hash"):
        raise InputError(
            f"train.start_from: rows cannot be carried over with tables.ids {now.ids}; use vocabulary, "
            "hash or zero_collision"
        )
    ids: IdMap = {"user": run.encoder.users, "item": run.encoder.items}[table]
    if not isinstance(ids, Vocabulary):
        return torch.arange(ids.rows)  # the same hash gives the same rows
    return _rows_by_id(checkpoint, table, ids)


def _old_feature_rows(run: Run, checkpoint: Path, table: str) -> Tensor:
    """The same for a feature's table, which may be one of buckets or of a hash."""
    encoding = run.encoder.features.by_table[table]
    folder = checkpoint.parent.parent
    before = FeatureEncoder.load(folder).by_table.get(table)
    if before is None or (before.kind, before.columns) != (encoding.kind, encoding.columns):
        raise InputError(f"train.start_from: {folder / FILE} has another feature {encoding.name!r}")
    if encoding.vocabulary is not None and before.vocabulary is not None:
        return _rows_by_id(checkpoint, encoding.name, encoding.vocabulary)
    if before.options != encoding.options:
        raise InputError(
            f"train.start_from: {checkpoint} has features.use.{encoding.name} with {before.options}, the "
            f"configuration with {encoding.options}; they must be the same, or rows would go to other ids"
        )
    return torch.arange(encoding.rows)


def _rows_by_id(checkpoint: Path, table: str, ids: Vocabulary) -> Tensor:
    path = checkpoint.parent.parent / "ids" / f"{table}.parquet"
    if not path.exists():
        raise InputError(
            f"train.start_from: {path} is missing; it says which id each row of {checkpoint} belongs to: "
            "keep a checkpoint in its run"
        )
    try:
        before = Vocabulary.load(path).lookup(ids.keys)
    except TypeError as error:
        raise InputError(f"train.start_from: table {table} of {checkpoint}: {error}") from error
    except (OSError, pa.ArrowInvalid) as error:
        raise InputError(f"train.start_from: {path} cannot be read ({error})") from error
    # Row 0 is shared by all unknown ids; for a known id it means: not there.
    return torch.from_numpy(np.concatenate([[0], np.where(before == 0, -1, before)]))
