"""A new day of a log: the successor of a prepared dataset, and what a run on it still has to train on.

    profile    as before
    train      DATA's train, valid and test, then the day's first events
    valid, test      the day's last events

So what was held out yesterday is trained on today, and the newest events are held out. The successor
is a directory of its own: DATA and the runs on it stay as they are, and a crash leaves nothing. Old parts
are hard links where the file system has them, and copies elsewhere.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llm_knowledge.dataset_files import dataset_fingerprint
from llm_knowledge.errors import InputError
from llm_knowledge.parquet import parquet_sql
from trainer.data.dataset import (
    SPLITS,
    DatasetInfo,
    FeatureInfo,
    Parent,
    SequenceInfo,
    SplitInfo,
    SplitName,
    event_schema,
    feature_fields,
    item_fields,
    sequence_columns,
    split_files,
    validate_dataset,
)
from trainer.data.sources.catalogue import check_texts, write_items
from trainer.data.sources.counters import add_counters
from trainer.data.sources.feature_schema import BehaviourSequence
from trainer.data.sources.log_schema import LogSchema, load_schema
from trainer.data.sources.parquet_log import open_log
from trainer.data.sources.staging import (
    Staging,
    stage_log,
    time_quantile,
    warn_of_unseen_items,
)
from trainer.data.sources.writer import connect, output_directory, write_info, write_sorted

if TYPE_CHECKING:
    import duckdb

LATE_STEPS = 2**62  # what is not known yet when a day begins may be known to any of its events
DAY_SPLITS: tuple[SplitName, ...] = ("train", "valid", "test")


def append_parquet(
    raw: Path, base: Path, out: Path, schema: Path, memory: str = "2GB"
) -> DatasetInfo:
    """Prepare later events of the log that `base` was prepared from, out of core.

    Args:
        raw: a Parquet file, or a folder of them: only events later than all of `base`.
        base: prepared dataset with one global time; it is only read.
        out: dataset directory to create.
        schema: YAML file, see `LogSchema`; its split is not used, its catalogue may have new items.
        memory: DuckDB's limit; beyond it, it spills beside `out`.

    Raises:
        InputError: names what is wrong; nothing is written then.
    """
    rules, info = load_schema(schema), validate_dataset(base)
    _check_base(base, info, rules, schema)
    parts = {split: split_files(base, split) for split in SPLITS}
    with output_directory(out) as folder:
        con = connect(folder / "scratch", memory)
        scratch = folder / "scratch"
        with open_log(con, raw, rules, schema, scratch) as log:
            events = log.events
            _check_kinds(base, info, log.kinds)
            _check_features(base, info, log.features, schema)
            _check_sequences(base, info, log.sequences, schema)
            past = parquet_sql([file for files in parts.values() for file in files])
            split = _boundaries(con, raw, base, events, past, info)
            new_items = scratch / "items.parquet"
            write_items(con, events, rules, schema.parent, new_items, log.kinds["item_id"], scratch)
            _merge_items(con, base, folder, info)
            check_texts(con, events, folder / "items.parquet", rules, schema)
            staging = _staging(scratch / "staged", info, rules)
            # What lies before the day counts as its profile window: it gives histories, no rows.
            counted = add_counters(con, log.with_features, rules, scratch, past)
            assert split.boundaries is not None
            day = _with_last_steps(
                counted, list(parts.values()), info, rules.sequences, split.boundaries[0]
            )
            stage_log(con, day, staging, scratch, split)
        users = con.execute(
            f"SELECT count(*) FROM (SELECT user_id FROM {events} UNION SELECT user_id FROM {past})"
        ).fetchall()[0][0]
        rows = _write_parts(con, staging, parts, folder, info, split)
        warn_of_unseen_items(con, folder)
        sizes = {"rows": rows, "users": users, "items": _count_rows(con, folder / "items.parquet")}
        parent = Parent(
            fingerprint=dataset_fingerprint(base),
            train_parts=len(parts["train"]),
            train_rows=info.rows["train"],
        )
        return write_info(folder, _successor(info, parent, split, sizes))


def _staging(folder: Path, info: DatasetInfo, rules: LogSchema) -> Staging:
    form = event_schema(
        info.user_id_type,
        info.item_id_type,
        info.scenario_id_type,
        labels=info.extra_labels,
        features=info.features,
        sequences=info.sequences,
    )
    return Staging(folder, form, fraction=True, sequences=rules.sequences)


def _count_rows(con: duckdb.DuckDBPyConnection, file: Path) -> int:
    return int(con.execute(f"SELECT count(*) FROM {parquet_sql([file])}").fetchall()[0][0])


def _successor(
    info: DatasetInfo, parent: Parent, split: SplitInfo, sizes: dict[str, Any]
) -> DatasetInfo:
    """What dataset.json says of the longer log: its first boundary is the first of all."""
    assert info.split.boundaries is not None
    assert split.boundaries is not None
    boundaries = [info.split.boundaries[0], *split.boundaries[1:]]
    return info.model_copy(
        update={
            **sizes,
            "parents": [*info.parents, parent],
            "split": split.model_copy(update={"boundaries": boundaries}),
        }
    )


def _check_base(base: Path, info: DatasetInfo, rules: LogSchema, schema: Path) -> None:
    if info.split.rule != "global_time" or info.split.boundaries is None:
        raise InputError(
            f"{base}: is split by {info.split.rule}; later events can be appended under global_time "
            "only, where the newest events of all users are held out"
        )
    if info.truth is not None:
        raise InputError(f"{base}: is simulated; simulate a longer log instead")
    known = {scenario.scenario_id for scenario in info.scenarios}
    if known != {scenario.scenario_id for scenario in rules.scenarios}:
        raise InputError(
            f"{schema}: scenarios differ from those of {base}: {sorted(map(str, known))}; a model "
            "keeps its scenarios; prepare the whole log anew to change them"
        )
    for role in ("positive_name", "negative_name"):
        if getattr(rules, role) != getattr(info, role):
            raise InputError(
                f"{schema}: {role} is {getattr(rules, role)!r}, but {getattr(info, role)!r} in {base}: "
                "prompts and stores call the labels so; keep the word, or prepare the whole log anew"
            )
    if rules.samples_negatives:
        raise InputError(
            f"{schema}: negatives.per_positive: negatives are drawn by how popular items are in the whole "
            "log; prepare the whole log anew"
        )
    if sorted(rules.labels) != sorted(info.extra_labels):
        raise InputError(
            f"{schema}: further labels {sorted(rules.labels)} differ from those of {base}: "
            f"{sorted(info.extra_labels)}; prepare the whole log anew to change them"
        )


def _check_kinds(base: Path, info: DatasetInfo, kinds: dict[str, str]) -> None:
    for role in ("user_id", "item_id", "scenario_id"):
        expected = getattr(info, f"{role}_type")
        if kinds[role] != expected:
            raise InputError(f"{role}: is {kinds[role]} in the new files, {expected} in {base}")


def _check_features(
    base: Path, info: DatasetInfo, features: dict[str, FeatureInfo], schema: Path
) -> None:
    for name in sorted(info.features.keys() | features.keys()):
        before, now = info.features.get(name), features.get(name)
        if before is None or now is None:
            raise InputError(
                f"{schema}: feature {name!r} is {'new' if before is None else 'missing'}: the features of "
                f"{base} are {sorted(info.features)}; declare the same, or prepare the whole log anew"
            )
        counted = "counters" in (before.source, now.source)
        for part in ("kind", "type", *(("column",) if counted else ())):
            if getattr(before, part) != getattr(now, part):
                raise InputError(
                    f"{schema}: feature {name!r}: {part} is {getattr(now, part)} in the new files, "
                    f"{getattr(before, part)} in {base}"
                )
        if (before.weights is None) != (now.weights is None):
            raise InputError(f"{schema}: feature {name!r}: weights differ from those of {base}")


def _check_sequences(
    base: Path, info: DatasetInfo, sequences: dict[str, SequenceInfo], schema: Path
) -> None:
    for name in sorted(info.sequences.keys() | sequences.keys()):
        before, now = info.sequences.get(name), sequences.get(name)
        if before != now or list((before or now).fields) != list(now.fields):  # type: ignore[union-attr]
            described = [one.model_dump() if one is not None else "absent" for one in (now, before)]
            raise InputError(
                f"{schema}: sequence {name!r} is {described[0]}, in {base} {described[1]}; declare the same, "
                "or prepare the whole log anew"
            )


def _boundaries(
    con: duckdb.DuckDBPyConnection,
    raw: Path,
    base: Path,
    events: str,
    past: str,
    info: DatasetInfo,
) -> SplitInfo:
    """The day's cuts; all before its first event is before its train window."""
    newest = con.execute(f"SELECT max(timestamp) FROM {past}").fetchall()[0][0]
    oldest, count = con.execute(f"SELECT min(timestamp), count(*) FROM {events}").fetchall()[0]
    if not count:
        raise InputError(f"{raw}: no rows; nothing was changed")
    if oldest <= newest:
        raise InputError(
            f"{raw}: begins at second {oldest}, but {base} has events until {newest}; is this day in it "
            "already? Give only later events: histories of older ones would be wrong"
        )
    shares = [info.split.fractions[name] for name in DAY_SPLITS]
    valid, test = (time_quantile(con, events, sum(shares[:n]) / sum(shares)) for n in (1, 2))
    text = (
        f"{info.split.text.split(' Appended:')[0]} Appended: events since {oldest}; valid and test begin "
        f"at {valid} and {test}, everything before them is trained on."
    )
    return info.split.model_copy(update={"boundaries": [oldest, valid, test], "text": text})


