"""The live objects of a run on one rank."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.train_pipeline import TrainPipelineSparseDist

from embeddings.sharding import TablePlan
from llm_knowledge.errors import InputError
from trainer.config.run import RunConfig
from trainer.data.dataset import DatasetInfo, split_files
from trainer.data.loading.batch import Batch
from trainer.data.loading.loader import EventStream
from trainer.data.loading.row_encoder import RowEncoder
from trainer.distributed.process_group import Runtime, on_all_ranks
from trainer.models.shapes import Predictions
from trainer.run.id_tables import IdUse


@dataclass(frozen=True)
class Continuation:
    """Where a run begins that goes on from another one.

    Attributes:
        checkpoint: The other run's best checkpoint.
        files: Parts of the train split that the other run has not seen.
        rows: Rows of these parts.
    """

    checkpoint: Path
    files: list[Path]
    rows: int


@dataclass
class Run:
    """Everything that a loop needs, on one rank."""

    config: RunConfig
    folder: Path
    runtime: Runtime
    dataset: DatasetInfo
    encoder: RowEncoder
    fingerprints: dict[str, str]
    means_fingerprint: str | None
    tables: list[TablePlan]
    plan: str
    model: DistributedModelParallel
    optimizer: torch.optim.Optimizer
    pipeline: TrainPipelineSparseDist
    id_use: IdUse = field(default_factory=IdUse)

    @property
    def features_fingerprint(self) -> str | None:
        """Of the encoder of features; None without features."""
        encoder = self.encoder.features
        return encoder.fingerprint if encoder.encodings else None

    def stream(
        self, splits: Sequence[str], shuffle: bool, since: Continuation | None = None
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
            expected_rows = sum(
                rows for split, rows in self.dataset.rows.items() if split in splits
            )
            expected_rows = expected_rows if since is None else since.rows
            if stream.total_rows != expected_rows:
                raise InputError(
                    f"{path}: {stream.total_rows} rows in {', '.join(splits)}, {expected_rows} when the run "
                    "began; put the old files back and go on with --resume"
                )
            return stream

        return on_all_ranks(opened)

    def remap_ids(self, batches: Iterator[Batch], assign: bool) -> Iterator[Batch]:
        """Gives ids their rows on a batch's way to the pipeline; all ranks together.

        Args:
            batches: What is to be fed, and no more: rows are given to the ids of a batch when it is read.
            assign: Whether ids are counted, admitted and evicted: in training.
        """
        owners = self.model.module.row_owners
        for batch in batches:
            if owners is None:
                self.id_use.count(batch.ids)
                yield batch
                continue
            ids, fresh = owners.remap(batch.ids, assign)
            if self.runtime.device.type == "cuda":  # from page-locked memory copies overlap
                ids, fresh = ids.pin_memory(), fresh.pin_memory()
            yield replace(batch, ids=ids, fresh=fresh)

    def train_step(self, batches: Iterator[Batch]) -> Predictions | None:
        """Trains the next batch; returns its predictions, or None where there is no further one."""
        try:
            return self.pipeline.progress(batches)
        except StopIteration:
            return None

    def report_ids(self, scored: bool) -> dict[str, float]:
        """Numbers of the id tables since the last report; all ranks together, on the host."""
        owners = self.model.module.row_owners
        if owners is not None:
            return owners.report(scored)
        return self.id_use.report() if self.config.tables.ids == "vocabulary" and scored else {}


def reading_threads(configured: int | None, ranks_per_host: int) -> int:
    """Threads that read ahead on each rank: without a spare core they only take turns with the loop."""
    if configured is not None:
        return configured
    return int(len(os.sched_getaffinity(0)) > ranks_per_host)
