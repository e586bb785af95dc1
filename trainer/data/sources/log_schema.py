"""What the columns of a user's own log mean: the model of the YAML file given as --schema."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BeforeValidator,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from llm_knowledge.yaml_files import read_yaml
from trainer.data.dataset import (
    SPLITS,
    Scenario,
    SplitName,
    StrictModel,
    explain_validation,
)
from trainer.data.sources.feature_schema import (
    FEATURE_NAME,
    RESERVED,
    BehaviourSequence,
    Counter,
    Feature,
    check_counter,
    check_sequences,
    check_source,
)

DEFAULT_FRACTIONS: dict[SplitName, float] = {
    "profile": 0.4,
    "train": 0.4,
    "valid": 0.1,
    "test": 0.1,
}


def _none_is_absent(value: object) -> object:
    return None if isinstance(value, str) and value == "none" else value


NameOrNone = Annotated[str | None, BeforeValidator(_none_is_absent)]


class Columns(StrictModel):
    """Names of the log's columns.

    A log without a clock has `order`, a column of integers that put a user's own events in order, in
    place of `timestamp`; or `timestamp: none` where the rows of the files are in order. A log of
    positives alone, to which negatives are sampled, may have `label: none`.
    """

    user_id: str = "user_id"
    item_id: str = "item_id"
    scenario_id: str = "scenario_id"
    timestamp: NameOrNone = "timestamp"
    order: str | None = None
    label: NameOrNone = "label"

    @model_validator(mode="after")
    def _check_columns(self) -> Columns:
        if self.order is not None:
            if "timestamp" in self.model_fields_set and self.timestamp is not None:
                raise ValueError("timestamp and order: give one, a clock or an order without one")
            self.timestamp = None
        return self


class Catalogue(StrictModel):
    """A Parquet file of items; `path` is relative to the schema file.

    With `unescape_html`, entities such as &amp; in titles and categories become what they stand for.
    With `since`, an item may have several rows, each valid for events strictly later; its title and
    categories are those of its first row, so that they tell of nothing later.
    """

    path: Path
    item_id: str = "item_id"
    title: str = "title"
    categories: str | None = None
    categories_separator: str = Field(default="|", min_length=1)
    unescape_html: bool = False
    since: str | None = None


class Users(StrictModel):
    """A Parquet file of users; `path` is relative to the schema file.

    With `since`, a user may have several rows, each valid for events strictly later.
    """

    path: Path
    user_id: str = "user_id"
    since: str | None = None


class LogNegatives(StrictModel):
    """Where the log has positives only: how negatives were sampled, or how they are to be.

    Attributes:
        rule: What was done to the log before, in words.
        per_positive: Number to sample for each positive of train, valid and test, see
            `trainer.data.sources.negatives`.
        seed: Of the sampling.
        power: Of an item's number of positives, 0 (all items alike) to 1.
        avoid: Whose items are never sampled: what the user had until then ("earlier"), or anywhere in
            the log, which tells what the user will have ("all").
    """

    rule: str | None = None
    per_positive: int | None = Field(default=None, ge=1, le=1_000)
    seed: int = Field(default=0, ge=0)
    power: float = Field(default=0.75, ge=0, le=1)
    avoid: Literal["earlier", "all"] = "earlier"

    @model_validator(mode="after")
    def _check_one(self) -> LogNegatives:
        if (self.rule is None) == (self.per_positive is None):
            raise ValueError("give rule, if negatives were sampled before, or per_positive")
        if self.rule is not None and self.model_fields_set != {"rule"}:
            raise ValueError("rule stands alone: the other fields are about negatives to sample")
        return self


class SplitChoice(StrictModel):
    """Split rule; give `boundaries` (three seconds since 1970) or `fractions`.

    `held_out_users` and `held_out_valid_users` are shares of users of whom nothing is trained, see
    `SplitInfo`.
    """

    rule: Literal["per_user_time", "global_time"] = "global_time"
    fractions: dict[SplitName, float] = Field(default=DEFAULT_FRACTIONS)
    boundaries: list[int] | None = None
    held_out_users: float = Field(default=0.0, ge=0, lt=1)
    held_out_valid_users: float = Field(default=0.0, ge=0, lt=1)

    @field_validator("fractions")
    @classmethod
    def _check_fractions(cls, value: dict[SplitName, float]) -> dict[SplitName, float]:
        # Written so that NaN, of which no comparison is true, is refused too.
        if set(value) != set(SPLITS) or not all(share > 0 for share in value.values()):
            raise ValueError("needs a share above 0 for each of profile, train, valid, test")
        if not abs(sum(value.values()) - 1) <= 1e-6:
            raise ValueError(f"shares must sum to 1, not {sum(value.values()):g}")
        return value

    @model_validator(mode="after")
    def _check_boundaries(self) -> SplitChoice:
        for name in ("held_out_users", "held_out_valid_users"):
            if getattr(self, name) and self.rule != "per_user_time":
                raise ValueError(
                    f"{name} goes with rule per_user_time only: under one global time their events "
                    "would lie before other users' training events"
                )
        if self.held_out_users + self.held_out_valid_users >= 1:
            raise ValueError("held_out_users and held_out_valid_users leave nobody to train on")
        if self.boundaries is not None:
            if self.rule != "global_time":
                raise ValueError("boundaries go with rule global_time only")
            if len(self.boundaries) != 3 or sorted(set(self.boundaries)) != self.boundaries:
                raise ValueError("boundaries must be three ascending seconds")
        return self


class LogSchema(StrictModel):
    """What a user's own log means: content of the YAML file given as --schema.

    `labels` names further labels and their columns, in the order of the funnel: {purchase: is_buy}.
    `features` names the columns that a model may read, `counters` counts and rates of the past,
    `sequences` what a user did before, `ignore` patterns of columns that nothing reads; any other column
    is named in a warning, and with `strict` refused.
    """

    name: str = "log"
    columns: Columns = Columns()
    labels: dict[Annotated[str, Field(pattern="^[a-z][a-z0-9_]*$")], str] = Field(
        default_factory=dict
    )
    features: dict[Annotated[str, Field(pattern=FEATURE_NAME)], Feature] = Field(
        default_factory=dict
    )
    counters: dict[Annotated[str, Field(pattern=FEATURE_NAME)], Counter] = Field(
        default_factory=dict
    )
    sequences: dict[Annotated[str, Field(pattern=FEATURE_NAME)], BehaviourSequence] = Field(
        default_factory=dict
    )
    ignore: list[str] = Field(default_factory=list)
    strict: bool = False
    timestamp_unit: Literal["seconds", "milliseconds", "microseconds", "nanoseconds"] = "seconds"
    catalogue: Catalogue | None = None
    users: Users | None = None
    scenarios: list[Scenario] = Field(min_length=1)
    split: SplitChoice = SplitChoice()
    positive_name: str = "liked"
    negative_name: str | None = "disliked"
    negatives: LogNegatives | None = None

    @property
    def tables(self) -> dict[str, Catalogue | Users]:
        """The tables beside the log."""
        named = {"catalogue": self.catalogue, "users": self.users}
        return {name: table for name, table in named.items() if table is not None}

    @property
    def samples_negatives(self) -> bool:
        """Whether negatives are to be sampled."""
        return self.negatives is not None and self.negatives.per_positive is not None

    @property
    def has_clock(self) -> bool:
        """Whether times of different users can be compared."""
        return self.columns.timestamp is not None

    @model_validator(mode="after")
    def _check_roles(self) -> LogSchema:
        role_of: dict[str, str] = {}
        columns = self.columns.model_dump(exclude_none=True)
        for role, name in [*columns.items(), *((f"labels.{k}", v) for k, v in self.labels.items())]:
            if name in role_of:
                raise ValueError(f"column {name!r} is given for {role_of[name]} and for {role}")
            role_of[name] = role
        return self

    @model_validator(mode="after")
    def _check_clock(self) -> LogSchema:
        if not self.has_clock:
            if "rule" not in self.split.model_fields_set:
                self.split = self.split.model_copy(update={"rule": "per_user_time"})
            if self.split.rule != "per_user_time" or self.split.boundaries is not None:
                raise ValueError(
                    "split: a log without a clock has no time that all users share; use rule per_user_time"
                )
            if "timestamp_unit" in self.model_fields_set:
                raise ValueError("timestamp_unit: the log has no clock")
        return self

    @model_validator(mode="after")
    def _check_negatives(self) -> LogSchema:
        if self.columns.label is None and not self.samples_negatives:
            raise ValueError("columns.label: none goes with negatives.per_positive only")
        if self.negatives is not None and "negative_name" not in self.model_fields_set:
            self.negative_name = None  # sampled rows are no dislikes
        return self

    @field_validator("features", "counters", "sequences")
    @classmethod
    def _check_names(cls, value: dict[str, Any]) -> dict[str, Any]:
        if taken := [name for name in value if name in RESERVED]:
            raise ValueError(f"{taken[0]}: the name is taken; call it otherwise")
        return value

    @model_validator(mode="after")
    def _check_features(self) -> LogSchema:
        given = {name: table.since is not None for name, table in self.tables.items()}
        for name, feature in self.features.items():
            check_source(name, feature, given)
        if any(given.values()) and not self.has_clock:
            raise ValueError(
                "since: the log has no clock, so no row of a table is earlier than an event"
            )
        for name, counter in self.counters.items():
            if name in self.features:
                raise ValueError(f"counters.{name}: is a feature too; call the counter otherwise")
            check_counter(name, counter, self.features, self.labels)
        for name in self.sequences:
            if name in self.features or name in self.counters:
                raise ValueError(f"sequences.{name}: is a feature or a counter too; rename it")
        check_sequences(self.sequences, self.features, self.labels, self.has_clock)
        if self.counters and not self.has_clock:
            raise ValueError("counters: the log has no clock, so nothing is earlier than an event")
        if (self.features or self.counters or self.sequences) and self.samples_negatives:
            raise ValueError(
                "features: not supported yet together with negatives.per_positive, whose rows would carry "
                "their positive's values; sample negatives before, or remove the features"
            )
        return self


def load_schema(file: Path, negatives: int | None = None) -> LogSchema:
    """Read the YAML description of a log.

    Args:
        file: the YAML file.
        negatives: to sample for each positive, in place of the file's `negatives.per_positive`.

    Raises:
        InputError: absent, not YAML, an unknown field, a wrong value.
    """
    try:
        content = read_yaml(file, "schema file")
        if negatives is not None and isinstance(content, dict):
            others = content.get("negatives")
            others = others if isinstance(others, dict) else {}
            content = content | {"negatives": others | {"per_positive": negatives}}
        return LogSchema.model_validate(content)
    except ValidationError as error:
        raise explain_validation(file, error) from None
