"""Configuration of features: how the model reads the columns that a dataset declares."""

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from trainer.config.tables import Section

# What the design has and the program not yet: refused by name instead of as a typing error.
NOT_YET = {"zero_collision": "ids"}


class FeatureUse(Section):
    """How one feature is read; what the kind of the feature does not know is refused."""

    dim: int | None = Field(
        default=None,
        ge=4,
        multiple_of=4,
        description="Width of the table, of a sequence that of its gaps; null: 8.",
    )
    pooling: Literal["sum", "mean", "attention"] | None = Field(
        default=None,
        description="Of a list (kind ids): sum or mean of its vectors, by its weights where it has "
        "some; null: sum. Of a sequence also attention, by the target; null: attention.",
    )
    fields: list[str] | None = Field(
        default=None,
        min_length=1,
        description="Of a sequence: the fields that are read; null: all.",
    )
    ids: Literal["vocabulary", "hash"] | None = Field(
        default=None,
        description="vocabulary: one row per id of the training splits; hash: `rows` rows for all ids; "
        "null: vocabulary.",
    )
    rows: int | None = Field(default=None, ge=2, description="Rows of the table when ids = hash.")
    min_count: int | None = Field(
        default=None,
        ge=1,
        description="Of a vocabulary: ids with fewer occurrences in the training splits share the row of "
        "unknown ids, which is trained by them; null: 1.",
    )
    transform: Literal["log"] | None = Field(
        default=None, description="Of a number x: log is sign(x) ln(1 + |x|)."
    )
    scale: Literal["standard"] | None = Field(
        default=None,
        description="Of a number, after the transform: standard takes the mean of the training splits "
        "away and divides by their standard deviation.",
    )
    buckets: int | None = Field(
        default=None,
        ge=2,
        description="Of a number: a table with one row per quantile bucket, boundaries from the training "
        "splits.",
    )
    cross: list[str] | None = Field(
        default=None,
        min_length=2,
        description="A new feature: one id per combination of features of kind id, or of user, item and "
        "scenario.",
    )
    into: Literal["user", "item", "scenario"] | None = Field(
        default=None,
        description="The block that the feature is added to, where gates and towers of a backbone look "
        "for users, items and scenarios; null: the block of all features.",
    )

    @field_validator("ids", mode="before")
    @classmethod
    def _not_yet(cls, value: Any) -> Any:
        if value in NOT_YET:
            raise ValueError(f"{value} is not supported yet for features; remove {NOT_YET[value]}")
        return value


FeatureName = Annotated[str, Field(pattern="^[a-z][a-z0-9_]*$")]


class FeaturesConfig(Section):
    """What the model reads beside user, item, scenario and history; nothing if `use` is empty."""

    width: int = Field(
        default=64,
        ge=4,
        multiple_of=4,
        description="Width of the block that features enter: the sum of one projection per feature. There "
        "is no such block while no feature goes into it.",
    )
    history: bool = Field(
        default=True,
        description="Whether the model reads the history of positives; false: its two blocks are 0.",
    )
    use: dict[FeatureName, FeatureUse] = Field(
        default={}, description="Features of the dataset by name, and crosses; see features.use."
    )
