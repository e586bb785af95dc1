"""Numbers of a run: metrics.jsonl, ranks.jsonl and trackers, written by rank 0, gathered from all ranks."""

import json
import math
import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F

from llm_knowledge.errors import InputError
from llm_knowledge.files import write_bytes
from trainer.data.loading.batch import Batch
from trainer.data.loading.prefetch import BatchFeed
from trainer.distributed.process_group import on_all_ranks
from trainer.models.shapes import Predictions
from trainer.observe.trackers import TrackedRun, Tracker, open_trackers
from trainer.observe.watchdog import Watch, memory_gib
from trainer.run.session import Run

STEP = ("number", "loss", "samples", "known", "gradient")  # of one step on one rank
RANK = ("no_input", "told_to_end", "trace", "checksum", "busy", "input", "memory_gib")
STRAGGLES = 1.25  # times the median of what ranks need for themselves


@dataclass(frozen=True)
class Window:
    """What ranks exchanged about the steps since the last time; the same on every rank.

    Attributes:
        last: The number of the last of them, from 1.
        steps: By name in `STEP`: [ranks, steps]. Numbers are from 0; loss and samples are sums; gradient
            is the norm over the dense parameters.
        ranks: By name in `RANK`: [ranks].
        seconds: How long they took on this rank, by the clock.
    """

    last: int
    steps: Mapping[str, np.ndarray]
    ranks: Mapping[str, np.ndarray]
    seconds: float

    def any_rank(self, signal: str) -> bool:
        """Whether any rank has set a signal: a name in `RANK`."""
        return bool(self.ranks[signal].any())


