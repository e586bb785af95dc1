"""What a run reads of a dataset's features: the schema's declaration with the run's options."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from llm_knowledge.errors import InputError
from trainer.config.features import FeaturesConfig, FeatureUse
from trainer.config.levels import ITEM, SCENARIO, USER
from trainer.data.dataset import DatasetInfo, FeatureInfo, SequenceInfo, sequence_column

DEFAULT_DIM = 8
NUMBER_WIDTH = 2  # the number, and whether it is missing
# What a cross may combine besides features of kind id.
COLUMNS_OF_ROLES = {level.name: level.id_column for level in (USER, ITEM, SCENARIO)}
Kind = Literal["id", "ids", "number", "cross", "sequence"]

# Options that a kind does not know, by kind; a number in buckets is a kind of its own here.
IGNORED_OPTIONS: dict[str, tuple[str, ...]] = {
    "id": ("pooling", "transform", "scale", "buckets", "cross", "fields"),
    "ids": ("transform", "scale", "buckets", "cross", "fields"),
    "number": ("dim", "pooling", "ids", "rows", "min_count", "cross", "fields"),
    "buckets": ("pooling", "ids", "rows", "min_count", "transform", "scale", "cross", "fields"),
    "cross": ("pooling", "transform", "scale", "buckets", "fields"),
    "sequence": ("ids", "rows", "min_count", "transform", "scale", "buckets", "cross"),
}


@dataclass(frozen=True)
class Feature:
    """One feature that the model reads.

    Attributes:
        name: Its name; `table_name` is that of its table and of its ids in a batch.
        kind: As declared, or cross, or sequence.
        columns: Columns of the events that it is made of; one, but for a cross and a sequence.
        use: The run's options.
        weights: Column of the weights of a list, or None.
        fields: Of a sequence: what each of its columns says.
    """

    name: str
    kind: Kind
    columns: tuple[str, ...]
    use: FeatureUse
    weights: str | None = None
    fields: tuple[str, ...] = ()

    @property
    def is_sequence(self) -> bool:
        """Whether it is a sequence, whose fields read tables of others."""
        return self.kind == "sequence"

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
        """Width of what the model reads of a sample, if it is no sequence."""
        return (self.use.dim or DEFAULT_DIM) if self.has_table else NUMBER_WIDTH


def resolve_features(config: FeaturesConfig, dataset: DatasetInfo) -> list[Feature]:
    """Checks the options of every feature against what it is.

    Returns:
        The features by name: the order of a configuration's keys, which a saved one need not keep, never
        decides which number or table is which.

    Raises:
        InputError: A feature of no column, or an option that would be ignored; says what to do.
    """
    return [
        _resolve_sequence(name, use, dataset.sequences[name], config)
        if name in dataset.sequences and use.cross is None
        else _resolve(name, use, dataset.features, list(dataset.sequences))
        for name, use in sorted(config.use.items())
    ]


def _resolve_sequence(
    name: str, use: FeatureUse, declared: SequenceInfo, config: FeaturesConfig
) -> Feature:
    where = f"features.use.{name}"
    _check_options(where, "sequence", use)
    fields = use.fields or list(declared.fields)
    for field in fields:
        if field not in declared.fields:
            raise InputError(
                f"{where}.fields: {field!r} is no field of the sequence; there are "
                f"{', '.join(declared.fields)}"
            )
        if field not in ("item", "gap") and field not in config.use:
            raise InputError(
                f"{where}: its field {field} reads the table of the feature {field}, which the run does not "
                f"read; add features.use.{field}, or leave it out by fields"
            )
    if len(set(fields)) < len(fields):
        raise InputError(f"{where}.fields: names a field twice")
    attention = (use.pooling or "attention") == "attention"
    if attention and set(fields) == {"gap"}:
        raise InputError(
            f"{where}.pooling: attention compares the target with items or features of the steps; a gap "
            "alone has no target: use sum or mean"
        )
    if use.dim is not None and "gap" not in fields:
        raise InputError(
            f"{where}.dim: is the width of the field gap, which is not read; remove it"
        )
    columns = tuple(sequence_column(name, field) for field in fields)
    return Feature(name, "sequence", columns, use, fields=tuple(fields))


def _resolve(
    name: str, use: FeatureUse, declared: Mapping[str, FeatureInfo], sequences: list[str]
) -> Feature:
    where = f"features.use.{name}"
    if use.cross is not None:
        columns = tuple(_part(where, part, declared) for part in use.cross)
        if name in declared or name in sequences:
            raise InputError(
                f"{where}: the dataset has a feature {name!r}; call the cross otherwise"
            )
        if len(set(columns)) < len(columns):
            raise InputError(f"{where}.cross: names a feature twice")
        _check_options(where, "cross", use)
        return Feature(name, "cross", columns, use)
    if name not in declared:
        there = ", ".join([*declared, *sequences]) or "none"
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
    if use.pooling == "attention" and kind != "sequence":
        raise InputError(f"{where}.pooling: attention is of sequences; use sum or mean of a list")
    named = {"buckets": "a number in buckets", "cross": "a cross", "sequence": "a sequence"}
    words = named.get(kind, f"kind {kind}")
    for option in IGNORED_OPTIONS[kind]:
        if getattr(use, option) is not None:
            raise InputError(f"{where}.{option}: would be ignored by {words}; remove it")
    if (use.ids == "hash") != (use.rows is not None):
        raise InputError(f"{where}: rows belongs to ids = hash: set both, or neither")
    if use.ids == "hash" and use.min_count is not None:
        raise InputError(
            f"{where}.min_count: belongs to a vocabulary, not to ids = hash; remove it"
        )
