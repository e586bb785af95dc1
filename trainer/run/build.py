"""From a configuration to the live objects of a run; training and evaluation both begin here."""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.train_pipeline import (
    PrefetchTrainPipelineSparseDist,
    TrainPipelineSparseDist,
)
from torchrec.distributed.types import ShardingPlan

from embeddings.ids import IdMap, SortedKeys
from embeddings.optimizer import fuse_optimizer
from embeddings.placement import PlanError
from embeddings.replicated import train_replicated_tables
from embeddings.sharding import (
    Hardware,
    TablePlan,
    describe_plan,
    format_plan,
    plan_sharding,
    shard,
    sharders,
)
from embeddings.tables import load_frozen_rows
from llm_knowledge.errors import InputError
from llm_knowledge.store.dated import DatedStores
from trainer.config.features import FeaturesConfig
from trainer.config.levels import TABLE_LEVELS
from trainer.config.run import DataConfig, RunConfig
from trainer.config.train import TrainConfig
from trainer.data.dataset import DatasetInfo
from trainer.data.loading.row_encoder import KnowledgeJoin, RowEncoder
from trainer.distributed.process_group import Runtime, on_all_ranks
from trainer.features.block import BLOCK, FeatureShape, feature_shapes
from trainer.features.encoder import FeatureEncoder
from trainer.features.pooling import SequenceShape, sequence_shapes
from trainer.models.llm4msr import KNOWLEDGE_PREFIX, LLM4MSR, DenseModel
from trainer.models.meta import standardise
from trainer.models.shapes import Shapes
from trainer.run.features import run_encoder
from trainer.run.hardware import this_cluster
from trainer.run.id_tables import (
    IdUse,
    hash_zch,
    id_maps,
    readers_of_tables,
    zero_collision_tables,
)
from trainer.run.inputs import Inputs
from trainer.run.means import Means, means_fingerprint, run_means
from trainer.run.precision import choose_precision, set_precision
from trainer.run.session import Run


def build(config: RunConfig, runtime: Runtime, folder: Path, inputs: Inputs) -> Run:
    """Builds and shards the model, loads this rank's knowledge rows."""
    train, dataset, stores = config.train, inputs.dataset, inputs.stores
    ids = id_maps(config.tables, config.data, folder, runtime)
    features = run_encoder(inputs.features, config.data, train.start_from, folder, runtime)
    encoder = _row_encoder(config.data, config.features.history, dataset, stores, ids, features)
    rows = {level: id_map.rows for level, id_map in ids.items()}
    means = on_all_ranks(lambda: run_means(folder, stores))
    read = feature_shapes(inputs.features, features)
    sequences = sequence_shapes(inputs.features, features, config.tables.dim, BLOCK)
    shapes = make_shapes(
        dataset, stores, rows, config.data.labels, config.features, read, sequences, means
    )
    torch.manual_seed(train.seed)
    readers = readers_of_tables(features.item_steps)
    owners = zero_collision_tables(config.tables, ids, config.data.streams, train.seed, readers)
    precision = choose_precision(train.precision, runtime.device.type)
    set_precision(precision)
    model = LLM4MSR(
        config.model,
        shapes,
        config.tables.dim,
        config.tables.init_std,
        owners,
        hash_zch(config.tables, config.data.streams),
        autocast=precision == "bf16",
    )
    fuse_optimizer(model.sparse.parameters(), inputs.table_optimizer)
    batch_size = train.global_batch_size // runtime.world_size
    cluster = this_cluster(config.hardware, runtime, config.tables.key_value_directory)
    group = cluster.group(config.hardware.sharding_group_size)
    try:
        plan = plan_sharding(model, model.tables, inputs.placements, batch_size, group)
    except PlanError as error:
        raise InputError(f"tables.sharding: {error}", shared=True) from error
    tables = describe_plan(plan, model.tables, group.ranks)
    plan_text = _plan_text(tables, group.ranks, runtime, precision, model, batch_size)
    torch.manual_seed(train.seed * 4_096 + runtime.rank)  # each rank draws rows of its own
    grouped = config.hardware.sharding_group_size is not None
    sharded = _shard(model, plan, runtime, cluster, group.ranks if grouped else None)
    if owners is not None:
        owners.bind(sharded)
    _load_knowledge(sharded.module, stores, means)
    optimizer = _dense_optimizer(sharded.module.dense, train)
    train_replicated_tables(sharded, plan, inputs.table_optimizer, optimizer, KNOWLEDGE_PREFIX)
    if grouped:
        sharded.average_after(optimizer)
    return Run(
        config=config,
        folder=folder,
        runtime=runtime,
        dataset=dataset,
        encoder=encoder,
        fingerprints={level: store.fingerprint for level, store in stores.items()},
        means_fingerprint=means_fingerprint(means),
        tables=tables,
        plan=plan_text,
        model=sharded,
        optimizer=optimizer,
        id_use=_id_use(features),
        pipeline=pipeline_of(tables)(sharded, optimizer, runtime.device, execute_all_batches=True),
    )


