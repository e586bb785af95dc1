"""Scoring a split with the live model; predictions as Parquet."""

import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch
import torch.distributed as dist
from torch import Tensor

from llm_knowledge.errors import InputError
from trainer.checkpoint.directory import best_of, checkpoints, problem_of, read_state
from trainer.checkpoint.restore import load_checkpoint
from trainer.config.run import Changes, load_config
from trainer.data.loading.loader import EventStream
from trainer.distributed.process_group import distributed, on_all_ranks
from trainer.models.shapes import Predictions
from trainer.run.build import build
from trainer.run.inputs import open_inputs
from trainer.run.session import Run
from trainer.training.resume import check_data
from trainer.training.run_folder import run_owner

ID_COLUMNS = ["user_id", "item_id", "scenario_id", "timestamp", "label"]


def score(run: Run, events: EventStream) -> Iterator[Predictions]:
    """Yields predictions batch by batch, in the stream's order.

    Raises:
        InputError: After the last batch, on all ranks, if the input of any has failed.
    """
    run.model.eval()
    with torch.no_grad(), events.feed(0, events.steps) as feed:
        batches = run.remap_ids(feed, assign=False)
        for _ in range(events.steps):
            yield run.pipeline.progress(batches)
        on_all_ranks(feed.check)


def write_predictions(run: Run, split: str) -> Path:
    """Scores a split and writes `predictions/SPLIT/part-RANK.parquet`, each row of the split once.

    The directory appears whole, by rename, after every rank has written its part.
    """
    events = run.stream([split], shuffle=False)
    further = [f"label_{name}" for name in run.config.data.labels]
    scored = [  # 5 bytes per row and 4 per further label, no more
        (
            torch.cat([predictions.logits[:, None], predictions.extra_logits], 1)
            .sigmoid()
            .float()
            .cpu(),
            predictions.has_knowledge.bool().cpu(),
        )
        for predictions in score(run, events)
    ]
    rows = events.stop - events.start
    chances, known = (torch.cat(parts)[:rows] for parts in zip(*scored, strict=True))
    names = ["prediction", *(f"prediction_{name}" for name in run.config.data.labels)]
    on_all_ranks(lambda: _check_finite(chances, names, split, run))
    target = run.folder / "predictions" / split
    partial = target.with_name(f"{split}.partial")
    if run.runtime.is_main:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    dist.barrier()

    def write() -> None:
        row = 0
        with _PartWriter(partial / f"part-{run.runtime.rank:05d}.parquet") as writer:
            for table, _ in events.tables([*ID_COLUMNS, *further]):
                piece = slice(row, row + len(table))
                for task, name in enumerate(names):
                    table = table.append_column(name, pa.array(chances[piece, task].numpy()))
                writer.write(table.append_column("has_knowledge", pa.array(known[piece].numpy())))
                row += len(table)

    on_all_ranks(write)
    if run.runtime.is_main:
        shutil.rmtree(target, ignore_errors=True)
        os.rename(partial, target)
    dist.barrier()
    return target


def _check_finite(chances: Tensor, names: list[str], split: str, run: Run) -> None:
    """Refuses predictions [rows, labels] that are no numbers, before the old ones are replaced.

    Raises:
        InputError: names the run, the rank, the column and the number of rows.
    """
    rows = (~chances.isfinite()).sum(dim=0).tolist()
    for name, count in zip(names, rows, strict=True):
        if count:
            raise InputError(
                f"{run.folder}: rank {run.runtime.rank}: {count} of {len(chances)} values of {name} for "
                f"{split} are NaN or infinite: the checkpoint holds such weights; nothing was written; train "
                "again with a lower learning rate, or score an earlier checkpoint"
            )


class _PartWriter:
    """A Parquet writer that takes its schema from the first table."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._writer: pq.ParquetWriter | None = None

    def write(self, table: pa.Table) -> None:
        if self._writer is None:
            self._writer = pq.ParquetWriter(self._path, table.schema)
        self._writer.write_table(table)

    def __enter__(self) -> "_PartWriter":
        return self

    def __exit__(self, *_: object) -> None:
        if self._writer is not None:
            self._writer.close()


def predict(folder: Path, split: str, changes: Changes = ()) -> Path:
    """Scores a split with a finished run's best checkpoint and writes the predictions.

    Raises:
        InputError: The data is not what the run was trained on, or there is no checkpoint of this model.
    """
    config = load_config(folder / "config.yaml", changes)
    with distributed(config.train.timeout_seconds) as runtime, ExitStack() as held:
        inputs = open_inputs(config, runtime)
        # Before good predictions are replaced.
        on_all_ranks(lambda: check_data(config.data.path, folder))
        held.enter_context(run_owner(folder, runtime))
        run = build(config, runtime, folder, inputs)
        saved = folder / "checkpoints"
        whole = [path for path in checkpoints(saved) if problem_of(path) is None]
        if not whole:
            raise InputError(
                f"{folder}: no checkpoint to score with; train the run, or --resume it"
            )
        load_checkpoint(best_of(saved, read_state(whole[-1])), run)
        return write_predictions(run, split)
