"""The prepared dataset directory: its description and its checks; `trainer.data.sources.writer` writes it.

DATA/dataset.json
     items.parquet                      item_id, title, categories
     {profile,train,valid,test}/part-*.parquet
     introduction/part-*.parquet        only where users are held out of training: their first events
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    StrictInt,
    StrictStr,
    ValidationError,
    model_validator,
)

from llm_knowledge.dataset_files import (
    INTRODUCTION,
    SPLITS,
    SplitName,
    check_footers,
    read_description,
    split_files,
)
from llm_knowledge.errors import InputError

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq

HISTORY_LENGTH = 20
EVENT_COLUMNS = ("user_id", "item_id", "scenario_id", "timestamp", "label", "history")

IdType = Literal["int64", "string"]


class StrictModel(BaseModel):
    """A model that refuses fields it does not know."""

    model_config = ConfigDict(extra="forbid")


class Scenario(StrictModel):
    """One scenario: its id in the log and what it is, in words that may enter a prompt."""

    scenario_id: Annotated[StrictInt, Field(ge=-(2**63), lt=2**63)] | StrictStr
    name: str
    description: str


class SplitInfo(StrictModel):
    """How events were divided by time.

    `boundaries` (global_time only) are the first seconds of train, valid and test. Of a share
    `held_out_users` nothing is trained: their first events (the profile window's) are in the split
    `introduction`, which only prompts read, and all their later events are in test. A further share
    `held_out_valid_users` has them in valid, so that what is chosen there is chosen for new users too.
    """

    rule: Literal["per_user_time", "global_time"]
    fractions: dict[SplitName, float]
    boundaries: list[int] | None = None
    held_out_users: float = Field(default=0.0, ge=0, lt=1)
    held_out_valid_users: float = Field(default=0.0, ge=0, lt=1)
    text: str

    @property
    def held_out(self) -> float:
        """Share of users of whom nothing is trained."""
        return self.held_out_users + self.held_out_valid_users


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


class FeatureInfo(StrictModel):
    """A feature of the events: their column feature_NAME holds its raw values, null where there is none.

    Attributes:
        kind: One id, a list of ids, or a number.
        type: Of the ids; double for numbers.
        source: Where the values were read: the log, the catalogue joined by item, or counters, which were
            made of the log's earlier events.
        column: Their column there; of a counter what it counts, in words.
        weights: Column of the ids' weights, which are weights_NAME of the events; None: unweighted.
    """

    kind: Literal["id", "ids", "number"]
    type: Literal["int64", "string", "double"]
    source: str
    column: str
    weights: str | None = None


class SequenceInfo(StrictModel):
    """What a user did before each event, oldest first: its columns sequence_NAME_FIELD are lists.

    Attributes:
        source: made, by `prepare` of a label's positives, or the log, where the service wrote it.
        text: What it is, in words: two sequences of one text have the same values.
        length: Steps that a row has at most.
        fields: What each step says, and its type: item, gap (seconds until the event), or the value that a
            feature of kind id had then, which may be null. Lists of one row have one length.
    """

    source: Literal["made", "log"]
    text: str
    length: int = Field(ge=1)
    fields: dict[str, Literal["int64", "string"]] = Field(min_length=1)


class DatasetInfo(StrictModel):
    """Content of dataset.json.

    Each name in `extra_labels` is a column label_NAME of the events: a further label beside `label`.
    Each name in `features` is a column feature_NAME, each field of one in `sequences` sequence_NAME_FIELD.
    `timestamps` says what a timestamp is: seconds since 1970, UTC, or, of a log without a clock, a place in
    the user's own order, which cannot be compared between users. `footers` holds the checksum of each
    Parquet file's footer; pages have checksums of their own, which are looked at when they are read.
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
    timestamps: Literal["seconds", "order"] = "seconds"
    features: dict[str, FeatureInfo] = Field(default_factory=dict)
    sequences: dict[str, SequenceInfo] = Field(default_factory=dict)
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
    footers: dict[str, str] = Field(default_factory=dict)
    versions: dict[str, str] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _check_scenarios(self) -> DatasetInfo:
        ids = [scenario.scenario_id for scenario in self.scenarios]
        kind = int if self.scenario_id_type == "int64" else str
        if wrong := [value for value in ids if not isinstance(value, kind)]:
            raise ValueError(f"scenario_id {wrong[0]!r} is not {self.scenario_id_type}")
        if len(set(ids)) != len(ids):
            raise ValueError("a scenario_id is listed twice")
        return self


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
    try:
        return DatasetInfo.model_validate(read_description(path))
    except ValidationError as error:
        raise explain_validation(Path(path) / "dataset.json", error) from None


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
    expected = event_schema(
        info.user_id_type,
        info.item_id_type,
        info.scenario_id_type,
        labels=info.extra_labels,
        features=info.features,
        sequences=info.sequences,
    )
    scenarios = [scenario.scenario_id for scenario in info.scenarios]
    introduction = (INTRODUCTION,) if info.split.held_out else ()
    for split in (*SPLITS, *introduction):
        rows = 0
        files = split_files(path, split)
        check_footers(path, files, info.footers)
        for file in files:
            present, metadata = _read_metadata(file)
            check_schema(file, present, expected)
            if bad := [n for n in present.names[len(expected) :] if not n.startswith("truth_")]:
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
    check_footers(path, [items], info.footers)
    present, rows = read_footer(items)
    check_schema(items, present, pa.schema(item_fields(info.item_id_type)))
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

    if file.exists() and not file.is_file():
        raise InputError(f"{file}: is no regular file; give a Parquet file")
    try:
        with pq.ParquetFile(file) as parquet:
            return parquet.schema_arrow, parquet.metadata
    except FileNotFoundError:
        raise InputError(f"{file}: no such file") from None
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        reason = (str(error).splitlines() or ["unreadable"])[0]
        raise InputError(
            f"{file}: not a readable Parquet file, perhaps truncated ({reason}); copy or write it again"
        ) from None


# ---------------------------------------------------------------- schemas


def arrow_id(kind: str) -> pa.DataType:
    """Arrow type of an id column: "int64" or "string"."""
    import pyarrow as pa

    return pa.int64() if kind == "int64" else pa.string()


def feature_fields(features: Mapping[str, FeatureInfo]) -> list[tuple[str, pa.DataType]]:
    """Columns that features have in the events: feature_NAME, and weights_NAME of weighted lists."""
    import pyarrow as pa

    fields = []
    for name, feature in features.items():
        kind = pa.float64() if feature.type == "double" else arrow_id(feature.type)
        fields.append((f"feature_{name}", pa.list_(kind) if feature.kind == "ids" else kind))
        if feature.weights is not None:
            fields.append((f"weights_{name}", pa.list_(pa.float32())))
    return fields


def sequence_column(name: str, field: str) -> str:
    """Column of the events that holds a field of a sequence."""
    return f"sequence_{name}_{field}"


def sequence_columns(sequences: Mapping[str, SequenceInfo]) -> list[tuple[str, pa.DataType]]:
    """Columns that sequences have in the events."""
    import pyarrow as pa

    return [
        (sequence_column(name, field), pa.list_(arrow_id(kind)))
        for name, sequence in sequences.items()
        for field, kind in sequence.fields.items()
    ]


def event_schema(
    user: str,
    item: str,
    scenario: str,
    truth: Iterable[str] = (),
    labels: Iterable[str] = (),
    features: Mapping[str, FeatureInfo] | None = None,
    sequences: Mapping[str, SequenceInfo] | None = None,
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
    further += [*feature_fields(features or {}), *sequence_columns(sequences or {})]
    return pa.schema(fields + further + [(name, pa.float32()) for name in truth])


def item_fields(item: str) -> list[tuple[str, pa.DataType]]:
    """Columns of items.parquet."""
    import pyarrow as pa

    return [
        ("item_id", arrow_id(item)),
        ("title", pa.string()),
        ("categories", pa.list_(pa.string())),
    ]
