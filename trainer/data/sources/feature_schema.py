"""Features and counters in the schema of a user's own log."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, Literal

from pydantic import ConfigDict, Field, model_validator

from trainer.data.dataset import StrictModel, sequence_column

FEATURE_NAME = "^[a-z][a-z0-9_]*$"
# What the program reads of every row by these names already.
RESERVED = ("user", "item", "scenario", "history", "label", "timestamp")
ROLES = ("user", "item", "scenario")
SECONDS_PER_DAY = 86_400


class Feature(StrictModel):
    """A column that the model may read.

    Attributes:
        kind: id (one value), ids (a list of them) or number.
        source: `from` in the file: log, catalogue, or users.
        column: Its name there; by default the feature's.
        separator: kind ids: splits a column of text into the list.
        weights: kind ids: column with one number per id.
        timeless: Of a number of a table that does not say since when it holds: it is known to be no
            statistic over later events.
    """

    model_config = ConfigDict(extra="forbid", populate_by_name=True)

    kind: Literal["id", "ids", "number"]
    source: Literal["log", "catalogue", "users"] = Field(default="log", alias="from")
    column: str | None = None
    separator: str | None = Field(default=None, min_length=1)
    weights: str | None = None
    timeless: bool = False

    @model_validator(mode="before")
    @classmethod
    def _not_yet(cls, value: Any) -> Any:
        if isinstance(value, dict) and "text" in value:
            raise ValueError("text (features in prompts) is not supported yet; remove it")
        return value

    @model_validator(mode="after")
    def _check(self) -> Feature:
        for option in ("separator", "weights"):
            if getattr(self, option) is not None and self.kind != "ids":
                raise ValueError(f"{option} goes with kind ids only")
        if self.separator is not None and self.weights is not None:
            raise ValueError("weights need a column of lists, not text with a separator")
        return self


class Counter(StrictModel):
    """A count or a rate of what came strictly before an event and was known by then.

    Attributes:
        of: label, the name of a further label, or impression: every event.
        by: What the events counted share with the event: user, item, scenario, and features of kind id
            or, once, ids.
        value: count, or rate: (positives + smoothing * r) / (events + smoothing), r the same rate over
            all events known by then; by default rate of a label, count of impressions.
        window_days: Only the events of so many days before; by default all of the past.
        known_after: Seconds after an event until its label is known.
        smoothing: Of a rate: so many events of rate r are added.
    """

    of: str = "label"
    by: list[str] = Field(min_length=1)
    value: Literal["rate", "count"] | None = None
    window_days: int | None = Field(default=None, ge=1)
    known_after: int = Field(default=0, ge=0)
    smoothing: float = Field(default=10.0, gt=0, allow_inf_nan=False)

    @property
    def is_rate(self) -> bool:
        """Whether it is a rate."""
        return (self.value or ("count" if self.of == "impression" else "rate")) == "rate"

    @property
    def window(self) -> int | None:
        """Length of the window in seconds."""
        return None if self.window_days is None else self.window_days * SECONDS_PER_DAY

    @property
    def text(self) -> str:
        """What it is, in words: two counters of one text have the same values."""
        words = [f"{'rate' if self.is_rate else 'count'} of {self.of} by {', '.join(self.by)}"]
        words += [f"of {self.window_days} days"] if self.window_days is not None else []
        words += [f"known after {self.known_after} s"] if self.known_after else []
        words += [f"smoothed by {self.smoothing:g}"] if self.is_rate else []
        return "; ".join(words)

    @model_validator(mode="after")
    def _check(self) -> Counter:
        if self.of == "impression" and (self.value == "rate" or self.known_after):
            raise ValueError(
                "impressions are counted, and known at once: no value: rate, no known_after"
            )
        if not self.is_rate and "smoothing" in self.model_fields_set:
            raise ValueError("smoothing goes with rates only")
        if self.window is not None and self.window <= self.known_after:
            raise ValueError("window_days ends before any label in it is known (known_after)")
        if len(set(self.by)) < len(self.by):
            raise ValueError("by names a key twice")
        return self


class BehaviourSequence(StrictModel):
    """What a user did before an event: made of a label's positives, or as the service logged it.

    Attributes:
        where: Made: label, the name of a further label, or impression; its positive events (of impression
            every event) are the steps.
        columns: As logged: field to a column of lists, oldest step first.
        length: Steps that are kept at most, the newest ones.
        fields: Made: what a step says: item, gap, and features of kind id.
        known_after: Made: seconds after an event until its label is known.
    """

    where: str | None = None
    columns: dict[str, str] | None = Field(default=None, min_length=1)
    length: int = Field(default=20, ge=1, le=10_000)
    fields: list[str] = Field(default=["item"], min_length=1)
    known_after: int = Field(default=0, ge=0)

    @property
    def names(self) -> list[str]:
        """Its fields, in order."""
        return self.fields if self.columns is None else list(self.columns)

    @property
    def text(self) -> str:
        """What it is, in words."""
        if self.columns is not None:
            return "as logged"
        late = f", known after {self.known_after} s" if self.known_after else ""
        return f"events with {self.where}{late}"

    @model_validator(mode="after")
    def _check(self) -> BehaviourSequence:
        if (self.where is None) == (self.columns is None):
            raise ValueError("give where, to make it of a label, or columns, where the log has it")
        if self.columns is not None and self.model_fields_set & {"fields", "known_after"}:
            raise ValueError("fields and known_after go with where; columns names its own fields")
        if self.where == "impression" and self.known_after:
            raise ValueError("impressions are known at once: no known_after")
        if len(set(self.fields)) < len(self.fields):
            raise ValueError("fields names one twice")
        return self


def check_sequences(
    sequences: Mapping[str, BehaviourSequence],
    features: Mapping[str, Feature],
    labels: Collection[str],
    has_clock: bool,
) -> None:
    """Refuses a sequence of a label or with a field that is not there.

    Raises:
        ValueError: Says what there is.
    """
    fields = ["item", "gap", *(name for name, one in features.items() if one.kind == "id")]
    columns: dict[str, str] = {}
    for name, sequence in sequences.items():
        known = ["label", "impression", *labels]
        if sequence.where is not None and sequence.where not in known:
            raise ValueError(
                f"sequences.{name}.where: {sequence.where!r} is none of {', '.join(known)}"
            )
        for field in sequence.names:
            if field not in fields:
                raise ValueError(
                    f"sequences.{name}: field {field!r} is none of {', '.join(fields)}; declare the column "
                    "under features as kind id"
                )
            column = sequence_column(name, field)
            if column in columns:
                raise ValueError(
                    f"sequences.{name}: {column} would be a column of {columns[column]} too; rename one"
                )
            columns[column] = name
        if not has_clock and (sequence.known_after or "gap" in sequence.fields):
            raise ValueError(
                f"sequences.{name}: the log has no clock, so there is no gap and no known_after"
            )


def check_source(name: str, feature: Feature, tables: Mapping[str, bool]) -> None:
    """Refuses a feature of a table that is not there, and a number that may tell of later events.

    Args:
        name: Of the feature.
        feature: As declared.
        tables: Tables that the schema names, and whether each says since when its rows hold.

    Raises:
        ValueError: Says what to do.
    """
    if feature.source != "log" and feature.source not in tables:
        raise ValueError(
            f"features.{name}: from {feature.source}, but the schema has no {feature.source}"
        )
    dated = feature.source == "log" or tables[feature.source]
    if feature.kind == "number" and not dated and not feature.timeless:
        raise ValueError(
            f"features.{name}: a number of a table that says no since holds for all times: a statistic over "
            "the whole log would tell of later events; give the table's since, or say timeless: true if it "
            "is none (a price, a length)"
        )
    if feature.timeless and (feature.kind != "number" or dated):
        raise ValueError(
            f"features.{name}: timeless goes with numbers of a table without since only; remove it"
        )


def check_counter(
    name: str, counter: Counter, features: Mapping[str, Feature], labels: Collection[str]
) -> None:
    """Refuses a counter of a label or of a key that is not there.

    Raises:
        ValueError: Says what there is.
    """
    known = ["label", "impression", *labels]
    if counter.of not in known:
        raise ValueError(f"counters.{name}.of: {counter.of!r} is none of {', '.join(known)}")
    kinds = {key: one.kind for key, one in features.items() if one.kind != "number"}
    for key in counter.by:
        if key not in ROLES and key not in kinds:
            raise ValueError(
                f"counters.{name}.by: {key!r} is none of {', '.join([*ROLES, *kinds])}; declare the column "
                "under features as kind id or ids"
            )
    if sum(kinds.get(key) == "ids" for key in counter.by) > 1:
        raise ValueError(f"counters.{name}.by: at most one key may be of kind ids")
