"""Watches a rank from a thread beside the loop: signals from outside, progress from inside.

Every rank writes a line about itself, `RUN/ranks/rank-N.json`, every few seconds. A rank whose loop
stands still dumps its stacks; the lowest rank that still answers names those that hold up the others.
Times of different hosts are never compared: a rank answers if its line changes.
"""

import faulthandler
import functools
import json
import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, TextIO

import torch

from llm_knowledge.files import write_json
from trainer.config.train import TrainConfig
from trainer.distributed.process_group import Runtime

logger = logging.getLogger(__name__)

TERMINATED = 143  # 128 + SIGTERM: what a shell reports of a process that was told to end
MISSED_BEATS = 4  # before a rank counts as silent
PACKAGES = ("/trainer/", "/embeddings/", "/llm_knowledge/")
# Where a thread stands that waits for other ranks, or for the backward pass that does.
COLLECTIVES = (
    "/torch/distributed/distributed_c10d",
    "/torchrec/",
    "/torch/autograd/",
    "/torch/nn/",
)


class Preempted(SystemExit):
    """Training was told to end and has saved its last step; the process ends with code 143.

    Not 0: a scheduler starts again what failed, not what is done.
    """

    def __init__(self) -> None:
        super().__init__(TERMINATED)


class Watch:
    """One rank's watch, from `with` on.

    Args:
        folder: The run.
        runtime: This rank.
        options: `hang_seconds` without progress, and the loop stands still. A rank that was told to end
            and has not, ends itself after `grace_seconds`. Without progress for twice `timeout_seconds`,
            a rank ends itself, to be started again: alone it has no collective that would fail.
    """

    def __init__(self, folder: Path, runtime: Runtime, options: TrainConfig) -> None:
        self.told_to_end = self.trace_wanted = False
        self._folder, self._runtime = folder, runtime
        self._hang = options.hang_seconds or options.timeout_seconds / 2
        self._grace, self._give_up = options.grace_seconds, 2 * options.timeout_seconds
        self._interval = min(5.0, self._hang / 10)
        self._batches, self._since = 0, time.monotonic()
        self._told_at = float("inf")
        self._main = threading.main_thread().ident or 0
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)
        self._undo: list[Callable[[], object]] = []
        self._stacks: TextIO | None = None

    def progress(self, *_: object) -> None:
        """Notes that the loop goes on."""
        self._batches, self._since = self._batches + 1, time.monotonic()

    def _told_to_end(self, number: int, frame: FrameType | None) -> None:
        self.told_to_end, self._told_at = True, min(self._told_at, time.monotonic())

    def _trace(self, number: int, frame: FrameType | None) -> None:
        self.trace_wanted = True

    def __enter__(self) -> "Watch":
        for name in ("ranks", "hang"):
            (self._folder / name).mkdir(exist_ok=True)
        self._stacks = (self._folder / "hang" / f"rank-{self._runtime.rank}.txt").open("w")
        self.progress()
        self._thread.start()
        if threading.current_thread() is threading.main_thread():  # others may not
            acts = {signal.SIGTERM: self._told_to_end, signal.SIGUSR1: self._trace}
            # A terminal that closes ends a job as a scheduler does, unless nohup says otherwise.
            if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
                acts[signal.SIGHUP] = self._told_to_end
            for number, act in acts.items():
                before = signal.signal(number, act)
                self._undo.append(functools.partial(signal.signal, number, before))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for undo in self._undo:
            undo()
        self._closed.set()
        self._thread.join()
        faulthandler.cancel_dump_traceback_later()
        (self._folder / "ranks" / f"rank-{self._runtime.rank}.json").unlink(missing_ok=True)
        if self._stacks is not None:
            self._stacks.close()
            path = Path(self._stacks.name)
            if path.stat().st_size == 0:
                path.unlink()

    # ------------------------------------------------------------ the thread

    def _run(self) -> None:
        beat, late_beats, seen = 0, 0, {}
        while not self._closed.wait(self._interval):
            beat += 1
            try:
                self._tick(beat)
                late_beats = late_beats + 1 if self._age() > self._hang else 0
                if late_beats == 1:
                    self._dump()
                    seen = self._others()
                elif late_beats == 1 + MISSED_BEATS:
                    self._report(seen, self._others())
            except OSError as error:  # slow or full storage must not end the watch
                logger.warning("watch: %s", error)

    def _age(self) -> float:
        return time.monotonic() - self._since

    def _tick(self, beat: int) -> None:
        overdue = time.monotonic() - self._told_at
        if overdue > self._grace:
            logger.error(
                f"was told to end {overdue:.0f} s ago and could not: ends without a checkpoint"
            )
            os._exit(TERMINATED)
        if self._age() > self._give_up:
            logger.error(f"no progress for {self._age():.0f} s: ends, to be started again")
            os._exit(1)
        # Should the interpreter itself be held up, this timer fires without it.
        faulthandler.dump_traceback_later(self._hang + 5, file=self._stacks or sys.stderr)
        kind, line_of_code = self._place()
        path = self._folder / "ranks" / f"rank-{self._runtime.rank}.json"
        line = {
            "beat": beat,
            "batches": self._batches,
            "seconds": round(self._age(), 1),
            "waits_for": kind,
            "at": line_of_code,
            "host": socket.gethostname(),
            "pid": os.getpid(),
        }
        write_json(path, line, durable=False)
        if self._runtime.is_main and (self._folder / "trace-request").exists():
            (self._folder / "trace-request").unlink(missing_ok=True)
            self.trace_wanted = True

    def _place(self) -> tuple[str, str]:
        """What the main thread waits for, and the line of this project that it stands in."""
        frame = sys._current_frames().get(self._main)
        files, line_of_code, inner = [], "", frame.f_code.co_filename if frame else ""
        while frame is not None:
            name = frame.f_code.co_filename
            files.append(name)
            if not line_of_code and any(package in name for package in PACKAGES):
                short = name[max(name.rfind(package) for package in PACKAGES) + 1 :]
                line_of_code = f"{short}:{frame.f_lineno} {frame.f_code.co_name}"
            frame = frame.f_back
        if any(part in inner for part in COLLECTIVES):
            return "other ranks", line_of_code
        if any("/trainer/data/" in name for name in files):
            return "input", line_of_code
        if any("checkpoint" in name for name in files):
            return "storage", line_of_code
        return "nothing known", line_of_code

    def _dump(self) -> None:
        """Writes the stacks of this rank's threads and its latest collectives."""
        assert self._stacks is not None
        self._stacks.write(f"no progress for {self._age():.0f} s, after {self._batches} batches\n")
        self._stacks.flush()
        faulthandler.dump_traceback(self._stacks, all_threads=True)
        from torch._C import _distributed_c10d

        for name in ("_dump_fr_trace_json", "_dump_nccl_trace_json"):  # gloo's and NCCL's recorder
            if dump := getattr(_distributed_c10d, name, None):
                path = self._folder / "hang" / f"rank-{self._runtime.rank}-{name[6:]}"
                path.with_suffix(".json").write_bytes(dump())

    def _others(self) -> dict[int, dict[str, Any]]:
        others = {}
        for rank in range(self._runtime.world_size):
            try:
                text = (self._folder / "ranks" / f"rank-{rank}.json").read_text()
                others[rank] = json.loads(text)
            except (OSError, ValueError):
                continue
        return others

    def _report(self, before: dict[int, dict[str, Any]], now: dict[int, dict[str, Any]]) -> None:
        ranks = range(self._runtime.world_size)
        alive = [r for r in ranks if r in now and now[r]["beat"] != before.get(r, {}).get("beat")]
        if self._runtime.rank != min(alive, default=0):
            return  # one rank speaks for all
        silent = [rank for rank in ranks if rank not in alive]
        blocked = silent or [rank for rank in ranks if now[rank]["waits_for"] != "other ranks"]
        if not blocked:
            fewest = min(line["batches"] for line in now.values())
            blocked = [rank for rank in ranks if now[rank]["batches"] == fewest]
        lines = [
            f"no progress for {self._age():.0f} s; held up by rank "
            f"{', '.join(map(str, blocked))}; stacks and latest collectives: {self._folder / 'hang'}"
        ]
        for rank in ranks:
            line = now.get(rank, {})
            words = f"waits for {line.get('waits_for')}, at {line.get('at') or 'unknown'}"
            if rank in silent:
                words = f"does not answer{_process_state(line)}; last seen: {words}"
            lines.append(f"  rank {rank}: {line.get('batches', 0)} batches, {words}")
        with (self._folder / "hang" / "report.txt").open("a") as file:
            file.write("\n".join(lines) + "\n")
        for text in lines:
            logger.error(text)


def _process_state(line: dict[str, Any]) -> str:
    """What the kernel says of a silent rank on this host."""
    if line.get("host") != socket.gethostname():
        return f" (host {line.get('host', 'unknown')})"
    try:
        text = Path(f"/proc/{line['pid']}/status").read_text()
    except OSError:
        return ": its process is gone"
    state = next(row for row in text.splitlines() if row.startswith("State:"))
    return f": process {line['pid']} is {state.split(maxsplit=1)[1]}"


def memory_gib(device: torch.device) -> float:
    """Memory of this rank: the most that was allocated on its GPU, or what the process holds."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**30
