"""The engines that profiles are queried with: DuckDB on one machine, Spark on many.

An engine holds the views `events` and `items` and answers the queries of `profile_queries`. DuckDB
works through users in buckets of bounded size, because it cannot spill the lists of an aggregate. Spark
writes its result as files that are then read one after the other. Neither lets memory grow with the log.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol, Self

from llm_knowledge.errors import InputError
from llm_knowledge.parquet import parquet_sql, spark_path
from llm_knowledge.profiles.queries import DUCKDB, SPARK, Dialect

if TYPE_CHECKING:
    import pyarrow as pa

ENGINES = ("duckdb", "spark")
# Events that are grouped at a time: bounds DuckDB's memory, the aggregates of a bucket included.
BUCKET_EVENTS = 250_000
COLUMNS = "user_id, item_id, scenario_id, timestamp, label"


class Engine(Protocol):
    """What profiles need of an engine; a context manager that frees what it holds."""

    dialect: Dialect
    errors: tuple[type[Exception], ...]  # what it raises for files or columns that it cannot read

    def __enter__(self) -> Self: ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None: ...

    def open(self, items: Path, events: Sequence[Path], until: int | None) -> None:
        """Makes the views; with `until`, of events with a timestamp of at most that."""
        ...

    def fetch(self, query: str) -> list[tuple[Any, ...]]:
        """All rows of a small result."""
        ...

    def stream(self, query: str, rows: int, by_user: bool) -> Iterator[pa.RecordBatch]:
        """The rows of a result ordered by `key`; `by_user`: it groups events by user."""
        ...


class DuckDB:
    """Embedded, out of core: memory is bounded whatever the size of the log."""

    dialect = DUCKDB

    def __init__(self, scratch: Path, memory_limit: str, threads: int | None) -> None:
        import duckdb

        self.errors: tuple[type[Exception], ...] = (duckdb.Error,)
        self._scratch = scratch
        self._database = duckdb.connect()
        self._database.execute("SET memory_limit = $m", {"m": memory_limit})
        self._database.execute("SET temp_directory = $d", {"d": str(scratch)})
        # Results are ordered by the queries; the order of insertion would cost memory.
        self._database.execute("SET preserve_insertion_order = false")
        if threads:
            self._database.execute("SET threads = $n", {"n": threads})

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._database.close()

    def open(self, items: Path, events: Sequence[Path], until: int | None) -> None:
        """See `Engine`."""
        self._view("items", [items])
        if events:
            self._view("log", events)
            kept = "" if until is None else f"WHERE timestamp <= {int(until)}"
            self._database.execute(
                f"CREATE OR REPLACE TEMP VIEW events AS SELECT {COLUMNS} FROM log {kept}"
            )

    def _view(self, name: str, files: Sequence[Path]) -> None:
        self._database.execute(
            f"CREATE OR REPLACE TEMP VIEW {name} AS SELECT * FROM {parquet_sql(files)}"
        )

    def fetch(self, query: str) -> list[tuple[Any, ...]]:
        """See `Engine`."""
        return self._database.execute(query).fetchall()

    def stream(self, query: str, rows: int, by_user: bool) -> Iterator[pa.RecordBatch]:
        """See `Engine`."""
        buckets = self._buckets() if by_user else []
        for bucket in buckets:
            self._view("events", sorted(bucket.glob("*.parquet")))
            yield from self._database.execute(query).to_arrow_reader(max(2048, rows))
            shutil.rmtree(bucket)
        if not buckets:
            yield from self._database.execute(query).to_arrow_reader(max(2048, rows))

    def _buckets(self) -> list[Path]:
        """Writes the events into folders of whole users, in the order of the users; none if few."""
        if self.fetch("SELECT count(*) FROM events")[0][0] <= BUCKET_EVENTS:
            return []
        folder = self._scratch / "buckets"
        self._database.execute(f"""
            CREATE OR REPLACE TEMP TABLE bucket_of AS
            SELECT user_id, CAST((sum(n) OVER (ORDER BY user_id) - n) // {BUCKET_EVENTS} AS BIGINT)
                   AS bucket
            FROM (SELECT user_id, count(*) AS n FROM events GROUP BY user_id)""")
        quoted = str(folder).replace("'", "''")
        self._database.execute(f"""
            COPY (SELECT {COLUMNS}, bucket FROM events JOIN bucket_of USING (user_id))
            TO '{quoted}' (FORMAT parquet, PARTITION_BY (bucket))""")
        self._database.execute("DROP TABLE bucket_of")
        return sorted(folder.iterdir(), key=lambda path: int(path.name.partition("=")[2]))


class Spark:
    """Apache Spark: local mode by default, a cluster where `master` says so.

    On a cluster the data and the output directory must be where every executor sees them. A session that
    the process has already is used and left open.
    """

    dialect = SPARK

    def __init__(
        self, scratch: Path, memory_limit: str, threads: int | None, master: str | None
    ) -> None:
        if not (os.environ.get("JAVA_HOME") or shutil.which("java")):
            raise InputError(
                "--engine spark: no Java is found; install Java 17 or set JAVA_HOME, or use "
                "--engine duckdb"
            )
        try:
            from pyspark.errors import PySparkException
            from pyspark.sql import SparkSession
        except ImportError as error:
            raise InputError(
                "--engine spark: PySpark is not installed: pip install -r requirements/spark.txt"
            ) from error
        self.errors: tuple[type[Exception], ...] = (PySparkException,)
        self._scratch = scratch
        master = master or f"local[{threads or '*'}]"
        options = {
            "spark.sql.session.timeZone": "UTC",
            "spark.sql.ansi.enabled": "true",  # an overflow is an error, as in DuckDB
            "spark.sql.parser.escapedStringLiterals": "true",  # '\p' stays '\p'
            "spark.ui.enabled": "false",
            "spark.ui.showConsoleProgress": "false",
            "spark.log.level": "ERROR",
            "spark.driver.memory": memory_limit.lower().removesuffix("b"),
        }
        if master.startswith("local"):
            options |= {
                "spark.driver.bindAddress": "127.0.0.1",
                "spark.driver.host": "127.0.0.1",
                "spark.local.dir": str(scratch),
                "spark.sql.shuffle.partitions": "8",
            }
        builder = SparkSession.builder.appName("llm4msr profiles").master(master)
        for name, value in options.items():
            builder = builder.config(name, value)
        self._own = SparkSession.getActiveSession() is None
        self._session = builder.getOrCreate()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._own:
            self._session.stop()

    def open(self, items: Path, events: Sequence[Path], until: int | None) -> None:
        """See `Engine`."""
        self._session.read.parquet(spark_path(items)).createOrReplaceTempView("items")
        if events:
            log = self._session.read.parquet(*map(spark_path, events))
            log = log.selectExpr(*COLUMNS.split(", "))
            kept = log if until is None else log.where(f"timestamp <= {int(until)}")
            kept.createOrReplaceTempView("events")

    def fetch(self, query: str) -> list[tuple[Any, ...]]:
        """See `Engine`."""
        return [tuple(row) for row in self._session.sql(query).collect()]

    def stream(self, query: str, rows: int, by_user: bool) -> Iterator[pa.RecordBatch]:
        """See `Engine`."""
        import pyarrow.parquet as pq

        folder = self._scratch / "spark"
        # A sorted result is written in ranges of keys, a file each, named in their order.
        self._session.sql(query).write.mode("overwrite").parquet(str(folder))
        for file in sorted(folder.glob("part-*.parquet")):
            with pq.ParquetFile(file) as part:
                yield from part.iter_batches(max(2048, rows))
        shutil.rmtree(folder)


def open_engine(
    name: str, scratch: Path, memory_limit: str, threads: int | None, master: str | None = None
) -> Engine:
    """Starts an engine.

    Args:
        name: "duckdb" or "spark".
        scratch: directory that it may spill to.
        memory_limit: of DuckDB, or of Spark's driver, e.g. "2GB".
        threads: at most so many; None: all cores.
        master: Spark's master URL; None: local mode.

    Raises:
        InputError: unknown engine, or Spark without Java or PySpark.
    """
    if name == "duckdb":
        return DuckDB(scratch, memory_limit, threads)
    if name == "spark":
        return Spark(scratch, memory_limit, threads, master)
    raise InputError(f"--engine {name!r}: want one of {', '.join(ENGINES)}")
