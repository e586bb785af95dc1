"""What the columns of a user's own log mean: the model of the YAML file given as --schema."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, ValidationError, field_validator, model_validator

from llm_knowledge.errors import InputError
from trainer.data.dataset import (
    SPLITS,
    Negatives,
    Scenario,
    SplitName,
    StrictModel,
    explain_validation,
)

DEFAULT_FRACTIONS: dict[SplitName, float] = {
    "profile": 0.4,
    "train": 0.4,
    "valid": 0.1,
    "test": 0.1,
}


class Columns(StrictModel):
    """Names of the log's columns."""

    user_id: str = "user_id"
    item_id: str = "item_id"
    scenario_id: str = "scenario_id"
    timestamp: str = "timestamp"
    label: str = "label"


class Catalogue(StrictModel):
    """A Parquet file of items; `path` is relative to the schema file."""

    path: Path
    item_id: str = "item_id"
    title: str = "title"
    categories: str | None = None
    categories_separator: str = "|"


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
        if set(value) != set(SPLITS) or min(value.values()) <= 0:
            raise ValueError("needs a share above 0 for each of profile, train, valid, test")
        if abs(sum(value.values()) - 1) > 1e-6:
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
    """

    name: str = "log"
    columns: Columns = Columns()
    labels: dict[Annotated[str, Field(pattern="^[a-z][a-z0-9_]*$")], str] = Field(
        default_factory=dict
    )
    timestamp_unit: Literal["seconds", "milliseconds", "microseconds"] = "seconds"
    catalogue: Catalogue | None = None
    scenarios: list[Scenario]
    split: SplitChoice = SplitChoice()
    positive_name: str = "liked"
    negative_name: str | None = "disliked"
    negatives: Negatives | None = None


def load_schema(file: Path) -> LogSchema:
    """Read the YAML description of a log.

    Raises:
        InputError: absent, not YAML, an unknown field, a wrong value.
    """
    import yaml

    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
        return LogSchema.model_validate(content)
    except FileNotFoundError:
        raise InputError(f"{file}: no such schema file") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(f"{file}: cannot be read as YAML: {error}") from None
    except ValidationError as error:
        raise explain_validation(file, error) from None
