"""Sequences of behaviour: what a user did strictly before an event and was known by then, oldest first.

Made where histories are made, in blocks of whole users that DuckDB sorted: a block's steps are listed once,
and each row has a slice of them. Events of one moment see nothing of each other. A delay is compared in
whole seconds, to the safe side, as that of a counter: known is what has been so for a whole second.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from llm_knowledge.errors import InputError
from trainer.data.dataset import FeatureInfo, SequenceInfo, sequence_column
from trainer.data.sources.feature_columns import ID_TYPES, SQL_TYPES, element_type
from trainer.data.sources.feature_schema import BehaviourSequence
from trainer.data.sources.raw_columns import kind_of, require_column
from trainer.data.sources.raw_files import RawFiles

if TYPE_CHECKING:
    import duckdb
    import pyarrow as pa

Casts = dict[str, Callable[[str, Any], str]]


def describe_sequences(
    rules: Mapping[str, BehaviourSequence], features: Mapping[str, FeatureInfo], item_type: str
) -> dict[str, SequenceInfo]:
    """What the sequences of a schema are.

    Args:
        rules: As declared.
        features: Of the dataset; a field has its feature's type.
        item_type: Type of the item ids.
    """
    types = {name: feature.type for name, feature in features.items() if feature.type != "double"}
    types |= {"item": "int64" if item_type == "int64" else "string", "gap": "int64"}
    return {
        name: SequenceInfo(
            source="made" if sequence.columns is None else "log",
            text=sequence.text,
            length=sequence.length,
            fields={field: types[field] for field in sequence.names},  # type: ignore[misc]
        )
        for name, sequence in rules.items()
    }


# ---------------------------------------------------------------- made here


@dataclass(frozen=True)
class Steps:
    """A block's steps, and which of them each row has.

    Attributes:
        start: First step of each row, int64 [n].
        stop: The step behind its last, int64 [n].
        values: Column of the events to the steps' values; of a gap the seconds at which they happened.
        gaps: Columns that hold gaps.
    """

    start: np.ndarray
    stop: np.ndarray
    values: dict[str, pa.Array]
    gaps: frozenset[str]

    def columns(self, rows: np.ndarray, times: np.ndarray) -> dict[str, pa.Array]:
        """Lists of some rows.

        Args:
            rows: Positions in the block.
            times: Seconds of the block's events, int64 [n].
        """
        import pyarrow as pa

        start, stop = self.start[rows], self.stop[rows]
        made = {}
        for column, values in self.values.items():
            lists = lists_of(values, start, stop)
            if column in self.gaps:
                gaps = np.repeat(times[rows], stop - start) - lists.values.to_numpy()
                lists = pa.ListArray.from_arrays(lists.offsets, pa.array(gaps))
            made[column] = lists
        return made


def steps_of(
    block: pa.Table,
    users: np.ndarray,
    moments: np.ndarray,
    rules: Mapping[str, BehaviourSequence],
) -> list[Steps]:
    """The steps of every sequence that is made here.

    Args:
        block: Events of whole users, sorted by user and time, with labels and features.
        users: Number of each row's user, ascending, int64 [n].
        moments: A number that grows with time within each user, int64 [n].
        rules: The schema's sequences.
    """
    import pyarrow as pa

    times = block["timestamp"].to_numpy()
    made = []
    for name, sequence in rules.items():
        if sequence.where is None:
            continue
        column = {"label": "label", "impression": None}.get(
            sequence.where, f"label_{sequence.where}"
        )
        steps = np.ones(len(times), bool) if column is None else block[column].to_numpy() == 1
        if sequence.known_after:
            start, stop = late_slices(users, times, steps, sequence.known_after, sequence.length)
        else:
            start, stop = step_slices(users, moments, steps, sequence.length)
        values, gaps = {}, set()
        for field in sequence.fields:
            target = sequence_column(name, field)
            source = {"item": "item_id", "gap": "timestamp"}.get(field, f"feature_{field}")
            values[target] = block[source].combine_chunks().filter(pa.array(steps))
            gaps |= {target} if field == "gap" else set()
        made.append(Steps(start, stop, values, frozenset(gaps)))
    return made


def step_slices(
    users: np.ndarray, moments: np.ndarray, steps: np.ndarray, length: int
) -> tuple[np.ndarray, np.ndarray]:
    """For each row, which of all rows that are steps come before it: the last `length` of the same user.

    Args:
        users: Number of each row's user, ascending, int64 [n].
        moments: Time of each row in any unit, ascending within a user, int64 [n].
        steps: Which rows are steps, bool [n].
        length: Steps of a row at most.

    Returns:
        start, stop: int64 [n], positions among the steps.
    """
    new_user = _changes(users)
    first, stop = (
        (np.cumsum(steps) - steps)[_first_of_run(changed)]
        for changed in (new_user, new_user | _changes(moments))
    )
    return np.maximum(first, stop - length), stop


def late_slices(
    users: np.ndarray, times: np.ndarray, steps: np.ndarray, delay: int, length: int
) -> tuple[np.ndarray, np.ndarray]:
    """The same for steps that are known `delay` seconds after they happened: step + delay < row.

    Args:
        users: Number of each row's user, from 0, ascending, int64 [n].
        times: Seconds, ascending within a user, int64 [n].
        steps: Which rows are steps, bool [n].
        delay: In seconds.
        length: Steps of a row at most.
    """
    first = (np.cumsum(steps) - steps)[_first_of_run(_changes(users))]
    if len(times) == 0:
        return first, first
    keys = users * (times.max() - times.min() + 1) + (times - times.min())
    # Where the delay reaches back before the user's first event, `first` is the answer.
    stop = np.maximum(np.searchsorted(keys[steps], keys - delay, side="left"), first)
    return np.maximum(first, stop - length), stop


def _changes(values: np.ndarray) -> np.ndarray:
    """Whether a value is another than the one before, bool [n]; the first is."""
    changed = np.ones(len(values), dtype=bool)
    changed[1:] = values[1:] != values[:-1]
    return changed


def _first_of_run(changed: np.ndarray) -> np.ndarray:
    """First row of each row's run, from flags "a run starts here" [n]."""
    return np.flatnonzero(changed)[np.cumsum(changed) - 1]


