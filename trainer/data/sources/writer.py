"""How a prepared dataset is written: sorted out of core, and whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from llm_knowledge.dataset_files import footer_checksum
from llm_knowledge.errors import InputError
from llm_knowledge.files import check_new_directory, publish_directory, workspace
from llm_knowledge.parquet import parquet_sql
from trainer.data.dataset import DatasetInfo

if TYPE_CHECKING:
    import duckdb
    import pyarrow as pa

ROWS_PER_GROUP = 65_536  # upper bound; small splits get smaller groups, so that ranks share them
ROWS_PER_PART = 16 * ROWS_PER_GROUP


def event_order(fraction: bool = False) -> str:
    """SQL order of events, one everywhere: time first; the rest makes that of simultaneous ones definite.

    Args:
        fraction: whether there is a column `fraction` that tells times within a second apart.
    """
    time = "timestamp, fraction" if fraction else "timestamp"
    return f"{time}, user_id, item_id, scenario_id, label"


@contextlib.contextmanager
def output_directory(out: Path) -> Iterator[Path]:
    """Give a new folder beside `out` that becomes `out` by one rename when the block succeeds.

    Nothing of it stays behind when the block fails; what a kill left goes with the next dataset that is
    written beside it. Its subfolder `scratch` is for temporary files.

    Raises:
        InputError: `out` holds something already, or another command has filled it meanwhile, or it cannot
            be written (permission, space).
    """
    out = Path(os.path.abspath(out))
    with writing_errors(out):
        check_new_directory(out)
        try:
            out.parent.mkdir(parents=True, exist_ok=True)
        except FileNotFoundError:  # where nothing can be made, as in /proc
            raise InputError(f"{out}: cannot be made there; give another --out") from None
        with workspace(out) as beside:
            folder = beside / out.name
            (folder / "scratch").mkdir(parents=True)
            yield folder
            shutil.rmtree(folder / "scratch")
            publish_directory(folder, out)


@contextlib.contextmanager
def writing_errors(out: Path) -> Iterator[None]:
    """Turn the faults that the user can mend (no space, no permission) into InputError."""
    import duckdb

    try:
        yield
    except (OSError, duckdb.Error) as error:
        number, text = getattr(error, "errno", None) or 0, str(error)
        full = "No space left" in text or "max_temp_directory_size" in text
        if number in (errno.ENOTEMPTY, errno.EEXIST) and getattr(error, "filename2", None):
            raise InputError(
                f"{out}: another command has written it meanwhile; that one is whole, nothing of this "
                "one was kept; give another --out"
            ) from error
        if number in (errno.ENOSPC, errno.EDQUOT) or full:
            raise InputError(
                f"{out.parent}: no space left while writing {out.name}; nothing was kept; "
                "free some space or give --out on another disk"
            ) from error
        refused = ["EACCES", "EPERM", "EROFS", "ENOTDIR", "EEXIST", "ENAMETOOLONG"]
        if errno.errorcode.get(number) in refused:
            file = getattr(error, "filename", None) or out
            reason = os.strerror(number)
            raise InputError(f"{file}: cannot be read or written: {reason}") from error
        raise


def connect(scratch: Path, memory: str = "2GB") -> duckdb.DuckDBPyConnection:
    """Open an in-memory DuckDB that spills to `scratch` beyond `memory`."""
    import duckdb

    config = {"memory_limit": memory, "temp_directory": str(scratch / "spill")}
    con = duckdb.connect(config={**config, "preserve_insertion_order": False})
    con.execute("SET enable_progress_bar = false")  # it would go to stdout
    return con


def quote_name(name: str) -> str:
    """Quote an SQL identifier."""
    return '"' + name.replace('"', '""') + '"'


def write_sorted(
    con: duckdb.DuckDBPyConnection,
    files: list[Path],
    schema: pa.Schema,
    folder: Path,
    rows: int,
    order: str | None = None,
) -> int:
    """Write event files as one split in time order (out of core); return the rows written."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    # A multiple of DuckDB's vector of 2,048 rows, about 64 groups per split.
    group = min(ROWS_PER_GROUP, max(4_096, rows // 64 // 2_048 * 2_048))
    columns = ", ".join(quote_name(name) for name in schema.names)
    reader = con.execute(
        f"SELECT {columns} FROM {parquet_sql(files)} ORDER BY {order or event_order()}"
    ).to_arrow_reader(group)
    folder.mkdir()
    written, part = 0, 0
    batch = next(reader, None)
    while batch is not None:
        in_part = 0
        file = folder / f"part-{part:05d}.parquet"
        # A flipped bit is found when the page is read, not trained on.
        with pq.ParquetWriter(file, schema, write_page_checksum=True) as writer:
            while batch is not None and in_part < ROWS_PER_PART:
                table = pa.Table.from_batches([batch]).cast(schema)
                writer.write_table(table, row_group_size=group)
                in_part += batch.num_rows
                batch = next(reader, None)
        written, part = written + in_part, part + 1
    return written


def write_info(folder: Path, info: DatasetInfo) -> DatasetInfo:
    """Add the versions of the writing programs and the files' footers, and write dataset.json."""
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
    files = [folder / "items.parquet", *sorted(folder.glob("*/part-*.parquet"))]
    footers = {
        str(file.relative_to(folder)): footer_checksum(file) for file in files if file.exists()
    }
    info = info.model_copy(update={"versions": versions, "footers": footers})
    # A log without features or sequences keeps the description that it always had.
    absent = {name for name in ("features", "sequences") if not getattr(info, name)}
    content = info.model_dump(exclude=absent)
    text = json.dumps(content, indent=2, ensure_ascii=False)
    (folder / "dataset.json").write_text(text + "\n", encoding="utf-8")
    return info
