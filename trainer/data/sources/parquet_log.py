"""Prepare anybody's own log: Parquet files and a YAML schema that says what their columns mean."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from llm_knowledge.errors import InputError
from llm_knowledge.parquet import parquet_sql
from trainer.data.dataset import (
    SPLITS,
    DatasetInfo,
    FeatureInfo,
    IdType,
    Negatives,
    SequenceInfo,
    SplitInfo,
    event_schema,
)
from trainer.data.sources.catalogue import check_texts, write_items
from trainer.data.sources.counters import add_counters, describe_counters
from trainer.data.sources.feature_columns import (
    check_feature_values,
    describe_features,
    feature_casts,
    feature_columns,
    report_unread,
)
from trainer.data.sources.joined_tables import join_table, table_features
from trainer.data.sources.log_checks import (
    check_labels,
    check_scenarios,
    check_values,
    column_kinds,
    log_columns,
    nanoseconds_within,
    whole_seconds,
)
from trainer.data.sources.log_schema import LogSchema, SplitChoice, load_schema
from trainer.data.sources.negatives import NegativeSampler, negatives_rule
from trainer.data.sources.raw_files import RawFiles
from trainer.data.sources.sequences import (
    check_logged_types,
    check_logged_values,
    describe_sequences,
    logged_casts,
    logged_columns,
)
from trainer.data.sources.staging import Staging, finish, stage_log, time_quantile
from trainer.data.sources.writer import connect, output_directory, quote_name

if TYPE_CHECKING:
    import duckdb

logger = logging.getLogger(__name__)


# ---------------------------------------------------------------- the log as events


@dataclass(frozen=True)
class RawLog:
    """A checked log.

    Attributes:
        events: SQL of a relation with the columns of an event but `history`, and `fraction`: nanoseconds
            within the second.
        kinds: Kind of each role's column.
        raw: The files.
        features: What the features are, counters included.
        with_features: SQL of the events with the features that are joined to them; without counters.
        sequences: What the sequences are; those that are logged are columns of the events.
    """

    events: str
    kinds: dict[str, str]
    raw: RawFiles
    features: dict[str, FeatureInfo]
    with_features: str
    sequences: dict[str, SequenceInfo]


@contextlib.contextmanager
def open_log(
    con: duckdb.DuckDBPyConnection, path: Path, rules: LogSchema, schema: Path, scratch: Path
) -> Iterator[RawLog]:
    """Checks a log, and explains what goes wrong while it is read.

    Args:
        con: connection for the queries.
        path: a Parquet file, or a folder of them.
        rules: content of the schema file.
        schema: the schema file, for messages.
        scratch: folder for temporary files.

    Yields:
        The log.

    Raises:
        InputError: names file, column and row of what is wrong.
    """
    raw = RawFiles.open(path)
    logger.info("%s: %s rows in %s files", path, f"{raw.rows:,}", f"{len(raw.files):,}")
    kinds = column_kinds(raw, log_columns(rules))
    check_scenarios(rules, schema, kinds["scenario_id"])
    if raw.rows == 0:
        raise InputError(f"{path}: the log has no rows")
    of_log = {name: feature for name, feature in rules.features.items() if feature.source == "log"}
    features = describe_features(raw, of_log)
    logged = logged_columns(rules.sequences).values()
    read = [*log_columns(rules).values(), *feature_columns(features).values(), *logged]
    report_unread(raw, read, rules, schema)
    sequences = _describe_sequences(raw, rules, schema, features, kinds)
    with raw.explained():
        check_values(con, raw, rules, kinds)
        check_labels(con, raw, rules, schema)
        check_feature_values(con, raw, features, rules.features)
        check_logged_values(con, raw, rules.sequences, sequences)
        events = _events_sql(raw, rules, kinds, features, sequences)
        if rules.columns.timestamp is None and rules.columns.order is None:
            events = _number_rows(con, events, scratch)
        whole = events
        for table in rules.tables:
            whole, joined = join_table(con, whole, table, kinds, rules, schema)
            features |= joined
        ordered = {name: features[name] for name in rules.features}
        ordered |= describe_counters(rules.counters)
        yield RawLog(events, kinds, raw, ordered, whole, sequences)


def _describe_sequences(
    raw: RawFiles,
    rules: LogSchema,
    schema: Path,
    features: dict[str, FeatureInfo],
    kinds: dict[str, str],
) -> dict[str, SequenceInfo]:
    """What the sequences are, whose fields may be features of tables."""
    if not rules.sequences:
        return {}
    known = dict(features)
    for table in rules.tables:
        known |= table_features(table, rules, schema)
    sequences = describe_sequences(rules.sequences, known, kinds["item_id"])
    check_logged_types(raw, rules.sequences, sequences)
    return sequences


def _events_sql(
    raw: RawFiles,
    rules: LogSchema,
    kinds: dict[str, str],
    features: dict[str, FeatureInfo],
    sequences: dict[str, SequenceInfo],
) -> str:
    """SQL that turns the log's columns into ours."""
    columns = log_columns(rules)
    items = []
    for role in ("user_id", "item_id", "scenario_id"):
        sql_type = "BIGINT" if kinds[role] == "int64" else "VARCHAR"
        items.append(f"CAST({role} AS {sql_type}) AS {role}")
    as_sql = {}
    if rules.columns.timestamp is not None:
        columns |= {"fraction": columns["timestamp"]}
        unit = rules.timestamp_unit
        as_sql = {"timestamp": whole_seconds(unit), "fraction": nanoseconds_within(unit)}
        items += ["CAST(timestamp AS BIGINT) AS timestamp", "CAST(fraction AS BIGINT) AS fraction"]
    elif rules.columns.order is not None:
        items += ['CAST("order" AS BIGINT) AS timestamp', "0::BIGINT AS fraction"]
    labels = [role for role in columns if role.startswith("label")]
    items += [f"CAST({quote_name(role)} AS TINYINT) AS {quote_name(role)}" for role in labels]
    if rules.columns.label is None:
        items.append("1::TINYINT AS label")
    given = feature_columns(features) | logged_columns(rules.sequences)
    columns |= given
    as_sql |= feature_casts(features, rules.features) | logged_casts(rules.sequences, sequences)
    items += list(given)
    return f"(SELECT {', '.join(items)} FROM {raw.sql(columns, as_sql)})"


