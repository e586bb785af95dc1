"""Chrome traces of a few steps and snapshots of GPU memory, on demand while a run goes on."""

import logging
import pickle

import torch
from torch.profiler import ProfilerActivity, profile

from trainer.run.session import Run

logger = logging.getLogger(__name__)

STEPS = 5


class Tracer:
    """Records the next steps of this rank once it is told to; ranks are told together."""

    def __init__(self, run: Run) -> None:
        self._folder, self._runtime = run.folder / "traces", run.runtime
        self._profile: profile | None = None
        self._left = self._begun = 0

    def begin(self, step: int) -> None:
        """Records the next `STEPS` steps, unless it is recording."""
        if self._profile is not None:
            return
        gpu = self._runtime.device.type == "cuda"
        if gpu:
            torch.cuda.memory._record_memory_history()
        kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if gpu else [])]
        self._profile = profile(activities=kinds, profile_memory=True, record_shapes=True)
        self._profile.start()
        self._left, self._begun = STEPS, step

    def step(self) -> None:
        """Counts a step; after the last one writes `traces/step-N-rank-R.json`."""
        if self._profile is None:
            return
        self._left -= 1
        if self._left == 0:
            self.end()

    def end(self) -> None:
        """Writes what was recorded so far."""
        if self._profile is None:
            return
        self._profile.stop()
        self._folder.mkdir(exist_ok=True)
        path = self._folder / f"step-{self._begun:08d}-rank-{self._runtime.rank}.json"
        self._profile.export_chrome_trace(str(path))
        if self._runtime.device.type == "cuda":
            snapshot = pickle.dumps(torch.cuda.memory._snapshot())
            path.with_suffix(".memory.pickle").write_bytes(snapshot)
            torch.cuda.memory._record_memory_history(enabled=None)
        self._profile = None
        if self._runtime.is_main:
            logger.info(f"trace of {STEPS - self._left} steps: {path}")