class RunLog:
    """Collects a step's numbers on the device; reads and gathers them only in `exchange`.

    Lines of steps after `step` (left by a run that died beyond its last checkpoint) are dropped, so
    that every step stands in the file once.
    """

    def __init__(self, run: Run, step: int) -> None:
        runtime, folder, every = run.runtime, run.folder, run.config.train.log_every
        self._runtime, self._since = runtime, time.perf_counter()
        self._of_steps = torch.zeros(every, len(STEP), dtype=torch.float64, device=runtime.device)
        self._count = 0
        self._busy, self._input = time.thread_time(), 0.0
        self._file = self._ranks_file = None
        self._trackers: list[Tracker] = []

        def open_outputs() -> None:
            if runtime.is_main:
                self._file = _reopen(folder / "metrics.jsonl", step)
                self._ranks_file = _reopen(folder / "ranks.jsonl", step)
                config = run.config
                tracked = TrackedRun(config.name, config.model_dump(), folder, step)
                self._trackers = open_trackers(config.train.trackers, tracked)

        on_all_ranks(open_outputs)  # what cannot be opened on one rank ends all of them

    def add(
        self, step: int, predictions: Predictions, gradient: torch.Tensor | None = None
    ) -> None:
        """Adds one step, counted from 0, with the norm of its gradient; no synchronisation."""
        loss = F.binary_cross_entropy_with_logits(
            predictions.logits, predictions.label, predictions.weight, reduction="sum"
        )
        known = (predictions.weight * predictions.has_knowledge).sum()
        norm = loss.new_zeros(()) if gradient is None else gradient
        row = torch.stack([loss, predictions.weight.sum(), known, norm])
        self._of_steps[self._count, 0] = step
        self._of_steps[self._count, 1:] = row
        self._count += 1

    @property
    def pending(self) -> int:
        """Steps since the last exchange."""
        return self._count

    @property
    def full(self) -> bool:
        """Whether an exchange must come before the next step."""
        return self._count == len(self._of_steps)

    def exchange(
        self,
        step: int,
        feed: BatchFeed[Batch],
        watch: Watch | None = None,
        checksum: torch.Tensor | None = None,
    ) -> Window:
        """Gathers the numbers of the steps since the last time from all ranks: the loop's only collective.

        Args:
            step: Updates done.
            feed: Where this rank's batches come from.
            watch: What this rank was told from outside.
            checksum: Over what all ranks must have alike, float64-exact; None: not compared.
        """
        seconds = time.perf_counter() - self._since
        busy, waited = time.thread_time() - self._busy, feed.waited - self._input
        signals = (watch.told_to_end, watch.trace_wanted) if watch else (False, False)
        memory = memory_gib(self._runtime.device)
        of_rank = torch.tensor(
            [feed.problem is not None, *signals, 0.0, busy, waited, memory], dtype=torch.float64
        ).to(self._runtime.device)
        if checksum is not None:
            of_rank[RANK.index("checksum")] = checksum.double()
        sent = torch.cat([self._of_steps.flatten(), of_rank])
        received = sent.new_empty(self._runtime.world_size * len(sent))
        dist.all_gather_into_tensor(received, sent)
        numbers = received.view(self._runtime.world_size, -1).cpu().numpy()
        steps = numbers[:, : -len(RANK)].reshape(len(numbers), -1, len(STEP))[:, : self._count]
        self._count, self._input = 0, feed.waited
        return Window(
            step,
            {name: steps[:, :, column] for column, name in enumerate(STEP)},
            {name: numbers[:, column - len(RANK)] for column, name in enumerate(RANK)},
            seconds,
        )

    def write_window(self, window: Window, epoch: int, rates: dict[str, float]) -> dict[str, float]:
        """Writes a line of kind "train" about a window, and one about its ranks; returns its numbers."""
        samples = window.steps["samples"].sum()
        numbers = {
            "loss": float(window.steps["loss"].sum() / max(samples, 1)),
            "samples_per_second": float(samples / window.seconds),
            "knowledge_coverage": float(window.steps["known"].sum() / max(samples, 1)),
            **rates,
            **self._compare_ranks(window),
        }
        self.write("train", window.last, epoch, **numbers)
        return numbers

    def _compare_ranks(self, window: Window) -> dict[str, float]:
        """What ranks need for themselves, and who needs most; the rest is waiting for each other."""
        seconds, input_seconds = window.seconds, window.ranks["input"]
        needed = window.ranks["busy"] + input_seconds
        if self._ranks_file is not None:
            lists = {
                "samples_per_second": window.steps["samples"].sum(1) / seconds,
                "busy_share": window.ranks["busy"] / seconds,
                "input_share": input_seconds / seconds,
                "memory_gib": window.ranks["memory_gib"],
            }
            line = {name: [round(float(x), 4) for x in values] for name, values in lists.items()}
            slowest, median = int(needed.argmax()), statistics.median(needed)
            straggles = needed[slowest] > STRAGGLES * median and len(needed) > 1
            straggler = slowest if straggles else None
            text = json.dumps({"step": window.last, **line, "straggler": straggler})
            self._ranks_file.write(text + "\n")
        return {
            "input_share": float(input_seconds.max() / seconds),
            "waiting_share": float(max(0.0, 1 - needed.mean() / seconds)),
            "memory_gib": float(window.ranks["memory_gib"].max()),
        }

    def write(self, kind: str, step: int, epoch: int, **numbers: float | None) -> None:
        """Writes one line on rank 0."""
        if self._file is not None:
            known = {
                name: value
                if value is not None and math.isfinite(value)
                else None  # JSON has no NaN
                for name, value in numbers.items()
            }
            line: dict[str, Any] = {"step": step, "epoch": epoch, "kind": kind, **known}
            self._file.write(json.dumps(line) + "\n")
            shown = {f"{kind}/{name}": value for name, value in known.items() if value is not None}
            for tracker in self._trackers:
                tracker.write(shown, step)
        # An evaluation's time is not the training's.
        self._since, self._busy = time.perf_counter(), time.thread_time()

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for output in (self._file, self._ranks_file, *self._trackers):
            if output is not None:
                output.close()


def _reopen(path: Path, step: int) -> Any:
    """Opens a file of lines for appending, without those of later steps and without an unfinished last one.

    A line that was damaged is kept as it is: readers pass over it, and nothing that was written is lost.

    Raises:
        InputError: There is something that is no regular file.
    """
    if path.exists() and not path.is_file():
        raise InputError(
            f"{path}: is no regular file; remove it to go on without the earlier lines"
        )
    text = path.read_text(encoding="utf-8", errors="surrogateescape") if path.exists() else ""
    *lines, last = text.split("\n")
    if _step_of(last) is not None:
        lines.append(last)
    kept = [line for line in lines if (_step_of(line) or 0) <= step]
    lines_kept = "".join(f"{line}\n" for line in kept)
    write_bytes(path, lines_kept.encode("utf-8", "surrogateescape"))
    return path.open("a", buffering=1)


def _step_of(line: str) -> int | None:
    """The step that a line is about; None where it does not say."""
    try:
        step = json.loads(line)["step"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    return step if isinstance(step, int) else None
