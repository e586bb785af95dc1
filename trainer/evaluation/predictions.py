"""Reading run directories and prediction files with a check of every row; atomic text output."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llm_knowledge.dataset_files import part_files, split_files
from llm_knowledge.errors import InputError
from llm_knowledge.parquet import parquet_sql

if TYPE_CHECKING:
    import duckdb

SPARSE_BELOW = 5  # positive training rows of a user
COLUMNS = {
    "user_id": "key",
    "item_id": "key",
    "scenario_id": "key",
    "timestamp": "int",
    "label": "int",
    "prediction": "float",
    "has_knowledge": "bool",
}


@dataclass(frozen=True)
class RunDirectory:
    """What evaluation needs to know about a run directory.

    Attributes:
        path: The run directory.
        config: The resolved configuration (`config.yaml`).
        arm: `config["name"]`, for example "star+llm4msr".
        seed: `config["train"]["seed"]`.
        dataset: The prepared dataset directory, or None when it is not where config.yaml says.
    """

    path: Path
    config: dict[str, Any]
    arm: str
    seed: int
    dataset: Path | None

    def predictions(self, split: str) -> list[Path]:
        """Returns the prediction files of a split, sorted; InputError when there is none."""
        files = sorted((self.path / "predictions" / split).glob("part-*.parquet"))
        if not files:
            raise InputError(
                f"{self.path}: no predictions/{split}/part-*.parquet. "
                "Train the run to its end first, or check the path."
            )
        return files


def read_run(path: Path) -> RunDirectory:
    """Reads the configuration of a run directory.

    Raises:
        InputError: `config.yaml` is absent, is not YAML, or lacks `name` or `train.seed`.
    """
    from llm_knowledge.yaml_files import read_yaml  # help and the op's commands start without YAML

    path = Path(path)
    file = path / "config.yaml"
    if not file.is_file():
        raise InputError(f"{path}: not a run directory, config.yaml is missing. Check the path.")
    try:
        config = read_yaml(file, grouped_digits=True)
        arm, seed = str(config["name"]), int(config["train"]["seed"])
        data = Path(config["data"]["path"])
        places = [data, path / data]
        dataset = next((folder for folder in places if (folder / "dataset.json").is_file()), None)
        for section in ("model", "knowledge"):
            if not isinstance(config.get(section) or {}, dict):
                raise ValueError(f"{section} is no section")
    except InputError:
        raise
    except (KeyError, TypeError, ValueError, OSError) as error:
        raise InputError(
            f"{file}: name, train.seed, data.path: not readable ({error!r})."
        ) from error
    return RunDirectory(path, config, arm, seed, dataset)


def resolve_runs(path: Path) -> list[Path]:
    """Lists the runs behind one command-line argument.

    Args:
        path: A run directory, or a directory whose subdirectories are runs (the seeds of an arm).

    Returns:
        Run directories sorted by name.

    Raises:
        InputError: There is no run.
    """
    path = Path(path)
    if (path / "config.yaml").is_file():
        return [path]
    runs = sorted(file.parent for file in path.glob("*/config.yaml")) if path.is_dir() else []
    if not runs:
        raise InputError(
            f"{path}: neither a run directory nor a directory of runs (no config.yaml in it or in "
            "its subdirectories). Check the path."
        )
    return runs


def group_runs(paths: Sequence[Path]) -> list[tuple[str, list[Path]]]:
    """Turns command-line arguments into named groups: one argument is one group of seeds.

    A group is called by the arm's name when its runs share one that no other group has, otherwise
    by its path.
    """
    groups = []
    for path in paths:
        runs = resolve_runs(path)
        arms = {read_run(run).arm for run in runs}
        groups.append((arms.pop() if len(arms) == 1 else str(path), runs, str(path)))
    names = [name for name, _, _ in groups]
    return [(name if names.count(name) == 1 else path, runs) for name, runs, path in groups]


def group_by_arm(paths: Sequence[Path]) -> list[tuple[str, list[Path]]]:
    """Groups all runs behind the paths by their arm's name, in order of first appearance."""
    arms: dict[str, list[Path]] = {}
    for path in paths:
        for run in resolve_runs(path):
            arms.setdefault(read_run(run).arm, []).append(run)
    return list(arms.items())


@contextlib.contextmanager
def database(memory_limit: str = "2GB", threads: int = 2) -> Iterator[duckdb.DuckDBPyConnection]:
    """Opens a temporary DuckDB database that spills to disk and is removed afterwards."""
    import duckdb

    with tempfile.TemporaryDirectory(prefix="llm4msr-metrics-") as folder:
        con = duckdb.connect(
            str(Path(folder) / "work.duckdb"),
            config={
                "memory_limit": memory_limit,
                "threads": threads,
                "temp_directory": str(Path(folder) / "spill"),
                "preserve_insertion_order": False,
                "autoinstall_known_extensions": False,
                "autoload_known_extensions": False,
            },
        )
        try:
            yield con
        finally:
            con.close()


