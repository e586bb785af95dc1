"""The one typed description of a run: checked before anything starts, saved with every output."""

import copy
import difflib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin

from pydantic import BaseModel, Field, ValidationError, model_validator

from llm_knowledge.errors import InputError
from llm_knowledge.files import write_text
from llm_knowledge.yaml_files import dump_yaml, parse_yaml, read_yaml
from trainer.config.features import FeaturesConfig
from trainer.config.levels import KNOWLEDGE_TABLES, LEVELS
from trainer.config.model import ModelConfig
from trainer.config.tables import HardwareConfig, Section, TablesConfig
from trainer.config.train import TrainConfig

Split = Literal["profile", "train", "valid", "test"]

Kind = TypeVar("Kind", bound=Section)
# Of fields: their values by name, or the texts of --set.
Changes = Mapping[str, Any] | Sequence[str]


class DataConfig(Section):
    """Which events are read, and how."""

    path: str = Field(
        description="Prepared dataset directory (the output of `llm4msr prepare …` or `simulate`)."
    )
    train_splits: list[Split] = Field(
        default=["profile", "train"],
        min_length=1,
        description="Splits that are trained on. Events of the profile window precede every cut-off, "
        "so they train the ids with the default vector in place of knowledge.",
    )
    labels: dict[str, Annotated[float, Field(gt=0)]] = Field(
        default={},
        description="Further labels that are trained beside `label`, names in the dataset's extra_labels, "
        "with their weight in the loss. Their order is that of the funnel (click, then purchase).",
    )
    streams: int = Field(
        default=8,
        ge=1,
        description="Parts that an epoch is cut into: a multiple of the number of ranks. A run can be "
        "continued on any number of ranks that divides it, and every row is still trained once.",
    )
    shuffle_buffer: int = Field(
        default=65_536, ge=1, description="Rows of a stream that are held and shuffled together."
    )
    workers: int | None = Field(
        default=None,
        ge=0,
        description="Threads per rank that read and encode; 0 reads in the training loop; null: 1 where "
        "the host has more cores than ranks, else 0. Batches and their order do not depend on it.",
    )
    prefetch_batches: int = Field(
        default=8, ge=1, description="Batches that the threads make ahead of the training loop."
    )


Stores = str | Annotated[list[str], Field(min_length=1)]


class KnowledgeConfig(Section):
    """Knowledge stores joined by key; null leaves a level out."""

    user: Stores | None = Field(
        default=None,
        description="Store with one vector per user; or a directory of dated stores, or a list of them: "
        "an event joins the newest whose cut-off lies before it.",
    )
    scenario: Stores | None = Field(
        default=None, description="Store with one vector per scenario; or dated ones, as for users."
    )
    item: str | None = Field(default=None, description="Store with one vector per item.")
    centre: bool = Field(
        default=True,
        description="Whether the mean over a store's rows is taken from its vectors. It is taken once, when "
        "the run begins, and kept with it; of dated stores the oldest's.",
    )
    other_dataset: bool = Field(
        default=False,
        description="Whether stores are joined that were made from another dataset: its ids must mean the "
        "same, and its events must not be later than those that join them.",
    )


class RunConfig(Section):
    """A whole run."""

    name: str = Field(
        min_length=1, pattern=r"^[\w.+-]+$", description="Names the arm in tables and reports."
    )
    output: str = Field(description="Run directory to create.")
    data: DataConfig
    knowledge: KnowledgeConfig = KnowledgeConfig()
    features: FeaturesConfig = FeaturesConfig()
    tables: TablesConfig = TablesConfig()
    hardware: HardwareConfig = HardwareConfig()
    model: ModelConfig = ModelConfig()
    train: TrainConfig = TrainConfig()

    @model_validator(mode="after")
    def _rows_are_given_once(self) -> "RunConfig":
        if self.tables.ids in ("zero_collision", "hash_zch") and self.hardware.sharding_group_size:
            raise ValueError(
                "hardware.sharding_group_size: groups would give the same row to different ids; set it to "
                "null, or tables.ids to vocabulary or hash"
            )
        if self.features.use and self.tables.ids == "hash_zch":
            raise ValueError(
                "features.use: not supported yet with tables.ids hash_zch; use zero_collision, which runs "
                "everywhere, or remove the features"
            )
        return self

    @model_validator(mode="after")
    def _knowledge_where_it_is_needed(self) -> "RunConfig":
        meta, stores = self.model.meta, self.knowledge
        named = [("sharding", table) for table in self.tables.sharding]
        for field, table in [*named, *(("kernels", table) for table in self.tables.kernels)]:
            level = KNOWLEDGE_TABLES.get(table)
            if level is not None and getattr(stores, level.name) is None:
                raise ValueError(
                    f"tables.{field}.{table}: there is no such table without knowledge.{level.name}"
                )
        if not meta.enabled:
            unread = [level.name for level in LEVELS if getattr(stores, level.name)]
            if unread:
                raise ValueError(
                    f"knowledge.{unread[0]} is given but model.meta.enabled is false, so it would be "
                    "ignored: enable the meta layers or remove the store"
                )
            return self
        needed = {
            "user": meta.reads("user") or "user" in meta.inputs or meta.item_knowledge == "match",
            "scenario": meta.reads("scenario") or "scenario" in meta.inputs,
            "item": meta.item_knowledge != "none",
        }
        for name, is_needed in needed.items():
            if is_needed and getattr(stores, name) is None:
                raise ValueError(
                    f"knowledge.{name} must name a store: model.meta uses {name} knowledge"
                )
            if not is_needed and getattr(stores, name) is not None:
                raise ValueError(
                    f"knowledge.{name} is given but nothing in model.meta uses it: remove it"
                )
        return self


