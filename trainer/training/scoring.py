"""Scoring a split with the live model: running metrics while training, predictions as Parquet."""

import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch
import torch.distributed as dist
import torch.nn.functional as F
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

# Of equal width in logits from -LARGEST to LARGEST: rare positives are apart there, but not as
# probabilities. The AUC of so fine a histogram is exact to 1e-4 whatever the base rate.
BINS, LARGEST = 65_536, 30.0
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


def measure(run: Run, events: EventStream) -> tuple[float | None, float]:
    """Computes AUC (None if only one class occurs) and logloss over all ranks, in constant memory."""
    device = run.runtime.device
    counts = torch.zeros(2, BINS, dtype=torch.float64, device=device)
    sums = torch.zeros(2, dtype=torch.float64, device=device)
    for predictions in score(run, events):
        shifted = predictions.logits.float().nan_to_num().clamp(-LARGEST, LARGEST) + LARGEST
        bins = (shifted * (BINS / (2 * LARGEST))).long().clamp(max=BINS - 1)
        for label in (0, 1):
            counts[label].index_add_(
                0, bins, (predictions.weight * (predictions.label == label)).double()
            )
        loss = F.binary_cross_entropy_with_logits(
            predictions.logits, predictions.label, predictions.weight, reduction="sum"
        )
        sums += torch.stack([loss, predictions.weight.sum()]).double()
    dist.all_reduce(counts)
    dist.all_reduce(sums)
    if not torch.isfinite(sums).all():
        raise InputError(
            f"{run.folder}: predictions are not finite, training has diverged; lower train.learning_rate, "
            "train.meta_learning_rate or tables.learning_rate",
            shared=True,
        )
    return histogram_auc(counts), (sums[0] / sums[1].clamp(min=1)).item()


def histogram_auc(counts: Tensor) -> float | None:
    """AUC from [2, bins] counts of negatives and positives; a shared bin counts as a tie."""
    negatives, positives = counts
    pairs = negatives.sum() * positives.sum()
    if pairs == 0:
        return None
    below = negatives.cumsum(0) - negatives
    return ((positives * (below + 0.5 * negatives)).sum() / pairs).item()


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
