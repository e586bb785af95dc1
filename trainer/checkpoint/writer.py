"""Writing checkpoints, at once or while training goes on; whole or not there at all."""

import copy
import errno
import shutil
import threading
from dataclasses import asdict, replace
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed._shard.sharded_tensor import Shard
from torch.distributed.checkpoint import CheckpointException
from torchrec.distributed.types import ShardedTensor

from embeddings.optimizer import update_count
from embeddings.versions import versions
from llm_knowledge.errors import InputError
from llm_knowledge.store.manifest import file_checksum
from trainer.checkpoint.directory import FORMAT_VERSION, finish, prune
from trainer.checkpoint.loop_state import LoopState
from trainer.checkpoint.state import live_state
from trainer.distributed.process_group import on_all_ranks
from trainer.run.session import Run

GRACE_SECONDS = 10.0  # for a write that is under way when training fails


class CheckpointWriter:
    """Writes `folder/step-N` on all ranks together and removes what is not to be kept.

    Asynchronous, `save` returns as soon as the state is copied to host memory; a thread writes the copy,
    over a process group of its own. One write is under way at a time. What went wrong in it is raised by
    the next `save` or `wait`, on every rank.
    """

    def __init__(self, run: Run, folder: Path) -> None:
        train = run.config.train
        self._run, self._folder = run, folder
        self._keep = (train.keep_checkpoints, train.keep_best)
        self._thread: threading.Thread | None = None
        self._problem: BaseException | None = None
        self._group: dist.ProcessGroup | None = None
        if train.checkpoint_async:
            # Said once more: a new group has torch's half hour, not the timeout of the default group.
            timeout = timedelta(seconds=train.timeout_seconds)
            self._group = dist.new_group(backend="gloo", timeout=timeout)

    def save(self, state: LoopState) -> None:
        """Saves the run as it is now.

        Raises:
            InputError: If this write or the one before failed for a reason outside the program.
        """
        self.wait()
        updates = torch.tensor(update_count(self._run.model), device=self._run.runtime.device)
        dist.all_reduce(updates, dist.ReduceOp.MAX)
        state = replace(state, table_updates=int(updates))
        tensors = live_state(self._run)
        description = describe(self._run, state)
        target = self._folder / f"step-{state.step:08d}"
        if self._group is None:
            self._write(tensors, description, target)
            return
        tensors = {name: _copy(value) for name, value in tensors.items()}
        if self._run.runtime.device.type == "cuda":  # all copies at once, before anything trains on
            torch.cuda.synchronize(self._run.runtime.device)
        # A daemon: a process that dies of something else does not wait for its writer.
        self._thread = threading.Thread(
            target=self._write_aside, args=(tensors, description, target), daemon=True
        )
        self._thread.start()

    def wait(self) -> None:
        """Waits until the write under way is complete on all ranks.

        Raises:
            InputError: If it failed for a reason outside the program.
        """
        if self._thread is None:
            return
        self._thread.join()
        self._thread = None
        problem, self._problem = self._problem, None
        if problem is not None:
            raise problem

    def _write_aside(self, tensors: dict[str, Any], description: Any, target: Path) -> None:
        try:
            self._write(tensors, description, target)
        except BaseException as error:  # a CheckpointException is no Exception
            self._problem = error

    def _write(self, tensors: dict[str, Any], description: dict[str, Any], target: Path) -> None:
        partial = self._folder / f"{target.name}.partial"

        def begin() -> None:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)

        self._on_main(begin, target)
        try:
            dcp.save(tensors, checkpoint_id=partial, process_group=self._group)
        except CheckpointException as error:  # on every rank, with the causes of all
            raise _explain(target, error) from error
        except OSError as error:
            raise InputError(_failure(target, self._run.runtime.rank, error)) from error

        checksums = self._checksums(partial)

        def end() -> None:
            finish(partial, target, description, checksums)
            prune(self._folder, *self._keep)

        self._on_main(end, target)

    def _checksums(self, partial: Path) -> dict[str, str]:
        """Checksums of what all ranks have written, each rank having read its own files."""
        rank = self._run.runtime.rank
        of_this_rank = on_all_ranks(
            lambda: {file.name: file_checksum(file) for file in partial.glob(f"__{rank}_*")},
            self._group,
        )
        everywhere: list[dict[str, str]] = [{}] * self._run.runtime.world_size
        dist.all_gather_object(everywhere, of_this_rank, group=self._group)
        return {name: checksum for of_rank in everywhere for name, checksum in of_rank.items()}

    def _on_main(self, action: Any, target: Path) -> None:
        """Runs an action on rank 0; what the file system refuses is raised on every rank."""

        def attempt() -> None:
            if not self._run.runtime.is_main:
                return
            try:
                action()
            except OSError as error:
                raise InputError(_failure(target, 0, error)) from error

        on_all_ranks(attempt, self._group)

    def __enter__(self) -> "CheckpointWriter":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is None:
            self.wait()
        elif self._thread is not None:  # other ranks may be gone, so not for ever
            self._thread.join(GRACE_SECONDS)


def _copy(value: Any) -> Any:
    """A copy in host memory of this rank's part of a tensor."""
    if not isinstance(value, ShardedTensor):
        return _on_host(value) if isinstance(value, Tensor) else value
    metadata = copy.deepcopy(value.metadata())
    for piece in metadata.shards_metadata:
        assert piece.placement is not None
        piece.placement = torch.distributed._remote_device(f"rank:{piece.placement.rank()}/cpu")
    of_rank = {tuple(piece.shard_offsets): piece for piece in metadata.shards_metadata}
    shards = [
        Shard(
            _on_host(shard.tensor),
            of_rank[tuple(shard.metadata.shard_offsets)],
        )
        for shard in value.local_shards()
    ]
    return ShardedTensor._init_from_local_shards_and_global_metadata(shards, metadata)


def _on_host(tensor: Tensor) -> Tensor:
    """A copy in host memory; from a GPU into page-locked memory, at the bus's full rate and not awaited."""
    if tensor.device.type != "cuda":
        return tensor.detach().to("cpu", copy=True)
    copied = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return copied.copy_(tensor.detach(), non_blocking=True)


def _explain(target: Path, error: CheckpointException) -> BaseException:
    """What the file system refused on the first rank, or the error itself."""
    for rank, (cause, _) in sorted(error.failures.items()):
        if isinstance(cause, OSError):
            return InputError(_failure(target, rank, cause), shared=True)
        # Writers wrap what the file system said; its words survive in theirs.
        if "No space left" in str(cause):
            return InputError(
                _failure(target, rank, OSError(errno.ENOSPC, "No space left")), shared=True
            )
    return error


def _failure(target: Path, rank: int, error: OSError) -> str:
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    reason = "no space left for a checkpoint" if full else error.strerror or str(error)
    return (
        f"{target}: rank {rank} could not write it: {reason}; the checkpoints before it are whole: "
        f"{'free some space' if full else 'mend that'} and run again with --resume"
    )


def describe(run: Run, state: LoopState) -> dict[str, Any]:
    """What `checkpoint.json` says, but for the files."""
    return {
        "format_version": FORMAT_VERSION,
        "loop": asdict(state),
        "world_size": run.runtime.world_size,
        "tables": [asdict(table) for table in run.tables],
        "fingerprints": run.fingerprints,
        **({"means": run.means_fingerprint} if run.means_fingerprint else {}),
        **({"features": run.features_fingerprint} if run.features_fingerprint else {}),
        "config": run.config.model_dump(),
        "versions": versions(),
    }
