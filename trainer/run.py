"""From a configuration to the live objects of a run; training and evaluation both begin here."""

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from torch import nn
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.train_pipeline import TrainPipelineSparseDist

from embeddings.ids import IdMap, SortedKeys
from embeddings.optimizer import fuse_optimizer
from embeddings.placement import PlanError
from embeddings.replica_groups import ReplicaGroups
from embeddings.replicated import train_replicated_tables
from embeddings.sharding import TablePlan, describe_plan, format_plan, plan_sharding, shard
from embeddings.tables import load_frozen_rows
from embeddings.versions import versions
from llm_knowledge.dated import DatedStores
from llm_knowledge.errors import InputError
from trainer.config import RunConfig, save_config
from trainer.continuation import Continuation, copy_vocabularies, note_data, resume_config
from trainer.data.batch import Batch
from trainer.data.dataset import DatasetInfo, split_files
from trainer.data.loader import EventStream
from trainer.data.rows import KnowledgeJoin, RowEncoder
from trainer.distributed import Runtime, together
from trainer.hardware import this_cluster
from trainer.inputs import Inputs, placements, table_optimizer
from trainer.models.llm4msr import LLM4MSR, Shapes
from trainer.models.meta import standardise
from trainer.row_ids import IdUse, hash_zch, id_maps, zero_collision_tables


@dataclass
class Run:
    """Everything that a loop needs, on one rank."""

    config: RunConfig
    folder: Path
    runtime: Runtime
    dataset: DatasetInfo
    encoder: RowEncoder
    fingerprints: dict[str, str]
    tables: list[TablePlan]
    plan: str
    model: DistributedModelParallel
    optimizer: torch.optim.Optimizer
    pipeline: TrainPipelineSparseDist
    id_use: IdUse = field(default_factory=IdUse)

    def stream(
        self, splits: list[str], shuffle: bool, since: Continuation | None = None
    ) -> EventStream:
        """This rank's share of some splits; unshuffled ones keep the order of the files.

        With `since`, only the rows that the earlier run has not seen.

        Raises:
            InputError: A file has vanished or lost rows since the dataset was checked.
        """
        path, data, train = Path(self.config.data.path), self.config.data, self.config.train
        size = train.global_batch_size
        if not shuffle:
            size = train.eval_batch_size or size

        def opened() -> EventStream:
            files = [file for split in splits for file in split_files(path, split)]
            stream = EventStream(
                files if since is None else since.files,
                self.encoder,
                size,
                rank=self.runtime.rank,
                world_size=self.runtime.world_size,
                streams=data.streams if shuffle else None,
                shuffle_buffer=data.shuffle_buffer if shuffle else 0,
                seed=train.seed,
                workers=reading_threads(data.workers, self.runtime.ranks_per_host),
                prefetch=data.prefetch_batches,
                device=self.runtime.device,
            )
            # Ranks that count different rows would end at different steps.
            wanted = sum(rows for split, rows in self.dataset.rows.items() if split in splits)
            wanted = wanted if since is None else since.rows
            if stream.total_rows != wanted:
                raise InputError(
                    f"{path}: {stream.total_rows} rows in {', '.join(splits)}, {wanted} when the run "
                    "began; put the old files back and go on with --resume"
                )
            return stream

        return together(opened)

    def give_rows(self, batches: Iterator[Batch], learn: bool) -> Iterator[Batch]:
        """Gives ids their rows on a batch's way to the pipeline; all ranks together.

        Args:
            batches: What is to be fed, and no more: rows are given to the ids of a batch when it is read.
            learn: Whether ids are counted, admitted and evicted: in training.
        """
        owners = self.model.module.row_owners
        for batch in batches:
            if owners is None:
                self.id_use.count(batch.ids)
                yield batch
                continue
            ids, fresh = owners.remap(batch.ids, learn)
            if self.runtime.device.type == "cuda":  # from page-locked memory copies overlap
                ids, fresh = ids.pin_memory(), fresh.pin_memory()
            yield replace(batch, ids=ids, fresh=fresh)

    def report_ids(self, scored: bool) -> dict[str, float]:
        """Numbers of the id tables since the last report; all ranks together, on the host."""
        owners = self.model.module.row_owners
        if owners is not None:
            return owners.report(scored)
        return self.id_use.report() if self.config.tables.ids == "vocabulary" and scored else {}