def _number_rows(con: duckdb.DuckDBPyConnection, events: str, scratch: Path) -> str:
    """Copies the events with the place in each user's own rows (0, 1, …) as timestamp; SQL of the copy."""
    con.execute("SET preserve_insertion_order = true")
    target = scratch / "numbered.parquet"
    quoted = str(target).replace("'", "''")
    con.execute(
        "COPY (SELECT * EXCLUDE (place), 0::BIGINT AS fraction, "
        "row_number() OVER (PARTITION BY user_id ORDER BY place) - 1 AS timestamp "
        f"FROM (SELECT *, row_number() OVER () AS place FROM {events})) TO '{quoted}' (FORMAT parquet)"
    )
    con.execute("SET preserve_insertion_order = false")
    return parquet_sql([target])


# ---------------------------------------------------------------- the whole


def _split_info(
    con: duckdb.DuckDBPyConnection, events: str, choice: SplitChoice, clock: bool
) -> SplitInfo:
    shares = " / ".join(f"{choice.fractions[name]:.0%}" for name in SPLITS)
    if choice.rule == "per_user_time":
        order = "order of time" if clock else "their order"
        text = f"Each user's events in {order}: {shares} profile, train, valid, test."
        return SplitInfo(
            rule=choice.rule,
            fractions=choice.fractions,
            held_out_users=choice.held_out_users,
            held_out_valid_users=choice.held_out_valid_users,
            text=text,
        )
    bounds, how = choice.boundaries, "Given boundaries"
    if bounds is None:
        past = [sum(choice.fractions[name] for name in SPLITS[: n + 1]) for n in range(3)]
        bounds, how = (
            [time_quantile(con, events, share) for share in past],
            f"{shares} of the events",
        )
    text = f"{how}; train, valid and test begin at {bounds} (seconds since 1970, UTC)."
    return SplitInfo(rule=choice.rule, fractions=choice.fractions, boundaries=bounds, text=text)


def _id_type(kind: str) -> IdType:
    return "int64" if kind == "int64" else "string"


def prepare_parquet(
    raw: Path, out: Path, schema: Path, memory: str = "2GB", negatives: int | None = None
) -> DatasetInfo:
    """Prepare a log of one or many Parquet files, out of core.

    Args:
        raw: a Parquet file, or a folder of them.
        out: dataset directory to create.
        schema: YAML file, see `LogSchema`.
        memory: DuckDB's limit; beyond it, it spills beside `out`.
        negatives: to sample for each positive, in place of the schema's `negatives`.

    Raises:
        InputError: names file, column and row of what is wrong; nothing is written then.
    """
    rules = load_schema(schema, negatives)
    with output_directory(out) as folder:
        scratch, items = folder / "scratch", folder / "items.parquet"
        con = connect(scratch, memory)
        with open_log(con, raw, rules, schema, scratch) as log:
            split = _split_info(con, log.events, rules.split, rules.has_clock)
            write_items(con, log.events, rules, schema.parent, items, log.kinds["item_id"], scratch)
            check_texts(con, log.events, items, rules, schema)
            user, item, scenario = (
                _id_type(log.kinds[role]) for role in ("user_id", "item_id", "scenario_id")
            )
            form = event_schema(
                user,
                item,
                scenario,
                labels=rules.labels,
                features=log.features,
                sequences=log.sequences,
            )
            staging = Staging(scratch / "staged", form, fraction=True, sequences=rules.sequences)
            sampler = None
            if rules.negatives is not None and rules.samples_negatives:
                ids = [scenario.scenario_id for scenario in rules.scenarios]
                sampler = NegativeSampler(con, log.events, ids, rules.negatives)
            events = add_counters(con, log.with_features, rules, scratch)
            stage_log(con, events, staging, scratch, split, sampler)
        info = DatasetInfo(
            name=rules.name,
            source={"kind": "parquet", "files": len(log.raw.files), "rows": log.raw.rows},
            scenarios=rules.scenarios,
            user_id_type=user,
            item_id_type=item,
            scenario_id_type=scenario,
            extra_labels=list(rules.labels),
            features=log.features,
            sequences=log.sequences,
            timestamps="seconds" if rules.has_clock else "order",
            split=split,
            negatives=_negatives_info(rules),
            positive_name=rules.positive_name,
            negative_name=rules.negative_name,
        )
        return finish(con, staging, folder, info)


def _negatives_info(rules: LogSchema) -> Negatives | None:
    if rules.negatives is None:
        return None
    return Negatives(rule=rules.negatives.rule or negatives_rule(rules.negatives))