def load_predictions(
    con: duckdb.DuckDBPyConnection,
    files: Sequence[Path],
    dataset: Path | None,
    label: str | None = None,
) -> None:
    """Creates table `p`: the prediction columns, `scenario` (text), `segment` (text or null).

    For a further label, `label` and `prediction` of `p` are that label's.

    Args:
        con: A connection from `database`.
        files: Prediction Parquet files.
        dataset: Prepared dataset that defines the segments; None leaves `segment` null.
        label: Name of a further label; None: the first one.

    Raises:
        InputError: A file is absent, truncated, lacks a column, or holds a null, NaN, a prediction
            outside [0, 1] or a label outside {0, 1}; the message names file, column and row.
    """
    columns = {name: name for name in COLUMNS}
    if label is not None:
        columns |= {name: f"{name}_{label}" for name in ("label", "prediction")}
    _check_files(files, columns)
    quoted = {name: '"' + column.replace('"', '""') + '"' for name, column in columns.items()}
    _check_values(con, files, quoted)
    if dataset is None:
        segment, join = "NULL::VARCHAR", ""
    else:
        train = split_files(dataset, "train")
        profile = part_files(dataset, "profile")
        _check_key_types(files[0], train[0])
        segment = f"""CASE WHEN u.user_id IS NULL THEN 'new_user'
                           WHEN s.user_id IS NULL THEN 'new_in_scenario'
                           WHEN u.positives < {SPARSE_BELOW} THEN 'sparse' ELSE 'known' END"""
        join = f"""LEFT JOIN (SELECT user_id, sum(label) AS positives FROM {parquet_sql(train)}
                             GROUP BY user_id) u USING (user_id)
                  LEFT JOIN (SELECT DISTINCT user_id, scenario_id
                             FROM {parquet_sql(profile + train)}) s
                  USING (user_id, scenario_id)"""
    con.execute(
        f"""CREATE OR REPLACE TABLE p AS
            SELECT {", ".join(f"r.{column} AS {name}" for name, column in quoted.items())},
            r.scenario_id::VARCHAR AS scenario, {segment} AS segment
            FROM {parquet_sql(files)} r {join}"""
    )


def _check_values(
    con: duckdb.DuckDBPyConnection, files: Sequence[Path], columns: dict[str, str]
) -> None:
    """Raises InputError for the first row with a null, a NaN or a value out of range."""
    import duckdb

    nulls = " + ".join(f"({name} IS NULL)::INT" for name in columns.values())
    label, prediction = columns["label"], columns["prediction"]
    # Writers leave NaN out of a column's minimum and maximum. A comparison alone would be answered from
    # those, and a file with NaN pass; isnan() cannot be.
    in_range = f"NOT isnan({prediction}) AND {prediction} BETWEEN 0 AND 1"
    try:
        bad = con.execute(
            f"""SELECT filename, file_row_number, {label}, {prediction}, {nulls} AS nulls
                FROM {parquet_sql(files, filename=True, file_row_number=True)}
                WHERE nulls > 0 OR {label} NOT IN (0, 1) OR NOT ({in_range})
                ORDER BY filename, file_row_number LIMIT 1"""
        ).fetchone()
    except duckdb.Error as error:
        raise InputError(f"{files[0]}, … : the prediction files do not read: {error}") from error
    if bad:
        if bad[4]:
            problem = "holds a null"
        elif bad[2] not in (0, 1):
            problem = f"label is {bad[2]}, must be 0 or 1"
        else:
            problem = f"prediction is {bad[3]}, must be a number in [0, 1]"
        raise InputError(
            f"{bad[0]}: row {bad[1]} (from 0): {problem}. Write the predictions again; a NaN means "
            "that training diverged (lower the learning rate)."
        )


def _check_files(files: Sequence[Path], columns: dict[str, str]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    if not files:
        raise InputError("no prediction files were given.")
    accepts = {
        "key": lambda t: pa.types.is_integer(t) or t in (pa.string(), pa.large_string()),
        "int": pa.types.is_integer,
        "float": pa.types.is_floating,
        "bool": pa.types.is_boolean,
    }
    for file in files:
        if file.exists() and not file.is_file():
            raise InputError(f"{file}: is no regular file. Write the predictions again.")
        try:
            schema = pq.read_schema(file)
        except FileNotFoundError as error:
            raise InputError(f"{file}: prediction file not found.") from error
        except (pa.ArrowInvalid, OSError) as error:
            raise InputError(f"{file}: not readable as Parquet ({error}).") from error
        for role, kind in COLUMNS.items():
            name = columns[role]
            if name not in schema.names:
                raise InputError(f"{file}: column '{name}' is missing (found {schema.names}).")
            # DuckDB, which reads the column by name, is blind to case.
            if [other.lower() for other in schema.names].count(name.lower()) > 1:
                raise InputError(
                    f"{file}: two columns are called '{name}', but for upper and lower case: "
                    f"{schema.names}. Write the predictions again."
                )
            if not accepts[kind](schema.field(name).type):
                raise InputError(
                    f"{file}: column '{name}' has type {schema.field(name).type}, expected {kind}."
                )


def _check_key_types(predictions: Path, events: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    left, right = pq.read_schema(predictions), pq.read_schema(events)
    for name in ("user_id", "item_id", "scenario_id"):
        predicted, expected = left.field(name).type, right.field(name).type
        if pa.types.is_integer(predicted) != pa.types.is_integer(expected):
            raise InputError(
                f"{predictions}: column '{name}' is {predicted}, but {expected} in {events}. The run "
                "was made from another dataset."
            )