def reading_threads(wanted: int | None, ranks_per_host: int) -> int:
    """Threads that read ahead on each rank: without a spare core they only take turns with the loop."""
    if wanted is not None:
        return wanted
    return int(len(os.sched_getaffinity(0)) > ranks_per_host)


def prepare_folder(config: RunConfig, runtime: Runtime, resume: bool) -> Path:
    """Creates the run directory on rank 0, or accepts the one to resume.

    Raises:
        InputError: If the directory holds another run, or cannot be written.
    """
    folder = Path(config.output)
    if not runtime.is_main:
        return folder
    saved = folder / "config.yaml"
    try:
        if not saved.exists():
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "versions.json").write_text(json.dumps(versions(), indent=1))
            # By rename and last: where config.yaml is, a run can be resumed.
            copy_vocabularies(config, folder)
            note_data(config, folder)
            save_config(config, folder / ".config.yaml.partial")
            os.replace(folder / ".config.yaml.partial", saved)
        elif not resume:
            raise InputError(
                f"{folder}: a run is already there; pass --resume, remove it, or choose another output"
            )
        else:
            resume_config(saved, config)
            note_data(config, folder)
    except OSError as error:
        raise InputError(f"{folder}: cannot write the run directory ({error.strerror})") from error
    return folder


def write_plan(run: Run) -> None:
    """Writes what a training was planned as; scoring, on as many ranks as it likes, leaves it alone."""
    (run.folder / "plan.txt").write_text(run.plan)
    (run.folder / "plan.json").write_text(
        json.dumps([asdict(table) for table in run.tables], indent=1)
    )


def build(config: RunConfig, runtime: Runtime, folder: Path, inputs: Inputs) -> Run:
    """Builds and shards the model, loads this rank's knowledge rows."""
    train, dataset, stores = config.train, inputs.dataset, inputs.stores
    ids = id_maps(config, folder, runtime)
    encoder = _row_encoder(dataset, stores, ids, tuple(f"label_{n}" for n in config.data.labels))

    rows = {level: one.rows for level, one in ids.items()}
    shapes = make_shapes(dataset, stores, rows, tuple(config.data.labels.values()))
    torch.manual_seed(train.seed)
    owners = zero_collision_tables(config, ids)
    model = LLM4MSR(
        config.model, shapes, config.tables.dim, config.tables.init_std, owners, hash_zch(config)
    )
    fuse_optimizer(model.sparse.parameters(), table_optimizer(config))
    batch_size = train.global_batch_size // runtime.world_size
    cluster = this_cluster(config.hardware, runtime, config.tables.key_value_directory)
    group_size = config.hardware.sharding_group_size
    group = cluster.group(group_size)
    try:
        plan = plan_sharding(model, model.tables, placements(config), batch_size, group)
    except PlanError as error:
        raise InputError(f"tables.sharding: {error}", shared=True) from error
    tables = describe_plan(plan, model.tables, group.ranks)
    lines = [format_plan(tables)]
    if group_size is not None:
        copies = runtime.world_size // group.ranks
        lines.append(f"in each of {copies} groups of {group.ranks} ranks")
    if model.dense.meta is not None:
        lines += ["", "meta layers", *model.dense.meta.strategies(batch_size, runtime.device.type)]
    torch.manual_seed(
        train.seed * 4_096 + runtime.rank
    )  # each rank draws its own rows of the tables
    if group_size is None:
        sharded = shard(model, plan, runtime.device)
    else:
        sharded = ReplicaGroups(
            model, plan, runtime.device, group_size, cluster.ranks_per_host, "knowledge."
        )
    if owners is not None:
        owners.bind(sharded)
    if model.knowledge is not None:
        collection = sharded.module.knowledge.collection
        readers = {
            f"{level}_knowledge": _standardised(stores[level])
            for level in ("user", "item")
            if level in stores
        }
        together(lambda: load_frozen_rows(collection, readers))
    optimizer = _dense_optimizer(sharded, config)
    train_replicated_tables(sharded, plan, table_optimizer(config), optimizer, "knowledge.")
    if isinstance(sharded, ReplicaGroups):
        sharded.average_after(optimizer)
    return Run(
        config=config,
        folder=folder,
        runtime=runtime,
        dataset=dataset,
        encoder=encoder,
        fingerprints={level: store.fingerprint for level, store in stores.items()},
        tables=tables,
        plan="\n".join(lines) + "\n",
        model=sharded,
        optimizer=optimizer,
        pipeline=TrainPipelineSparseDist(
            sharded, optimizer, runtime.device, execute_all_batches=True
        ),
    )