def lists_of(values: pa.Array, start: np.ndarray, stop: np.ndarray) -> pa.ListArray:
    """The list array of values[start[i]:stop[i]]."""
    import pyarrow as pa

    lengths = stop - start
    offsets = np.append(0, np.cumsum(lengths))
    index = np.arange(offsets[-1]) + np.repeat(start - offsets[:-1], lengths)
    return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), values.take(pa.array(index)))


# ---------------------------------------------------------------- as logged


def logged_columns(rules: Mapping[str, BehaviourSequence]) -> dict[str, str]:
    """Column of the events to the raw column that it is made of."""
    return {
        sequence_column(name, field): column
        for name, sequence in rules.items()
        for field, column in (sequence.columns or {}).items()
    }


def logged_casts(
    rules: Mapping[str, BehaviourSequence],
    described: Mapping[str, SequenceInfo],
    whole: bool = False,
) -> Casts:
    """Column of the events to what makes its SQL, see `RawFiles.sql`; null is no step.

    Args:
        rules: As declared.
        described: What they are.
        whole: All steps of the log, in place of the newest ones that are kept.
    """

    def newest(kind: str, length: int) -> Callable[[str, Any], str]:
        kept = "" if whole else f"[-{length}:]"
        return lambda column, _: f"coalesce(CAST({column} AS {kind}[]){kept}, [])"

    return {
        sequence_column(name, field): newest(SQL_TYPES[kind], described[name].length)
        for name, sequence in rules.items()
        if sequence.columns is not None
        for field, kind in described[name].fields.items()
    }


def check_logged_types(
    raw: RawFiles,
    rules: Mapping[str, BehaviourSequence],
    described: Mapping[str, SequenceInfo],
) -> None:
    """Checks that every file has the columns of the logged sequences, in the type of what they tell of.

    Raises:
        InputError: names file, column, type and what is needed.
    """
    for name, sequence in rules.items():
        for field, column in (sequence.columns or {}).items():
            for file, schema in zip(raw.files, raw.schemas, strict=True):
                what = f"field {field} of sequence {name}"
                require_column(file, schema.names, column, what)
                arrow = schema.field(schema.names.index(column)).type
                inner, needed = element_type(arrow), described[name].fields[field]
                if inner is None or ID_TYPES.get(kind_of(inner)) != needed:
                    raise InputError(
                        f"{file}: column {column!r} ({what}) is {arrow}, must be a list of {needed}, as "
                        f"{'the seconds of gaps' if field == 'gap' else f'{field} ids'} are; cast it first"
                    )


def check_logged_values(
    con: duckdb.DuckDBPyConnection,
    raw: RawFiles,
    rules: Mapping[str, BehaviourSequence],
    described: Mapping[str, SequenceInfo],
) -> None:
    """Refuses rows whose fields are not of one length, steps without an item, and gaps below 0.

    Raises:
        InputError: names file, column and row.
    """
    columns, casts = logged_columns(rules), logged_casts(rules, described, whole=True)
    # (column, test, what is wrong)
    checks: list[tuple[str, str, str]] = []
    for name, sequence in rules.items():
        fields = list(sequence.columns or {})
        for field in fields:
            column = sequence_column(name, field)
            if column != (first := sequence_column(name, fields[0])):
                other = columns[first]
                test = f"len({column}) <> len({first})"
                checks.append((column, test, f"another number of steps than column {other!r}"))
            if field == "item":
                test = f"len(list_filter({column}, lambda x: x IS NULL)) > 0"
                checks.append((column, test, "a step without an item"))
            if field == "gap":
                test = f"len(list_filter({column}, lambda x: x IS NULL OR x < 0)) > 0"
                checks.append((column, test, "a gap that is null or below 0"))
    if not checks:
        return
    counts = ", ".join(f"count(*) FILTER (WHERE {test})" for _, test, _ in checks)
    found = con.execute(f"SELECT {counts} FROM {raw.sql(columns, casts)}").fetchall()[0]
    for count, (column, test, what) in zip(found, checks, strict=True):
        if count:
            file, row, value = raw.first_row(con, columns, casts, test, column)
            raise InputError(
                f"{file}: column {columns[column]!r}, row {row} (the first is 1): {what} ({value!r}); "
                f"{count} such rows in all; mend or drop these rows"
            )
