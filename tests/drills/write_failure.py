"""Two ranks of which one cannot write: run as a program, it prints what each rank was told.

Rank 1 fails in the second of two asynchronous writes.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint import FileSystemWriter

from llm_knowledge.errors import InputError
from tests.helpers.ranks import Ranks
from tests.helpers.training_data import make_config, make_inputs
from trainer.checkpoint.directory import checkpoints, problem_of
from trainer.checkpoint.loop_state import LoopState
from trainer.checkpoint.writer import CheckpointWriter
from trainer.distributed.process_group import distributed
from trainer.run.build import build
from trainer.run.inputs import open_inputs
from trainer.training.run_folder import prepare_folder


def rank_main(rank: int, root: Path) -> dict[str, Any]:
    """One rank: trains, writes, and tells what it saw."""
    config = make_config(root / "in/data", None, root / "run", train__checkpoint_async=True)
    told = ""
    with distributed(30) as runtime:
        opened = open_inputs(config, runtime)
        run = build(config, runtime, prepare_folder(config, runtime, resume=False), opened)
        folder = run.folder / "checkpoints"
        run.model.train()
        batches = iter(run.stream(["train"], shuffle=True).batches())
        with CheckpointWriter(run, folder) as writer:
            run.pipeline.progress(batches)
            writer.save(LoopState(step=1))
            writer.wait()
            if rank == 1:
                FileSystemWriter.write_data = full  # type: ignore[method-assign]
            writer.save(LoopState(step=2))
            run.pipeline.progress(batches)
            try:
                writer.save(LoopState(step=3))
            except InputError as error:
                told = str(error)
        dist.barrier()
        whole = [path.name for path in checkpoints(folder) if problem_of(path) is None]
    return {"told": told, "whole": whole}


def full(*_: Any, **__: Any) -> None:
    """A disk without space."""
    raise OSError(28, "No space left on device")


def main(root: Path) -> None:
    """Forks the ranks and prints what both were told."""
    torch.set_num_threads(1)
    make_inputs(root / "in")
    print(json.dumps(Ranks(2, rank_main, root).join()))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
