"""What a run reads, opened and checked against its configuration before anything is written."""

from dataclasses import dataclass
from pathlib import Path

from embeddings.optimizer import TableOptimizer
from embeddings.placement import Placement, check_groups, check_placement
from llm_knowledge.errors import InputError
from llm_knowledge.store.dated import DatedStores
from trainer.config.levels import KNOWLEDGE_TABLES
from trainer.config.model import MetaConfig
from trainer.config.run import RunConfig
from trainer.config.tables import TablesConfig
from trainer.data.dataset import DatasetInfo, validate_dataset
from trainer.data.loading.loader import check_shares
from trainer.distributed.process_group import Runtime
from trainer.features.resolve import Feature, resolve_features
from trainer.ops.meta_linear import missing_for
from trainer.run.id_tables import check_device
from trainer.run.stores import check_coverage, check_origin, open_stores


@dataclass(frozen=True)
class Inputs:
    """What a run reads, and how its tables are trained and placed.

    Attributes:
        dataset: What dataset.json says.
        stores: Knowledge by level.
        features: What the model reads besides.
        table_optimizer: Of all tables.
        placements: By table; those that are not in it are row-wise and fused.
    """

    dataset: DatasetInfo
    stores: dict[str, DatedStores]
    features: list[Feature]
    table_optimizer: TableOptimizer
    placements: dict[str, Placement]


def open_inputs(config: RunConfig, runtime: Runtime) -> Inputs:
    """Opens data and stores and checks that they fit the configuration, before anything is written.

    Raises:
        InputError: If they do not.
    """
    check_shares(config.train.global_batch_size, config.data.streams, runtime.world_size)
    size = config.train.eval_batch_size
    if size is not None and size % runtime.world_size:
        raise InputError(
            f"train.eval_batch_size: {size} cannot be split over {runtime.world_size} ranks; choose a "
            "multiple"
        )
    try:
        optimizer, by_table = table_optimizer(config.tables), placements(config.tables)
        optimizer.check(runtime.device.type)
        for table, placement in by_table.items():
            check_placement(table, table == "item", placement, runtime.device.type)
        if (size := config.hardware.sharding_group_size) is not None:
            check_groups(
                size,
                runtime.world_size,
                min(runtime.ranks_per_host, runtime.world_size),
                runtime.device.type,
                config.tables.optimizer,
                set(config.tables.kernels.values()),
            )
    except ValueError as error:
        raise InputError(str(error)) from error
    check_device(config.tables, runtime.device.type)
    check_strategy(config.model.meta, runtime.device.type)
    dataset = validate_dataset(Path(config.data.path))
    for name in config.data.labels:
        if name not in dataset.extra_labels:
            there = ", ".join(dataset.extra_labels) or "none"
            raise InputError(
                f"data.labels: {config.data.path} has no further label {name!r} (there: {there}); name it "
                "under labels in the schema and prepare the data again, or remove it"
            )
    features = resolve_features(config.features, dataset)
    stores = open_stores(config.knowledge, dataset)
    check_origin(stores, config.data.path, config.knowledge.other_dataset, runtime.is_main)
    check_coverage(stores, config.data, runtime.is_main)
    return Inputs(dataset, stores, features, optimizer, by_table)


def check_strategy(meta: MetaConfig, device: str) -> None:
    """Refuses an implementation of the meta layers that a device has not.

    Raises:
        InputError: With what to use instead.
    """
    if not meta.enabled:
        return
    if missing := missing_for(meta.strategy, device):
        raise InputError(
            f"model.meta.strategy: {meta.strategy} needs {missing}; this run is on {device}; use auto or "
            "reference"
        )


def placements(tables: TablesConfig) -> dict[str, Placement]:
    """What the configuration wants of tables; those that are not in it are row-wise and fused."""
    replicable = table_optimizer(tables).replicable
    by_table = {}
    for name in {**tables.sharding, **tables.kernels}:
        kernel = tables.kernels.get(name, "fused")
        by_table[str(name)] = Placement(
            sharding=tables.sharding.get(name, "row_wise"),
            kernel=kernel,
            cache_load_factor=tables.cache_load_factor if kernel == "uvm_caching" else None,
            directory=tables.key_value_directory if kernel == "key_value" else None,
            replicable=replicable or name in KNOWLEDGE_TABLES,
        )
    return by_table


def table_optimizer(tables: TablesConfig) -> TableOptimizer:
    """The optimizer of all tables that the configuration names."""
    betas = (tables.betas[0], tables.betas[1])
    return TableOptimizer(tables.optimizer, tables.learning_rate, tables.weight_decay, betas)
