"""Configuration of the id tables and of the cluster that they are placed on."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from trainer.config.levels import KNOWLEDGE_TABLES

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
# Of ids and of vectors, by `trainer.config.levels.TABLE_LEVELS`.
TableName = Literal["user", "item", "user_knowledge", "item_knowledge"]


class Section(BaseModel):
    """Base of all sections: unknown keys and silent conversions are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


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
        options, assigned = self.zero_collision, self.ids in ("zero_collision", "hash_zch")
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
        if assigned and (options.user_rows is None or options.item_rows is None):
            raise ValueError(
                f"ids = {self.ids} needs zero_collision.user_rows and zero_collision.item_rows"
            )
        if not assigned and options != ZeroCollisionConfig():
            raise ValueError(f"zero_collision would be ignored by ids = {self.ids}: remove it")
        for table in ("user", "item") if assigned else ():
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
        if frozen := [name for name in named if name in KNOWLEDGE_TABLES]:
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
