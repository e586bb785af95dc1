"""The one typed description of a run: checked before anything starts, saved with every output."""

import difflib
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from llm_knowledge.errors import InputError

Split = Literal["profile", "train", "valid", "test"]


Sharding = Literal[
    "row_wise",
    "table_wise",
    "column_wise",
    "table_row_wise",
    "grid_shard",
    "data_parallel",
    "planner",
]
Kernel = Literal["fused", "uvm", "uvm_caching", "key_value"]
TableName = Literal["user", "item", "user_knowledge", "item_knowledge"]


Backbone = Literal[
    "shared_bottom",
    "mmoe",
    "ple",
    "star",
    "aitm",
    "sar_net",
    "m2m",
    "ada_sparse",
    "adapt_dhm",
    "epnet",
    "ppnet",
    "pepnet",
    "hamur",
    "m3oe",
    "hinet",
    "dnn",
    "dcnv2",
    "deepfm",
]


class Section(BaseModel):
    """Base of all sections: unknown keys and silent conversions are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


Kind = TypeVar("Kind", bound=Section)


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
    workers: int = Field(
        default=1,
        ge=0,
        description="Threads per rank that read and encode; 0 reads in the training loop. Batches and "
        "their order do not depend on it.",
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


class ScheduleConfig(Section):
    """How a learning rate moves over a run; the rate it belongs to is its peak."""

    shape: Literal["constant", "linear", "cosine"] = Field(
        default="constant", description="From the end of the warm-up to the last step."
    )
    warmup_steps: int = Field(
        default=0,
        ge=0,
        description="Steps of a linear rise from 0; the last of them is at the peak.",
    )
    final: float = Field(
        default=0.0, ge=0, le=1, description="Where linear and cosine end, as a share of the peak."
    )


class ZeroCollisionConfig(Section):
    """Rows that are given to ids while training: no two ids share one.

    Row 0 of a table stands for all ids without a row of their own.
    """

    user_rows: int | None = Field(
        default=None,
        ge=2,
        description="Rows of the user table; rounded up to a multiple of data.streams.",
    )
    item_rows: int | None = Field(
        default=None, ge=2, description="Rows of the item table; likewise."
    )
    eviction: Literal["lfu", "lru", "distance_lfu", "ttl"] = Field(
        default="lru",
        description="Whose row is taken where new ids find none. lfu: the least often seen; lru: not "
        "seen for longest; distance_lfu: least count / (steps since seen + 1) ^ distance_decay; ttl: "
        "nobody's before time_to_live.",
    )
    admission: int = Field(
        default=1, ge=1, le=255, description="Occurrences before an id gets a row."
    )
    time_to_live: int | None = Field(
        default=None,
        ge=1,
        description="Steps after which an id that was not seen loses its row, whatever the eviction.",
    )
    eviction_interval: int = Field(default=1, ge=1, description="Steps between evictions.")
    distance_decay: float = Field(default=1.0, gt=0, description="Exponent of distance_lfu.")
    hours: int | None = Field(
        default=None,
        ge=1,
        description="Of ids = hash_zch only, which takes from here nothing else but the rows: hours by "
        "the clock that an unseen id keeps its row; null for ever, a full table then takes no new id.",
    )

    @model_validator(mode="after")
    def _ttl_needs_a_time(self) -> "ZeroCollisionConfig":
        if self.eviction == "ttl" and self.time_to_live is None:
            raise ValueError("eviction = ttl needs time_to_live")
        return self


class TablesConfig(Section):
    """Sharded id tables."""

    dim: int = Field(
        default=16, ge=4, multiple_of=4, description="Width of user, item and scenario embeddings."
    )
    ids: Literal["vocabulary", "hash", "zero_collision", "hash_zch"] = Field(
        default="vocabulary",
        description="vocabulary: one row per id seen in training; hash: `hash_rows` rows for all ids; "
        "zero_collision: a fixed number of rows, given to ids while training and taken back; "
        "hash_zch: the same by torchrec's CUDA kernel, not measured.",
    )
    hash_rows: int | None = Field(default=None, ge=2, description="Rows per table when ids = hash.")
    zero_collision: ZeroCollisionConfig = ZeroCollisionConfig()
    optimizer: Literal[
        "sgd", "adagrad", "rowwise_adagrad", "adam", "partial_rowwise_adam", "lamb"
    ] = Field(
        default="rowwise_adagrad",
        description="Optimizer fused into the backward pass of the tables; the last three on CUDA only.",
    )
    learning_rate: float = Field(default=0.05, gt=0, description="Step size of the tables.")
    schedule: ScheduleConfig = ScheduleConfig()
    weight_decay: float = Field(
        default=0.0,
        ge=0,
        description="Decoupled weight decay of the rows that a step touches. On CUDA only, and not of sgd "
        "and adagrad: what would be ignored is refused.",
    )
    betas: list[Annotated[float, Field(ge=0, lt=1)]] = Field(
        default=[0.9, 0.999],
        min_length=2,
        max_length=2,
        description="Decay of the two moments of adam, partial_rowwise_adam and lamb.",
    )
    init_std: float = Field(default=0.01, gt=0, description="Standard deviation of initial rows.")
    sharding: dict[TableName, Sharding] = Field(
        default={},
        description="Per table; tables that are not named are row_wise. data_parallel: every rank keeps "
        "all rows. planner: torchrec's planner chooses. The item table holds sequences: row_wise, "
        "table_wise, column_wise, planner, and on GPUs data_parallel.",
    )
    kernels: dict[TableName, Kernel] = Field(
        default={},
        description="Where rows lie, per table; fused (the device's memory) if not named. On GPUs also "
        "uvm (the host's memory), uvm_caching (the same with a cache on the GPU), key_value (SSD with a "
        "cache on the GPU; only trained tables, with optimizer rowwise_adagrad).",
    )
    cache_load_factor: float = Field(
        default=0.2,
        gt=0,
        le=1,
        description="Share of a uvm_caching table's rows that the GPU caches.",
    )
    key_value_directory: str | None = Field(
        default=None, description="Folder on SSD for key_value tables."
    )

    @model_validator(mode="after")
    def _hash_needs_rows(self) -> "TablesConfig":
        if (self.ids == "hash") != (self.hash_rows is not None):
            raise ValueError("hash_rows belongs to ids = hash: set both, or neither")
        return self

    @model_validator(mode="after")
    def _zero_collision_has_rows_to_give(self) -> "TablesConfig":
        options, wanted = self.zero_collision, self.ids in ("zero_collision", "hash_zch")
        if self.ids == "hash_zch":
            for name, value in options.model_dump(
                exclude={"user_rows", "item_rows", "hours"}
            ).items():
                if value != ZeroCollisionConfig.model_fields[name].default:
                    raise ValueError(
                        f"zero_collision.{name} would be ignored by hash_zch: remove it"
                    )
        if self.ids == "zero_collision" and options.hours is not None:
            raise ValueError("zero_collision.hours belongs to hash_zch; use time_to_live, in steps")
        if wanted and (options.user_rows is None or options.item_rows is None):
            raise ValueError(
                f"ids = {self.ids} needs zero_collision.user_rows and zero_collision.item_rows"
            )
        if not wanted and options != ZeroCollisionConfig():
            raise ValueError(f"zero_collision would be ignored by ids = {self.ids}: remove it")
        for table in ("user", "item") if wanted else ():
            kind = self.sharding.get(table, "row_wise")
            if self.ids == "hash_zch" and kind != "row_wise":
                raise ValueError(
                    f"sharding.{table}: {kind} is not possible with hash_zch; use row_wise"
                )
            if kind not in ("row_wise", "table_wise", "column_wise"):
                raise ValueError(
                    f"sharding.{table}: {kind} is not possible where rows change hands; use row_wise, "
                    "table_wise or column_wise"
                )
            if (kernel := self.kernels.get(table, "fused")) not in ("fused", "uvm"):
                raise ValueError(
                    f"kernels.{table}: {kernel} keeps copies of rows, which would outlive a change of "
                    "hands; use fused or uvm"
                )
        return self

    @model_validator(mode="after")
    def _key_value_has_its_needs(self) -> "TablesConfig":
        named = [name for name, kernel in self.kernels.items() if kernel == "key_value"]
        if bool(named) != (self.key_value_directory is not None):
            raise ValueError(
                "key_value_directory belongs to key_value kernels: set both, or neither"
            )
        if frozen := [name for name in named if name.endswith("_knowledge")]:
            raise ValueError(
                f"kernels.{frozen[0]}: key_value tables need rowwise_adagrad, a frozen table has no "
                "optimizer; use uvm_caching"
            )
        if named and self.optimizer != "rowwise_adagrad":
            raise ValueError(
                f"kernels.{named[0]}: key_value tables need optimizer rowwise_adagrad, not {self.optimizer}"
            )
        return self

    @model_validator(mode="after")
    def _sequences_shard_in_few_ways(self) -> "TablesConfig":
        kind = self.sharding.get("item")
        if kind in ("table_row_wise", "grid_shard"):
            raise ValueError(
                f"sharding.item: {kind} is not possible for a table of sequences; use row_wise, "
                "table_wise, column_wise or planner"
            )
        return self


class HardwareConfig(Section):
    """What the planner believes of the cluster; sizes left null are read off the machine.

    The default bandwidths are the data sheet's of an H100 SXM host: HBM3, NVLink 4, one 400 Gb/s port
    per GPU, PCIe 5 x16 and a PCIe 4 SSD.
    """

    device_memory_gib: float | None = Field(default=None, gt=0, description="Memory of a GPU.")
    host_memory_gib: float | None = Field(default=None, gt=0, description="Memory of a host.")
    device_bandwidth_gbs: float = Field(default=3350, gt=0, description="GB/s of a GPU's memory.")
    host_bandwidth_gbs: float = Field(default=300, gt=0, description="GB/s of a host's memory.")
    intra_host_gbs: float = Field(
        default=450, gt=0, description="GB/s between GPUs of a host, per GPU."
    )
    inter_host_gbs: float = Field(default=50, gt=0, description="GB/s between hosts, per GPU.")
    host_to_device_gbs: float = Field(
        default=64, gt=0, description="GB/s between a GPU and its host's memory (uvm)."
    )
    ssd_gib: float | None = Field(
        default=None, gt=0, description="Space on SSD per host for key_value tables."
    )
    ssd_gbs: float = Field(default=7, gt=0, description="GB/s of a host's SSD.")
    sharding_group_size: int | None = Field(
        default=None,
        ge=1,
        description="Shard tables over groups of so many ranks, each with a copy that is averaged after "
        "every step (2-D parallelism); null: over all ranks. On GPUs only.",
    )
    reserved: float = Field(
        default=0.15,
        ge=0,
        lt=1,
        description="Share of memory that tables leave to everything else.",
    )


class MetaConfig(Section):
    """Hierarchical meta networks: how knowledge becomes layers.

    `form = residual` starts as the plain backbone; `form = linear` is the paper's linear generator.
    """

    enabled: bool = Field(default=False, description="Put meta layers on the backbone.")
    form: Literal["residual", "linear"] = Field(
        default="residual",
        description="residual: h + W(z)h + b(z) with zero-initialised W, b; linear: act(W(z)h + b(z)).",
    )
    kind: Literal["low_rank", "core", "gate"] = Field(
        default="low_rank",
        description="low_rank: W(z) is a sum of `rank` matrices; core: a generated core_width x core_width "
        "matrix between two shared ones, for wide layers; gate: a generated diagonal on a shared matrix.",
    )
    core_width: int = Field(default=16, ge=1, description="Width of the core of kind = core.")
    rank: int = Field(
        default=8, ge=1, description="Width of z, the bottleneck that every vector passes."
    )
    adapter_hidden: int | None = Field(
        default=None,
        ge=1,
        description="Hidden width between a vector and z; null projects directly.",
    )
    user_layers: int = Field(default=1, ge=0, description="User-level meta layers at the bottom.")
    scenario_layers: int = Field(
        default=1, ge=0, description="Scenario-level meta layers in parallel."
    )
    scenario_width: int = Field(default=32, ge=1, description="Width of the parallel branch.")
    fusion: Literal["sum", "concat", "gate"] = Field(
        default="sum",
        description="How the parallel branch meets the backbone. sum: of logits; concat: a small network "
        "of the branch and the backbone's logits, added; gate: the branch also scales these logits.",
    )
    alignment: float = Field(
        default=0.0,
        ge=0,
        description="Weight of a loss that draws z of a user to z of the scenarios with positive events.",
    )
    noise: float = Field(
        default=0.1, ge=0, description="Length of noise on user vectors, their own being 1."
    )
    dropout: float = Field(
        default=0.2,
        ge=0,
        lt=1,
        description="Share of vectors replaced by the default while training.",
    )
    item_knowledge: Literal["none", "input", "match"] = Field(
        default="none",
        description="input: item vectors enter the bottom input; match: also their match with user vectors.",
    )
    match_width: int = Field(
        default=16, ge=1, description="Width of the projections that are matched."
    )
    match_layers: list[Literal["user", "scenario"]] = Field(
        default=[],
        max_length=2,
        description="Levels that generate a meta layer on the match.",
    )
    inputs: list[Literal["user", "scenario"]] = Field(
        default=[],
        max_length=2,
        description="Levels whose vectors also enter the bottom input, projected onto the embedding of "
        "the user or scenario: knowledge as a plain feature, without a generated layer.",
    )
    strategy: Literal["auto", "fused", "grouped", "reference"] = Field(
        default="auto", description="Implementation of the meta-layer op."
    )

    def reads(self, level: Literal["user", "scenario"]) -> bool:
        """Whether a generated layer or the alignment reads the code of this level."""
        layers = self.user_layers if level == "user" else self.scenario_layers
        return layers > 0 or level in self.match_layers or self.alignment > 0

    @model_validator(mode="after")
    def _match_layers_need_the_match(self) -> "MetaConfig":
        if self.match_layers and self.item_knowledge != "match":
            raise ValueError(
                "match_layers act on the match: set item_knowledge to match, or match_layers to []"
            )
        for field in ("match_layers", "inputs"):
            if len(set(getattr(self, field))) < len(getattr(self, field)):
                raise ValueError(f"{field}: name a level once")
        return self


class ModelConfig(Section):
    """The backbone, and what is put on it."""

    backbone: Backbone = Field(default="star", description="Multi-scenario backbone.")
    hidden: list[Annotated[int, Field(ge=1)]] = Field(
        default=[64, 32], min_length=1, description="Widths of the backbone's layers."
    )
    dropout: float = Field(default=0.1, ge=0, lt=1, description="Dropout in the backbone.")
    meta: MetaConfig = MetaConfig()


class TrainConfig(Section):
    """The loop."""

    global_batch_size: int = Field(
        default=1024, ge=1, description="Samples per step over all ranks."
    )
    epochs: int = Field(default=8, ge=1, description="Passes over the training splits, at most.")
    learning_rate: float = Field(
        default=1e-3, gt=0, description="Adam step size of dense parameters."
    )
    meta_learning_rate: float = Field(
        default=1e-3, gt=0, description="Adam step size of meta networks."
    )
    schedule: ScheduleConfig = ScheduleConfig()
    meta_schedule: ScheduleConfig = ScheduleConfig()
    weight_decay: float = Field(
        default=1e-5, ge=0, description="Decoupled weight decay of dense parameters."
    )
    eval_every: int = Field(
        default=80, ge=1, description="Steps between evaluations on the valid split."
    )
    patience: int = Field(
        default=3, ge=1, description="Evaluations without improvement before stopping."
    )
    checkpoint_every: int = Field(default=80, ge=1, description="Steps between checkpoints.")
    checkpoint_async: bool = Field(
        default=False,
        description="Write checkpoints while training goes on, from a copy in host memory.",
    )
    keep_checkpoints: int = Field(default=1, ge=1, description="Newest checkpoints that are kept.")
    keep_best: int = Field(
        default=1, ge=1, description="Checkpoints of the best evaluations that are kept as well."
    )
    start_from: str | None = Field(
        default=None,
        description="Run (its best checkpoint) or checkpoint that a new run starts from; rows follow "
        "their ids, what is new starts fresh. `--resume` is something else: it continues one run.",
    )
    log_every: int = Field(default=10, ge=1, description="Steps between lines of metrics.jsonl.")
    continue_from: str | None = Field(
        default=None,
        description="Run directory to go on from, on data that later events were appended to: its best "
        "checkpoint is the beginning, and only rows that it has not seen are trained on.",
    )
    seed: int = Field(
        default=0, ge=0, description="Seeds initialisation, shuffling, dropout and noise."
    )
    timeout_seconds: int = Field(
        default=600, ge=1, description="A collective that waits longer fails."
    )

    @model_validator(mode="after")
    def _one_beginning(self) -> "TrainConfig":
        if self.start_from is not None and self.continue_from is not None:
            raise ValueError(
                "start_from and continue_from: a run begins in one way, set one of them"
            )
        return self


class RunConfig(Section):
    """A whole run."""

    name: str = Field(
        min_length=1, pattern=r"^[\w.+-]+$", description="Names the arm in tables and reports."
    )
    output: str = Field(description="Run directory to create.")
    data: DataConfig
    knowledge: KnowledgeConfig = KnowledgeConfig()
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
        return self

    @model_validator(mode="after")
    def _knowledge_where_it_is_needed(self) -> "RunConfig":
        meta, stores = self.model.meta, self.knowledge
        named = [("sharding", table) for table in self.tables.sharding]
        for field, table in [*named, *(("kernels", table) for table in self.tables.kernels)]:
            level = table.removesuffix("_knowledge")
            if level != table and getattr(stores, level) is None:
                raise ValueError(
                    f"tables.{field}.{table}: there is no such table without knowledge.{level}"
                )
        if not meta.enabled:
            given = [level for level in ("user", "scenario", "item") if getattr(stores, level)]
            if given:
                raise ValueError(
                    f"knowledge.{given[0]} is given but model.meta.enabled is false, so it would be ignored: "
                    "enable the meta layers or remove the store"
                )
            return self
        needed = {
            "user": meta.reads("user") or "user" in meta.inputs or meta.item_knowledge == "match",
            "scenario": meta.reads("scenario") or "scenario" in meta.inputs,
            "item": meta.item_knowledge != "none",
        }
        for level, is_needed in needed.items():
            if is_needed and getattr(stores, level) is None:
                raise ValueError(
                    f"knowledge.{level} must name a store: model.meta uses {level} knowledge"
                )
            if not is_needed and getattr(stores, level) is not None:
                raise ValueError(
                    f"knowledge.{level} is given but nothing in model.meta uses it: remove it"
                )
        return self


def parse_overrides(assignments: list[str]) -> dict[str, Any]:
    """Turns ["a.b=1", …] into {"a": {"b": 1}}; values are read as YAML scalars or lists.

    Raises:
        InputError: If an assignment has no "=" or an empty key.
    """
    tree: dict[str, Any] = {}
    for assignment in assignments:
        key, separator, text = assignment.partition("=")
        if not separator or not all(key.split(".")):
            raise InputError(f"--set {assignment}: write it as --set section.field=value")
        *parents, leaf = key.split(".")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
            if not isinstance(node, dict):
                raise InputError(f"--set {assignment}: {parent} was set to a value before")
        try:
            node[leaf] = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise InputError(
                f"--set {assignment}: the value is not valid YAML ({error})"
            ) from error
    return tree


def _merge(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in changes.items():
        if isinstance(value, dict) and isinstance(merged.get(key), dict):
            merged[key] = _merge(merged[key], value)
        else:
            merged[key] = value
    return merged


def load_config(path: Path | None, overrides: list[str] | None = None) -> RunConfig:
    """Reads a run's configuration, see `load_section`."""
    return load_section(RunConfig, path, overrides)


