"""Numbers of a run: metrics.jsonl and TensorBoard, written by rank 0, reduced over all ranks."""

import json
import time
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from tqdm import tqdm

from trainer.data.batch import Batch
from trainer.data.prefetch import Feed
from trainer.distributed import Runtime, together
from trainer.models.llm4msr import Predictions


class RunLog:
    """Collects a step's numbers on the device; reads and reduces them only when flushed.

    Lines of steps after `step` (left by a run that died beyond its last checkpoint) are dropped, so
    that every step stands in the file once.
    """

    def __init__(self, folder: Path, runtime: Runtime, step: int) -> None:
        self._device, self._since = runtime.device, time.perf_counter()
        # loss, samples, samples with knowledge, ranks without input
        self._sums = torch.zeros(4, dtype=torch.float64, device=runtime.device)
        self._file = self._board = None
        if runtime.is_main:
            from torch.utils.tensorboard import SummaryWriter

            path = folder / "metrics.jsonl"
            lines = path.read_text().splitlines() if path.exists() else []
            kept = [
                line for line in lines if line.endswith("}") and json.loads(line)["step"] <= step
            ]
            path.write_text("".join(f"{line}\n" for line in kept))
            self._file = path.open("a", buffering=1)
            self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=step)

    def add(self, predictions: Predictions) -> None:
        """Adds one step; no synchronisation."""
        loss = F.binary_cross_entropy_with_logits(
            predictions.logits, predictions.label, predictions.weight, reduction="sum"
        )
        known = (predictions.weight * predictions.has_knowledge).sum()
        self._sums[:3] += torch.stack([loss, predictions.weight.sum(), known]).double()

    def flush(
        self, step: int, epoch: int, rates: dict[str, float], bar: tqdm, feed: Feed[Batch]
    ) -> None:
        """Reduces over ranks and writes a line of kind "train", with the learning rates by name.

        Raises:
            InputError: On all ranks, if the input of any has failed since the last line.
        """
        self._sums[3] = float(feed.problem is not None)
        dist.all_reduce(self._sums)
        loss, samples, known, failed = self._sums.tolist()
        if failed:
            together(feed.check)
        seconds = time.perf_counter() - self._since
        numbers = {
            "loss": loss / max(samples, 1),
            "samples_per_second": samples / seconds,
            "knowledge_coverage": known / max(samples, 1),
            **rates,
        }
        self.write("train", step, epoch, **numbers)
        bar.set_postfix(
            loss=f"{numbers['loss']:.4f}", samples_s=f"{numbers['samples_per_second']:.0f}"
        )
        self._sums.zero_()
        self._since = time.perf_counter()

    def write(self, kind: str, step: int, epoch: int, **numbers: float | None) -> None:
        """Writes one line on rank 0."""
        if self._file is not None and self._board is not None:
            line: dict[str, Any] = {"step": step, "epoch": epoch, "kind": kind, **numbers}
            self._file.write(json.dumps(line) + "\n")
            for name, value in numbers.items():
                if value is not None:
                    self._board.add_scalar(f"{kind}/{name}", value, step)
        self._since = time.perf_counter()  # an evaluation's time is not the training's

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._file is not None and self._board is not None:
            self._file.close()
            self._board.close()