def _set_field(tree: dict[str, Any], key: str, value: Any, source: str) -> None:
    """Puts a value where "section.field" says.

    Raises:
        InputError: The key is no such path, or leads through a value; `source` says where it stands.
    """
    if not isinstance(key, str) or not all(key.split(".")):
        raise InputError(f"{source}: write the key as section.field")
    *parents, leaf = key.split(".")
    for parent in parents:
        tree = tree.setdefault(parent, {})
        if not isinstance(tree, dict):
            raise InputError(f"{source}: {parent} was set to a value before")
    tree[leaf] = value


def parse_overrides(assignments: Sequence[str]) -> dict[str, Any]:
    """Turns ["a.b=1", …] into {"a": {"b": 1}}; values are read as YAML scalars or lists.

    Raises:
        InputError: If an assignment has no "=" or an empty key.
    """
    tree: dict[str, Any] = {}
    for assignment in assignments:
        key, separator, text = assignment.partition("=")
        if not separator or not all(key.split(".")):
            raise InputError(f"--set {assignment}: write it as --set section.field=value")
        source = f"--set {assignment}"
        _set_field(tree, key, parse_yaml(text, source, grouped_digits=True), source)
    return tree


def _tree_of(changes: Changes) -> dict[str, Any]:
    """Changes as a tree of sections, apart from the caller's objects."""
    if not isinstance(changes, Mapping):
        return parse_overrides(changes)
    tree: dict[str, Any] = {}
    for key, value in changes.items():
        plain = os.fspath(value) if isinstance(value, os.PathLike) else copy.deepcopy(value)
        _set_field(tree, key, plain, f"changes[{key!r}]")
    return tree


def _merge(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in changes.items():
        if isinstance(value, dict) and isinstance(merged.get(key), dict):
            merged[key] = _merge(merged[key], value)
        else:
            merged[key] = value
    return merged


def load_config(path: str | Path | None, changes: Changes = ()) -> RunConfig:
    """Reads a run's configuration and changes some of its fields.

    `load_config("run.yaml", {"train.epochs": 2, "tables": {"dim": 32}})` is what the command line does
    for `--config run.yaml --set train.epochs=2 --set tables.dim=32`.

    Args:
        path: YAML file; None starts from nothing but the changes.
        changes: Values by field, "section.field" or a section's name, a section's values replacing those
            fields only; or the texts of `--set`, "section.field=value", whose values are YAML.

    Returns:
        The configuration, checked as a whole.

    Raises:
        InputError: Names every wrong field with its value and what would be accepted.
    """
    return load_section(RunConfig, path, changes)


def load_section(model: type[Kind], path: str | Path | None, changes: Changes = ()) -> Kind:
    """Reads a YAML file, makes changes, checks everything.

    Args:
        model: What the file describes.
        path: YAML file; None starts from nothing but the changes.
        changes: As for `load_config`, made in their order.

    Raises:
        InputError: Names every wrong field with its value and what would be accepted.
    """
    values: Any = {}
    if path is not None:
        values = read_yaml(Path(path), grouped_digits=True) or {}
        if not isinstance(values, dict):
            raise InputError(
                f"{path}: a configuration is a mapping of sections, found {type(values).__name__}"
            )
    values = _merge(values, _tree_of(changes))
    try:
        return model.model_validate(values)
    except ValidationError as error:
        source = str(path) if path else "configuration"
        problems = [_explain(problem, model) for problem in error.errors()]
        raise InputError("\n".join(f"{source}: {problem}" for problem in problems)) from None


def save_config(config: BaseModel, path: Path) -> None:
    """Writes the resolved configuration as YAML, every field included; an older file is replaced whole."""
    write_text(path, dump_yaml(config.model_dump()))


def differences(
    old: dict[str, Any], new: dict[str, Any], sections: tuple[str, ...] | None = None
) -> list[str]:
    """Says in which fields two configurations differ, as "section.field: old, now new".

    Args:
        old: One, as a tree.
        new: The other.
        sections: Compare only these; None: all.
    """
    lines = []
    for key in dict.fromkeys([*old, *new]):
        before, after = old.get(key), new.get(key)
        if before == after or (sections is not None and key not in sections):
            continue
        if isinstance(before, dict) and isinstance(after, dict):
            lines += [f"{key}.{line}" for line in differences(before, after)]
        else:
            lines.append(f"{key}: {before}, now {after}")
    return lines


def _fields_at(location: tuple[Any, ...], model: type[Section]) -> list[str]:
    """Names of the fields of the section that holds `location`."""
    section: Any = model
    for part in location[:-1]:
        if get_origin(section) is dict:
            section = get_args(section)[1]
            continue
        field = section.model_fields.get(part) if hasattr(section, "model_fields") else None
        section = field.annotation if field else None
    return list(section.model_fields) if hasattr(section, "model_fields") else []


def _explain(problem: Any, model: type[Section]) -> str:
    location = tuple(problem["loc"])
    field = ".".join(map(str, location)) or "the run"
    if problem["type"] == "extra_forbidden":
        known = _fields_at(location, model)
        close = difflib.get_close_matches(str(location[-1]), known, n=1)
        hint = f"did you mean {close[0]}?" if close else f"known fields: {', '.join(known)}"
        return f"{field}: no such field; {hint}"
    if problem["type"] == "missing":
        return f"{field}: required and not given; add it to the file or pass --set {field}=VALUE"
    message = problem["msg"].removeprefix("Value error, ")
    value = (
        "" if isinstance(problem["input"], dict | BaseModel) else f" (found {problem['input']!r})"
    )
    return f"{field}: {message}{value}"