def load_section(model: type[Kind], path: Path | None, overrides: list[str] | None = None) -> Kind:
    """Reads a YAML file, applies overrides, checks everything.

    Args:
        model: What the file describes.
        path: YAML file; None starts from nothing but the overrides.
        overrides: "section.field=value" assignments, applied in order.

    Raises:
        InputError: Names every wrong field with its value and what would be accepted.
    """
    values: Any = {}
    if path is not None:
        try:
            values = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
        except OSError as error:
            raise InputError(f"{path}: cannot read the configuration ({error.strerror})") from error
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise InputError(f"{path}: not valid YAML: {error}") from error
        if not isinstance(values, dict):
            raise InputError(
                f"{path}: a configuration is a mapping of sections, found {type(values).__name__}"
            )
    values = _merge(values, parse_overrides(overrides or []))
    try:
        return model.model_validate(values)
    except ValidationError as error:
        source = str(path) if path else "configuration"
        problems = [_explain(problem, model) for problem in error.errors()]
        raise InputError("\n".join(f"{source}: {problem}" for problem in problems)) from None


def save_config(config: BaseModel, path: Path) -> None:
    """Writes the resolved configuration as YAML, every field included."""
    path.write_text(yaml.safe_dump(config.model_dump(), sort_keys=False), encoding="utf-8")


def differences(
    old: dict[str, Any], new: dict[str, Any], sections: tuple[str, ...] | None = None
) -> list[str]:
    """Says in which fields two configurations differ, as "section.field: old, now new".

    Args:
        old: One, as a tree.
        new: The other.
        sections: Compare only these; None: all.
    """
    found = []
    for key in dict.fromkeys([*old, *new]):
        before, after = old.get(key), new.get(key)
        if before == after or (sections is not None and key not in sections):
            continue
        if isinstance(before, dict) and isinstance(after, dict):
            found += [f"{key}.{line}" for line in differences(before, after)]
        else:
            found.append(f"{key}: {before}, now {after}")
    return found


def _fields_at(location: tuple[Any, ...], model: type[Section]) -> list[str]:
    """Names of the fields of the section that holds `location`."""
    section: Any = model
    for part in location[:-1]:
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