def _with_last_steps(
    events: str,
    parts: list[list[Path]],
    info: DatasetInfo,
    sequences: dict[str, BehaviourSequence],
    day: int,
) -> str:
    """The day's events, and those before of its users that histories and sequences may need.

    Of each label the last ones, as many as a list holds, and whatever is not known yet when the day
    begins. Rows of the dataset lie in order of time, also within a second. So that this order is kept,
    their place stands for the fraction of the second that the dataset does not hold.
    """
    columns = ", ".join(
        ["user_id, item_id, scenario_id, timestamp, label"]
        + [f"label_{name}" for name in info.extra_labels]
        + [name for name, _ in feature_fields(info.features)]
        + [
            name
            for name, _ in sequence_columns(
                {name: one for name, one in info.sequences.items() if one.source == "log"}
            )
        ]
    )
    past = " UNION ALL ".join(
        f"SELECT {columns}, filename, file_row_number FROM "
        + parquet_sql(files, filename=True, file_row_number=True)
        for files in parts
    )
    needs = [("label = 1", info.history_length)]
    for sequence in sequences.values():
        if sequence.where is None:
            continue
        label = "label" if sequence.where == "label" else f"label_{sequence.where}"
        test = "true" if sequence.where == "impression" else f"{label} = 1"
        late = f"timestamp + {sequence.known_after} >= {day}"
        if sequence.known_after:
            needs += [(f"{test} AND {late}", LATE_STEPS)]
        needs += [(f"{test} AND NOT {late}" if sequence.known_after else test, sequence.length)]
    newest_first = "timestamp DESC, filename DESC, file_row_number DESC"
    places, kept = [], []
    for number, (test, length) in enumerate(needs):
        places.append(
            f"CASE WHEN {test} THEN row_number() OVER (PARTITION BY user_id, {test} ORDER BY "
            f"{newest_first}) END AS place_{number}"
        )
        kept.append(f"place_{number} <= {length}")
    return (
        f"(SELECT {columns}, fraction FROM {events} UNION ALL SELECT {columns}, -place AS fraction FROM "
        f"(SELECT *, row_number() OVER (PARTITION BY user_id ORDER BY {newest_first}) AS place, "
        f"{', '.join(places)} FROM ({past}) WHERE ({' OR '.join(f'({test})' for test, _ in needs)}) "
        f"AND user_id IN (SELECT user_id FROM {events})) WHERE {' OR '.join(kept)})"
    )


