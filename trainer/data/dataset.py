"""The prepared dataset directory: its description, its checks, and how it is written whole.

DATA/dataset.json
     items.parquet                      item_id, title, categories
     {profile,train,valid,test}/part-*.parquet
     introduction/part-*.parquet        only where users are held out of training: their first events
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import socket
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictInt, StrictStr, ValidationError

from llm_knowledge.errors import InputError

if TYPE_CHECKING:
    import duckdb
    import pyarrow as pa
    import pyarrow.parquet as pq

FORMAT_VERSION = 1
HISTORY_LENGTH = 20
ROWS_PER_GROUP = 65_536  # upper bound; small splits get smaller groups, so that ranks share them
ROWS_PER_PART = 16 * ROWS_PER_GROUP
EVENT_COLUMNS = ("user_id", "item_id", "scenario_id", "timestamp", "label", "history")
# One order everywhere: time first; the rest only makes the order of simultaneous events definite.
EVENT_ORDER = "timestamp, user_id, item_id, scenario_id, label"

IdType = Literal["int64", "string"]
SplitName = Literal["profile", "train", "valid", "test"]
SPLITS: tuple[SplitName, ...] = ("profile", "train", "valid", "test")
INTRODUCTION = "introduction"


class StrictModel(BaseModel):
    """A model that refuses fields it does not know."""

    model_config = ConfigDict(extra="forbid")


class Scenario(StrictModel):
    """One scenario: its id in the log and what it is, in words that may enter a prompt."""

    scenario_id: StrictInt | StrictStr
    name: str
    description: str


class SplitInfo(StrictModel):
    """How events were divided by time.

    `boundaries` (global_time only) are the first seconds of train, valid and test. Of a share
    `held_out_users` nothing is trained: their first events (the profile window's) are in the split
    `introduction`, which only prompts read, and all their later events are in test.
    """

    rule: Literal["per_user_time", "global_time"]
    fractions: dict[SplitName, float]
    boundaries: list[int] | None = None
    held_out_users: float = Field(default=0.0, ge=0, lt=1)
    text: str


class Negatives(StrictModel):
    """How negatives were sampled, where the log itself has positives only."""

    rule: str


class Truth(StrictModel):
    """What the simulator knows: the best AUC that any model can reach, by str(scenario_id)."""

    bayes_auc: dict[str, float]
    text: str = ""


class Parent(StrictModel):
    """A dataset that later events were appended to: the first train parts and rows are what it had."""

    fingerprint: str
    train_parts: int
    train_rows: int


class DatasetInfo(StrictModel):
    """Content of dataset.json.

    Each name in `extra_labels` is a column label_NAME of the events: a further label beside `label`.
    """

    format_version: Literal[1] = 1
    name: str
    source: dict[str, Any] = Field(default_factory=dict)
    scenarios: list[Scenario] = Field(min_length=1)
    user_id_type: IdType
    item_id_type: IdType
    scenario_id_type: IdType
    history_length: int = HISTORY_LENGTH
    extra_labels: list[str] = Field(default_factory=list)
    split: SplitInfo
    rows: dict[SplitName, int] = Field(default_factory=dict)
    introduction_rows: int = 0
    users: int = 0
    items: int = 0
    negatives: Negatives | None = None
    positive_name: str
    negative_name: str | None
    truth: Truth | None = None
    parents: list[Parent] = Field(default_factory=list)
    versions: dict[str, str] = Field(default_factory=dict)


def explain_validation(where: str | Path, error: ValidationError) -> InputError:
    """Turn a pydantic error into one message: the place, each field, what is wrong with it."""
    lines = [
        f"{'.'.join(str(part) for part in item['loc']) or 'the file'}: {item['msg']}"
        for item in error.errors()
    ]
    return InputError(f"{where}: " + "; ".join(lines[:5]))


# ---------------------------------------------------------------- reading


def open_dataset(path: Path | str) -> DatasetInfo:
    """Read DATA/dataset.json.

    Raises:
        InputError: the file is absent, not JSON, of another format version, or has wrong fields.
    """
    file = Path(path) / "dataset.json"
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise InputError(
            f"{path}: not a prepared dataset (no dataset.json); make one with `prepare` or `simulate`"
        ) from None
    except (OSError, ValueError) as error:
        raise InputError(f"{file}: cannot be read as JSON: {error}") from None
    version = content.get("format_version") if isinstance(content, dict) else None
    if version != FORMAT_VERSION:
        raise InputError(
            f"{file}: format_version is {version!r}, this program reads {FORMAT_VERSION}; "
            "prepare the data again"
        )
    try:
        return DatasetInfo.model_validate(content)
    except ValidationError as error:
        raise explain_validation(file, error) from None


def split_files(path: Path | str, split: str) -> list[Path]:
    """Parquet parts of one split in time order.

    Raises:
        InputError: unknown split name, or the split has no part.
    """
    if split not in (*SPLITS, INTRODUCTION):
        raise InputError(f"unknown split {split!r}; there are {', '.join(SPLITS)}")
    files = sorted((Path(path) / split).glob("part-*.parquet"))
    if not files:
        raise InputError(f"{Path(path) / split}: the split has no part-*.parquet file")
    return files


def validate_dataset(path: Path | str) -> DatasetInfo:
    """Check a prepared dataset by its Parquet footers: columns, types, rows, nulls, labels.

    Returns:
        The description, as `open_dataset` does.

    Raises:
        InputError: names the file, the column and, for a value, the row that is wrong.
    """
    import pyarrow as pa

    from trainer.data.checks import check_schema, check_statistics

    info = open_dataset(path)
    wanted = event_schema(
        info.user_id_type, info.item_id_type, info.scenario_id_type, labels=info.extra_labels
    )
    scenarios = [scenario.scenario_id for scenario in info.scenarios]
    introduction = (INTRODUCTION,) if info.split.held_out_users else ()
    for split in (*SPLITS, *introduction):
        rows = 0
        for file in split_files(path, split):
            found, metadata = _read_metadata(file)
            check_schema(file, found, wanted)
            if bad := [n for n in found.names[len(wanted) :] if not n.startswith("truth_")]:
                raise InputError(f"{file}: unexpected column {bad[0]!r}")
            check_statistics(file, metadata, scenarios)
            rows += metadata.num_rows
        if rows == 0:
            raise InputError(f"{Path(path) / split}: the split has no rows")
        wanted_rows = info.introduction_rows if split == INTRODUCTION else info.rows.get(split)
        if rows != wanted_rows:
            raise InputError(
                f"{Path(path) / split}: {rows} rows, dataset.json says {wanted_rows}; "
                "a part is missing or foreign; prepare the data again"
            )
    items = Path(path) / "items.parquet"
    found, rows = read_footer(items)
    check_schema(items, found, pa.schema(item_fields(info.item_id_type)))
    if rows != info.items:
        raise InputError(f"{items}: {rows} rows, dataset.json says {info.items}")
    return info


def read_footer(file: Path) -> tuple[pa.Schema, int]:
    """Arrow schema and row count of a Parquet file, from its footer.

    Raises:
        InputError: the file is absent, truncated, or no Parquet.
    """
    schema, metadata = _read_metadata(file)
    return schema, metadata.num_rows


def _read_metadata(file: Path) -> tuple[pa.Schema, pq.FileMetaData]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(file) as parquet:
            return parquet.schema_arrow, parquet.metadata
    except FileNotFoundError:
        raise InputError(f"{file}: no such file") from None
    except (pa.ArrowException, OSError) as error:
        reason = (str(error).splitlines() or ["unreadable"])[0]
        raise InputError(
            f"{file}: not a readable Parquet file, perhaps truncated ({reason}); copy or write it again"
        ) from None


# ---------------------------------------------------------------- schemas


def arrow_id(kind: str) -> pa.DataType:
    """Arrow type of an id column: "int64" or "string"."""
    import pyarrow as pa

    return pa.int64() if kind == "int64" else pa.string()


def event_schema(
    user: str, item: str, scenario: str, truth: Iterable[str] = (), labels: Iterable[str] = ()
) -> pa.Schema:
    """Arrow schema of a split, from the three id types; further labels int8, `truth` columns float32."""
    import pyarrow as pa

    fields = [
        ("user_id", arrow_id(user)),
        ("item_id", arrow_id(item)),
        ("scenario_id", arrow_id(scenario)),
        ("timestamp", pa.int64()),
        ("label", pa.int8()),
        ("history", pa.list_(arrow_id(item))),
    ]
    further = [(f"label_{name}", pa.int8()) for name in labels]
    return pa.schema(fields + further + [(name, pa.float32()) for name in truth])


def item_fields(item: str) -> list[tuple[str, pa.DataType]]:
    """Columns of items.parquet."""
    import pyarrow as pa

    return [
        ("item_id", arrow_id(item)),
        ("title", pa.string()),
        ("categories", pa.list_(pa.string())),
    ]


# ---------------------------------------------------------------- writing


@contextlib.contextmanager
def output_directory(out: Path) -> Iterator[Path]:
    """Give a new folder beside `out` that becomes `out` by one rename when the block succeeds.

    Nothing of it stays behind when the block fails. Its subfolder `scratch` is for temporary files.

    Raises:
        InputError: `out` holds something already, or cannot be written (permission, space).
    """
    out = Path(os.path.abspath(out))
    with writing_errors(out):
        if out.is_dir() and any(out.iterdir()):
            raise InputError(
                f"{out}: is not empty; nothing was changed; remove it or give another --out"
            )
        if out.exists() and not out.is_dir():
            raise InputError(f"{out}: is a file; give a folder that does not exist yet as --out")
        work = out.with_name(f"{out.name}.tmp-{os.getpid()}")
        try:
            out.parent.mkdir(parents=True, exist_ok=True)
            _remove_abandoned(out)
            work.mkdir()
        except FileNotFoundError:  # where nothing can be made, as in /proc
            raise InputError(f"{out}: cannot be made there; give another --out") from None
        try:
            (work / "scratch").mkdir()
            (work / "owner").write_text(f"{socket.gethostname()} {os.getpid()}")
            yield work
            shutil.rmtree(work / "scratch")
            (work / "owner").unlink()
            os.replace(work, out)
        except BaseException:
            shutil.rmtree(work, ignore_errors=True)
            raise


def _remove_abandoned(out: Path) -> None:
    """Remove what killed runs on this machine left beside `out`; live or foreign ones stay."""
    for folder in out.parent.glob(f"{_escape_glob(out.name)}.tmp-*"):
        with contextlib.suppress(OSError, ValueError):
            host, pid = (folder / "owner").read_text().split()
            if host == socket.gethostname() and not Path(f"/proc/{int(pid)}").exists():
                shutil.rmtree(folder, ignore_errors=True)


def _escape_glob(text: str) -> str:
    return "".join(f"[{char}]" if char in "*?[" else char for char in text)


@contextlib.contextmanager
def writing_errors(out: Path) -> Iterator[None]:
    """Turn the faults that the user can mend (no space, no permission) into InputError."""
    import duckdb

    try:
        yield
    except (OSError, duckdb.Error) as error:
        number, text = getattr(error, "errno", None) or 0, str(error)
        full = "No space left" in text or "max_temp_directory_size" in text
        if number in (errno.ENOSPC, errno.EDQUOT) or full:
            raise InputError(
                f"{out.parent}: no space left while writing {out.name}; nothing was kept; "
                "free some space or give --out on another disk"
            ) from error
        refused = ["EACCES", "EPERM", "EROFS", "ENOTDIR", "EEXIST", "ENAMETOOLONG"]
        if errno.errorcode.get(number) in refused:
            place = getattr(error, "filename", None) or out
            reason = os.strerror(number)
            raise InputError(f"{place}: cannot be read or written: {reason}") from error
        raise


def connect(scratch: Path, memory: str = "2GB") -> duckdb.DuckDBPyConnection:
    """Open an in-memory DuckDB that spills to `scratch` beyond `memory`."""
    import duckdb

    config = {"memory_limit": memory, "temp_directory": str(scratch / "spill")}
    con = duckdb.connect(config={**config, "preserve_insertion_order": False})
    con.execute("SET enable_progress_bar = false")  # it would go to stdout
    return con


def parquet_sql(files: Iterable[Path], **options: bool) -> str:
    """SQL text of read_parquet over exactly these files (no glob in a name is expanded)."""
    names = ", ".join("'" + _escape_glob(str(f)).replace("'", "''") + "'" for f in files)
    extra = "".join(f", {name}={str(value).lower()}" for name, value in options.items())
    return f"read_parquet([{names}], hive_partitioning=false{extra})"


def quote_name(name: str) -> str:
    """Quote an SQL identifier."""
    return '"' + name.replace('"', '""') + '"'


def write_sorted(
    con: duckdb.DuckDBPyConnection, files: list[Path], schema: pa.Schema, folder: Path, rows: int
) -> int:
    """Write event files as one split in time order (out of core); return the rows written."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    # A multiple of DuckDB's vector of 2,048 rows, about 64 groups per split.
    group = min(ROWS_PER_GROUP, max(4_096, rows // 64 // 2_048 * 2_048))
    columns = ", ".join(quote_name(name) for name in schema.names)
    reader = con.execute(
        f"SELECT {columns} FROM {parquet_sql(files)} ORDER BY {EVENT_ORDER}"
    ).to_arrow_reader(group)
    folder.mkdir()
    written, part = 0, 0
    batch = next(reader, None)
    while batch is not None:
        in_part = 0
        with pq.ParquetWriter(folder / f"part-{part:05d}.parquet", schema) as writer:
            while batch is not None and in_part < ROWS_PER_PART:
                table = pa.Table.from_batches([batch]).cast(schema)
                writer.write_table(table, row_group_size=group)
                in_part += batch.num_rows
                batch = next(reader, None)
        written, part = written + in_part, part + 1
    return written


def write_info(folder: Path, info: DatasetInfo) -> DatasetInfo:
    """Add the versions of the writing programs and write dataset.json."""
    import platform

    import duckdb
    import numpy as np
    import pyarrow as pa

    versions = {
        "python": platform.python_version(),
        "duckdb": duckdb.__version__,
        "pyarrow": pa.__version__,
        "numpy": np.__version__,
    }
    info = info.model_copy(update={"versions": versions})
    text = json.dumps(info.model_dump(), indent=2, ensure_ascii=False)
    (folder / "dataset.json").write_text(text + "\n", encoding="utf-8")
    return info
