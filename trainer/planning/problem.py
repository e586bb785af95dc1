"""What `llm4msr plan` is asked: tables, of a run's configuration or of a file, and a cluster."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, model_validator
from torch import nn

from embeddings.placement import Placement, PlanError, check_groups
from embeddings.sharding import Hardware
from embeddings.tables import Table
from llm_knowledge.errors import InputError
from llm_knowledge.yaml_files import read_yaml
from trainer.config.run import load_config, parse_overrides
from trainer.config.tables import HardwareConfig, Kernel, Section, Sharding
from trainer.run.hardware import Cluster, absent_cluster


@dataclass(frozen=True)
class Problem:
    """Tables, what is wanted of them, and the cluster.

    Attributes:
        tables: All tables.
        placements: By table.
        optimizer: Of the tables.
        batch: Samples per rank.
        dense_parameters: Number of parameters outside of tables.
        hardware: What tables are sharded over: the cluster, or one of `copies` groups of its ranks.
        cluster: All of it.
    """

    tables: list[Table]
    placements: dict[str, Placement]
    optimizer: str
    batch: int
    dense_parameters: int
    hardware: Hardware
    cluster: Hardware

    @property
    def copies(self) -> int:
        """Groups of ranks that hold copies of all tables."""
        return self.cluster.ranks // self.hardware.ranks


class TableEntry(Section):
    """One table of the file, or `count` alike."""

    name: str = Field(min_length=1, pattern=r"^\w+$")
    count: int = Field(default=1, ge=1)
    rows: int = Field(ge=1)
    dim: int = Field(ge=4, multiple_of=4)
    ids_per_sample: list[Annotated[float, Field(gt=0)]] = Field(default=[1.0], min_length=1)
    kind: Literal["pooled", "sequence"] = "pooled"
    dtype: Literal["float32", "float16"] = "float32"
    frozen: bool = False
    kernel: Kernel = "fused"
    cache_load_factor: float = Field(default=0.2, gt=0, le=1)


class TablesFile(Section):
    """The file: what `--tables` names."""

    tables: list[TableEntry] = Field(min_length=1)
    sharding: dict[str, Sharding] = Field(default={})
    optimizer: Literal[
        "sgd", "adagrad", "rowwise_adagrad", "adam", "partial_rowwise_adam", "lamb"
    ] = "rowwise_adagrad"
    batch_per_rank: int = Field(ge=1)
    dense_parameters: int = Field(default=0, ge=0)
    hardware: HardwareConfig = HardwareConfig()

    @model_validator(mode="after")
    def _names(self) -> "TablesFile":
        names = [table.name for entry in self.tables for table in _tables(entry)]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"tables: there are two tables {twice[0]}")
        if reserved := [name for name in names if hasattr(nn.ModuleDict, name)]:
            raise ValueError(
                f"tables: torch has no room for a table named {reserved[0]}; rename it"
            )
        entries = {entry.name for entry in self.tables}
        if unknown := sorted(set(self.sharding) - set(names) - entries):
            raise ValueError(
                f"sharding.{unknown[0]}: there is no such table; known: {', '.join(sorted(entries))}"
            )
        return self


def _tables(entry: TableEntry) -> list[Table]:
    names = [entry.name] if entry.count == 1 else [f"{entry.name}_{i}" for i in range(entry.count)]
    return [
        Table(
            name,
            entry.rows,
            entry.dim,
            tuple(f"{name}_{feature}" for feature in range(len(entry.ids_per_sample))),
            bytes_per_value=2 if entry.dtype == "float16" else 4,
            sequence=entry.kind == "sequence",
            ids_per_sample=tuple(entry.ids_per_sample),
            frozen=entry.frozen,
        )
        for name in names
    ]


def problem_of_file(
    path: Path, overrides: list[str], cluster: Cluster, batch: int | None, hbm_gib: float | None
) -> Problem:
    """Reads tables from a file; tables without a sharding are left to the planner.

    Raises:
        InputError: If the file is not what it should be; every wrong field is named.
    """
    values: Any = read_yaml(path, grouped_digits=True)
    if not isinstance(values, dict):
        raise InputError(f"{path}: a mapping with the key tables is needed")
    for key, value in parse_overrides(overrides).items():
        old = values.get(key)
        values[key] = old | value if isinstance(old, dict) and isinstance(value, dict) else value
    try:
        given = TablesFile.model_validate(values)
    except ValidationError as error:
        lines = [
            f"{path}: {'.'.join(map(str, problem['loc']))}: {problem['msg']} (found {problem['input']!r})"
            if problem["loc"]
            else f"{path}: {problem['msg'].removeprefix('Value error, ')}"
            for problem in error.errors()
        ]
        raise InputError("\n".join(lines)) from None
    tables, placements = [], {}
    for entry in given.tables:
        for table in _tables(entry):
            tables.append(table)
            kind = given.sharding.get(table.name, given.sharding.get(entry.name, "planner"))
            placements[table.name] = Placement(
                kind,
                entry.kernel,
                entry.cache_load_factor if entry.kernel == "uvm_caching" else None,
            )
    hardware = absent_cluster(_with_memory(given.hardware, hbm_gib), cluster)
    group = _group(given.hardware, hardware, given.optimizer, placements)
    return Problem(
        tables,
        placements,
        given.optimizer,
        batch or given.batch_per_rank,
        given.dense_parameters,
        group,
        hardware,
    )


def _group(
    given: HardwareConfig, hardware: Hardware, optimizer: str, placements: dict[str, Placement]
) -> Hardware:
    """The ranks that tables are sharded over."""
    size = given.sharding_group_size
    if size is None:
        return hardware
    kernels = {placement.kernel for placement in placements.values()}
    try:
        check_groups(
            size, hardware.ranks, hardware.ranks_per_host, hardware.device, optimizer, kernels
        )
    except PlanError as error:
        raise InputError(str(error)) from error
    return hardware.group(size)


def problem_of_config(
    path: Path, overrides: list[str], cluster: Cluster, batch: int | None, hbm_gib: float | None
) -> Problem:
    """The tables of a run's configuration; data and stores must be there, their rows are counted.

    Raises:
        InputError: If configuration, data or stores are not as they should be.
    """
    from trainer.data.dataset import validate_dataset
    from trainer.features.block import BLOCK, feature_shapes
    from trainer.features.fit import fit_encoder
    from trainer.features.pooling import sequence_shapes
    from trainer.features.resolve import resolve_features
    from trainer.models.llm4msr import LLM4MSR
    from trainer.run.build import make_shapes
    from trainer.run.features import training_files
    from trainer.run.id_tables import assigned_rows
    from trainer.run.inputs import open_stores, placements

    config = load_config(path, overrides)
    dataset = validate_dataset(Path(config.data.path))
    stores = open_stores(config.knowledge, dataset)
    rows = {"user": dataset.users + 1, "item": dataset.items + 1}  # one row for unknown ids
    if config.tables.hash_rows is not None:
        rows = dict.fromkeys(rows, config.tables.hash_rows)
    if config.tables.ids in ("zero_collision", "hash_zch"):
        rows = assigned_rows(config.tables, config.data.streams)
    features = resolve_features(config.features, dataset)
    # Its vocabularies are as large as they will be; nothing is written.
    encoder = fit_encoder(features, training_files(config.data))
    shapes = make_shapes(
        dataset,
        stores,
        rows,
        config.data.labels,
        config.features,
        feature_shapes(features, encoder),
        sequence_shapes(features, encoder, config.tables.dim, BLOCK),
        means={},
    )
    model = LLM4MSR(config.model, shapes, config.tables.dim, config.tables.init_std)
    hardware = absent_cluster(_with_memory(config.hardware, hbm_gib), cluster)
    samples = batch or config.train.global_batch_size // hardware.ranks
    if samples < 1:
        raise InputError(
            f"train.global_batch_size: {config.train.global_batch_size} samples leave none for each of "
            f"{hardware.ranks} ranks; pass --batch-per-rank"
        )
    by_table = {table.name: Placement() for table in model.tables} | placements(config.tables)
    group = _group(config.hardware, hardware, config.tables.optimizer, by_table)
    return Problem(
        model.tables,
        by_table,
        config.tables.optimizer,
        samples,
        sum(parameter.numel() for parameter in model.dense.parameters()),
        group,
        hardware,
    )


def _with_memory(given: HardwareConfig, hbm_gib: float | None) -> HardwareConfig:
    return given.model_copy(update={"device_memory_gib": hbm_gib}) if hbm_gib else given