def _merge_items(
    con: duckdb.DuckDBPyConnection, base: Path, folder: Path, info: DatasetInfo
) -> None:
    """The old catalogue with the new items; an old item without text gets the new text."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    old, new = (parquet_sql([dataset / "items.parquet"]) for dataset in (base, folder / "scratch"))
    reader = con.execute(
        "SELECT item_id, coalesce(nullif(o.title, ''), n.title, '') AS title, "
        "CASE WHEN len(o.categories) > 0 THEN o.categories ELSE coalesce(n.categories, []) END "
        f"AS categories FROM {old} AS o FULL JOIN {new} AS n USING (item_id) ORDER BY item_id"
    ).to_arrow_reader(65_536)
    target = pa.schema(item_fields(info.item_id_type))
    with pq.ParquetWriter(folder / "items.parquet", target, write_page_checksum=True) as writer:
        for batch in reader:
            writer.write_table(pa.Table.from_batches([batch]).cast(target))


def _write_parts(
    con: duckdb.DuckDBPyConnection,
    staging: Staging,
    old: dict[SplitName, list[Path]],
    folder: Path,
    info: DatasetInfo,
    split: SplitInfo,
) -> dict[SplitName, int]:
    """Takes over the old parts, writes the day's behind them; rows by split."""
    for name in DAY_SPLITS:
        if staging.rows[name] == 0:
            raise InputError(
                f"the day has too few events: its {name} part is empty ({split.text}); append several "
                "days at once"
            )
    rows: dict[SplitName, int] = {
        "profile": info.rows["profile"],
        "train": 0,
        "valid": 0,
        "test": 0,
    }
    _take_over(old["profile"], folder / "profile")
    trained = [file for name in DAY_SPLITS for file in old[name]]
    _take_over(trained, folder / "train")
    rows["train"] = sum(info.rows[name] for name in DAY_SPLITS)
    for name in DAY_SPLITS:
        fresh = folder / "scratch" / f"new-{name}"
        rows[name] += write_sorted(
            con, staging.files[name], staging.schema, fresh, staging.rows[name], staging.order
        )
        first = len(trained) if name == "train" else 0
        (folder / name).mkdir(exist_ok=True)
        for number, file in enumerate(sorted(fresh.iterdir()), first):
            os.rename(file, folder / name / f"part-{number:05d}.parquet")
    return rows


def _take_over(files: Sequence[Path], folder: Path) -> None:
    folder.mkdir()
    for number, file in enumerate(files):
        target = folder / f"part-{number:05d}.parquet"
        try:
            os.link(file, target)
        except OSError:  # another file system, or one without hard links
            shutil.copyfile(file, target)
