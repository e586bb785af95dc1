"""What a run reads of a dataset's features: the schema's declaration with the run's options."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from llm_knowledge.errors import InputError
from trainer.config.features import FeaturesConfig, FeatureUse
from trainer.config.levels import ITEM, SCENARIO, USER
from trainer.data.dataset import DatasetInfo, FeatureInfo

DEFAULT_DIM = 8
NUMBER_WIDTH = 2  # the number, and whether it is missing
# What a cross may combine besides features of kind id.
COLUMNS_OF_ROLES = {level.name: level.id_column for level in (USER, ITEM, SCENARIO)}
Kind = Literal["id", "ids", "number", "cross"]

# Options that a kind does not know, by kind; a number in buckets is a kind of its own here.
IGNORED_OPTIONS: dict[str, tuple[str, ...]] = {
    "id": ("pooling", "transform", "scale", "buckets", "cross"),
    "ids": ("transform", "scale", "buckets", "cross"),
    "number": ("dim", "pooling", "ids", "rows", "min_count", "cross"),
    "buckets": ("pooling", "ids", "rows", "min_count", "transform", "scale", "cross"),
    "cross": ("pooling", "transform", "scale", "buckets"),
}


@dataclass(frozen=True)
class Feature:
    """One feature that the model reads.

    Attributes:
        name: Its name; `table_name` is that of its table and of its ids in a batch.
        kind: As declared, or cross.
        columns: Columns of the events that it is made of; one, but for a cross.
        use: The run's options.
        weights: Column of the weights of a list, or None.
    """

    name: str
    kind: Kind
    columns: tuple[str, ...]
    use: FeatureUse
    weights: str | None = None

    @property
    def table_name(self) -> str:
        """Name of the table."""
        return f"feature_{self.name}"

    @property
    def has_table(self) -> bool:
        """Whether it is looked up; else it is a number that enters as it is."""
        return self.kind != "number" or self.use.buckets is not None

    @property
    def width(self) -> int:
        """Width of what the model reads of a sample."""
        return (self.use.dim or DEFAULT_DIM) if self.has_table else NUMBER_WIDTH


def resolve_features(config: FeaturesConfig, dataset: DatasetInfo) -> list[Feature]:
    """Checks the options of every feature against what it is.

    Returns:
        The features by name: the order of a configuration's keys, which a saved one need not keep, never
        decides which number or table is which.

    Raises:
        InputError: A feature of no column, or an option that would be ignored; says what to do.
    """
    return [_resolve(name, use, dataset.features) for name, use in sorted(config.use.items())]


def _resolve(name: str, use: FeatureUse, declared: Mapping[str, FeatureInfo]) -> Feature:
    where = f"features.use.{name}"
    if use.cross is not None:
        columns = tuple(_part(where, part, declared) for part in use.cross)
        if name in declared:
            raise InputError(
                f"{where}: the dataset has a feature {name!r}; call the cross otherwise"
            )
        if len(set(columns)) < len(columns):
            raise InputError(f"{where}.cross: names a feature twice")
        _check_options(where, "cross", use)
        return Feature(name, "cross", columns, use)
    if name not in declared:
        there = ", ".join(declared) or "none"
        raise InputError(
            f"{where}: the dataset has no feature {name!r} (there: {there}); declare the column under "
            "features in the schema and prepare the data again, or remove it"
        )
    feature = declared[name]
    bucketed = feature.kind == "number" and use.buckets is not None
    _check_options(where, "buckets" if bucketed else feature.kind, use)
    weights = f"weights_{name}" if feature.weights is not None else None
    return Feature(name, feature.kind, (f"feature_{name}",), use, weights)


def _part(where: str, part: str, declared: Mapping[str, FeatureInfo]) -> str:
    if part in COLUMNS_OF_ROLES:
        return COLUMNS_OF_ROLES[part]
    if part not in declared or declared[part].kind != "id":
        ids = [name for name, declaration in declared.items() if declaration.kind == "id"]
        raise InputError(
            f"{where}.cross: {part!r} is not a feature of kind id; there are "
            f"{', '.join([*COLUMNS_OF_ROLES, *ids])}"
        )
    return f"feature_{part}"


def _check_options(where: str, kind: str, use: FeatureUse) -> None:
    words = {"buckets": "a number in buckets", "cross": "a cross"}.get(kind, f"kind {kind}")
    for option in IGNORED_OPTIONS[kind]:
        if getattr(use, option) is not None:
            raise InputError(f"{where}.{option}: would be ignored by {words}; remove it")
    if (use.ids == "hash") != (use.rows is not None):
        raise InputError(f"{where}: rows belongs to ids = hash: set both, or neither")
    if use.ids == "hash" and use.min_count is not None:
        raise InputError(
            f"{where}.min_count: belongs to a vocabulary, not to ids = hash; remove it"
        )