def make_shapes(
    dataset: DatasetInfo,
    stores: dict[str, DatedStores],
    rows: dict[str, int],
    label_weights: tuple[float, ...],
) -> Shapes:
    """What data, stores and rows of the id tables ("user", "item") say about the model's size."""
    scenario_store = stores.get("scenario")
    return Shapes(
        user_rows=rows["user"],
        item_rows=rows["item"],
        history_length=dataset.history_length,
        scenarios=len(dataset.scenarios),
        user_vectors=_shape(stores.get("user")),
        item_vectors=_shape(stores.get("item")),
        scenario_vectors=torch.from_numpy(_standardised(scenario_store)(0, len(scenario_store)))
        if scenario_store
        else None,
        scenario_stores=torch.from_numpy(scenario_store.store_of_rows())
        if scenario_store
        else None,
        label_weights=label_weights,
    )


def _standardised(store: DatedStores) -> Callable[[int, int], np.ndarray]:
    return lambda start, stop: standardise(store.read_vectors(start, stop))


def _shape(store: DatedStores | None) -> tuple[int, int] | None:
    return (len(store), store.dim) if store is not None else None


def _row_encoder(
    dataset: DatasetInfo,
    stores: dict[str, DatedStores],
    ids: dict[str, IdMap],
    extra_labels: tuple[str, ...],
) -> RowEncoder:
    scenario_ids = np.array([scenario.scenario_id for scenario in dataset.scenarios])
    order = np.argsort(scenario_ids)
    return RowEncoder(
        users=ids["user"],
        items=ids["item"],
        scenarios=SortedKeys(pa.array(scenario_ids[order].tolist())),
        scenario_order=order.astype(np.int64),
        history_length=dataset.history_length,
        joins={level: KnowledgeJoin(*dated.stores) for level, dated in stores.items()},
        extra_labels=extra_labels,
    )


def _dense_optimizer(model: DistributedModelParallel, config: RunConfig) -> torch.optim.Optimizer:
    """AdamW on everything that is not a table; what reads knowledge has step sizes of its own.

    `set_learning_rates` writes the rate of each group, by its name, before every update.
    """
    groups: dict[str, list[nn.Parameter]] = {"dense": [], "meta": [], "knowledge": []}
    for name, parameter in model.module.dense.named_parameters():
        if name.startswith(("meta.inputs.", "meta.match.")):
            groups["knowledge"].append(parameter)
        else:
            groups["meta" if name.startswith("meta.") else "dense"].append(parameter)
    return torch.optim.AdamW(
        [{"params": parameters, "name": name} for name, parameters in groups.items() if parameters],
        lr=config.train.learning_rate,
        weight_decay=config.train.weight_decay,
        fused=True,
    )
