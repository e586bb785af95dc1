"""Row groups of Parquet files that are read while others may touch the files."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from llm_knowledge.errors import InputError


class RowGroups:
    """The rows of some Parquet files, in row groups; one group is in memory at a time.

    Size and time of change of each file are kept. A file that vanishes, is cut short or replaced later
    is refused at the next read from it: the position of a run counts rows, so other rows would be
    trained twice or never, without a word.

    Args:
        files: Parquet files of one schema, in order.

    Raises:
        InputError: A file is absent or no Parquet.
    """

    def __init__(self, files: list[Path]) -> None:
        self._files = files
        self._seen: list[tuple[int, int]] = []
        counts: list[list[int]] = []
        for file in files:
            try:
                self._seen.append(_identity(file))
                metadata = pq.read_metadata(file)
            except (pa.ArrowException, OSError) as error:
                raise self._explain(len(counts), error) from error
            counts.append([metadata.row_group(n).num_rows for n in range(metadata.num_row_groups)])
            if len(counts) == 1:
                self.schema: pa.Schema = metadata.schema.to_arrow_schema()
        groups = [(f, g, n) for f, rows in enumerate(counts) for g, n in enumerate(rows) if n]
        table = np.array(groups, dtype=np.int64).reshape(-1, 3)
        self._file, self._group, self._rows = table.T

    def __len__(self) -> int:
        """Number of row groups."""
        return len(self._rows)

    @property
    def total_rows(self) -> int:
        """Rows of all files."""
        return int(self._rows.sum())

    def pieces(self, order: np.ndarray, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
        """What rows start..stop are made of: row group, its first row, the row after its last one.

        Args:
            order: Every row group once, int64.
            start: First row, counted over the groups in this order.
            stop: Row after the last one.
        """
        ends = np.cumsum(self._rows[order])
        first, last = np.searchsorted(ends, [start, stop - 1], side="right")
        for group in range(first, last + 1 if start < stop else first):
            rows = int(self._rows[order[group]])
            before = int(ends[group]) - rows
            yield int(order[group]), max(start - before, 0), min(stop - before, rows)

    def read(self, columns: list[str], group: int) -> tuple[pa.Table, Path]:
        """Reads a row group; returns the file that it is from, too.

        Raises:
            InputError: The file is damaged, or is no longer what it was; names the file.
        """
        number = int(self._file[group])
        try:
            # Pages carry checksums; those of datasets from before them are read as they are.
            with pq.ParquetFile(self._files[number], page_checksum_verification=True) as parquet:
                # Ranks share the machine's cores: one thread each.
                table = parquet.read_row_group(
                    int(self._group[group]), columns=columns, use_threads=False
                )
        except (pa.ArrowException, OSError, LookupError) as error:
            raise self._explain(number, error) from error
        self.check(group)
        return table, self._files[number]

    def check(self, group: int) -> None:
        """Looks whether the file of a row group is still what it was.

        Raises:
            InputError: It is not; names the file.
        """
        number = int(self._file[group])
        try:
            if _identity(self._files[number]) == self._seen[number]:
                return
        except OSError as error:
            raise self._explain(number, error) from error
        raise self._explain(number, None)

    def _explain(self, number: int, error: Exception | None) -> InputError:
        """Says what became of a file: vanished, changed since it was opened, or damaged all along."""
        file = self._files[number]
        if not file.exists():
            return InputError(
                f"{file}: has vanished; put it back and go on with --resume, or prepare the data again"
            )
        if number < len(self._seen) and _identity(file) != self._seen[number]:
            return InputError(
                f"{file}: was changed or replaced while the run was reading it ({self._seen[number][0]} "
                f"bytes before, {_identity(file)[0]} now); put the old file back and go on with "
                "--resume, or start a new run on the new data"
            )
        reason = (str(error).splitlines() or ["unreadable"])[0]
        return InputError(f"{file}: is damaged ({reason}); prepare the data again")


def _identity(file: Path) -> tuple[int, int]:
    """Size in bytes and time of the last change in nanoseconds."""
    status = file.stat()
    return status.st_size, status.st_mtime_ns