def _id_use(features: FeatureEncoder) -> IdUse:
    """What counts unknown ids, of the item table and of unweighted features with the steps that read them."""
    tables = [one for one in features.encodings if one.has_table and not one.weights]
    return IdUse(
        readers_of_tables(features.item_steps) | {t.table_name: (t.table_name,) for t in tables}
    )


def _plan_text(
    tables: list[TablePlan],
    group_ranks: int,
    runtime: Runtime,
    precision: str,
    model: LLM4MSR,
    batch_size: int,
) -> str:
    """What a run is planned as, for people."""
    lines = [format_plan(tables)]
    if group_ranks < runtime.world_size:
        copies = runtime.world_size // group_ranks
        lines.append(f"in each of {copies} groups of {group_ranks} ranks")
    lines += ["", f"dense part: products in {precision}"]
    if model.dense.meta is not None:
        lines += ["", "meta layers", *model.dense.meta.strategies(batch_size, runtime.device.type)]
    return "\n".join(lines) + "\n"


def _shard(
    model: LLM4MSR, plan: ShardingPlan, runtime: Runtime, cluster: Hardware, group_size: int | None
) -> DistributedModelParallel:
    """Shards the tables over all ranks, or over groups of `group_size` that hold copies."""
    if group_size is None:
        return shard(model, plan, runtime.device)
    # Only here: nothing else needs what has never run on its hardware.
    from embeddings.experimental.replica_groups import ReplicaGroups

    return ReplicaGroups(
        model,
        plan,
        runtime.device,
        group_size,
        cluster.ranks_per_host,
        KNOWLEDGE_PREFIX,
        sharders(model),
    )


def _load_knowledge(model: LLM4MSR, stores: dict[str, DatedStores], means: Means) -> None:
    """Reads this rank's rows of the tables of vectors."""
    if model.knowledge is None:
        return
    collection = model.knowledge.collection
    readers = {
        level.knowledge: _standardised(stores[level.name], means.get(level.name))
        for level in TABLE_LEVELS
        if level.name in stores
    }
    on_all_ranks(lambda: load_frozen_rows(collection, readers))


def pipeline_of(tables: Iterable[TablePlan]) -> type[TrainPipelineSparseDist]:
    """The pipeline of a training step: where a table has a cache, its misses are fetched a batch ahead."""
    cached = any(table.kernel == "fused_uvm_caching" for table in tables)
    return PrefetchTrainPipelineSparseDist if cached else TrainPipelineSparseDist


def make_shapes(
    dataset: DatasetInfo,
    stores: dict[str, DatedStores],
    rows: dict[str, int],
    label_weights: Mapping[str, float],
    config: FeaturesConfig,
    features: tuple[FeatureShape, ...],
    sequences: tuple[SequenceShape, ...],
    means: Means,
) -> Shapes:
    """What data, stores and rows of the id tables ("user", "item") say about the model's size."""
    scenario_store = stores.get("scenario")
    return Shapes(
        user_rows=rows["user"],
        item_rows=rows["item"],
        history_length=dataset.history_length if config.history else 0,
        scenarios=len(dataset.scenarios),
        user_vectors=_shape(stores.get("user")),
        item_vectors=_shape(stores.get("item")),
        scenario_vectors=torch.from_numpy(
            _standardised(scenario_store, means.get("scenario"))(0, len(scenario_store))
        )
        if scenario_store
        else None,
        scenario_stores=torch.from_numpy(scenario_store.store_of_rows())
        if scenario_store
        else None,
        label_weights=tuple(label_weights.values()),
        features=features,
        sequences=sequences,
        features_width=config.width,
    )


def _standardised(store: DatedStores, mean: np.ndarray | None) -> Callable[[int, int], np.ndarray]:
    def read(start: int, stop: int) -> np.ndarray:
        vectors = store.read_vectors(start, stop)
        return standardise(vectors if mean is None else vectors.astype(np.float32) - mean)

    return read


def _shape(store: DatedStores | None) -> tuple[int, int] | None:
    return (len(store), store.dim) if store is not None else None


def _row_encoder(
    data: DataConfig,
    history: bool,
    dataset: DatasetInfo,
    stores: dict[str, DatedStores],
    ids: dict[str, IdMap],
    features: FeatureEncoder,
) -> RowEncoder:
    scenario_ids = np.array([scenario.scenario_id for scenario in dataset.scenarios])
    order = np.argsort(scenario_ids)
    return RowEncoder(
        users=ids["user"],
        items=ids["item"],
        scenarios=SortedKeys(pa.array(scenario_ids[order].tolist())),
        scenario_order=order.astype(np.int64),
        history_length=dataset.history_length if history else 0,
        joins={level: KnowledgeJoin(*dated.stores) for level, dated in stores.items()},
        extra_labels=tuple(f"label_{name}" for name in data.labels),
        features=features,
    )


def _dense_optimizer(dense: DenseModel, train: TrainConfig) -> torch.optim.Optimizer:
    """AdamW on everything that is not a table, in the groups that the model asks for.

    `set_learning_rates` writes the rate of each group, by its name, before every update.
    """
    groups = dense.parameter_groups()
    return torch.optim.AdamW(
        [{"params": parameters, "name": name} for name, parameters in groups.items() if parameters],
        lr=train.learning_rate,
        weight_decay=train.weight_decay,
        fused=True,
    )
