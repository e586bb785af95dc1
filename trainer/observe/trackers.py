"""Where the numbers of a run are shown besides metrics.jsonl; imported only where asked for."""

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from llm_knowledge.errors import InputError

PACKAGES = {"tensorboard": "tensorboard", "mlflow": "mlflow", "wandb": "wandb"}


class Tracker(Protocol):
    """Takes numbers by name."""

    def write(self, numbers: Mapping[str, float], step: int) -> None:
        """Takes the numbers of a step."""

    def close(self) -> None:
        """Sends what is left."""


def check_trackers(names: Sequence[str]) -> None:
    """Refuses trackers that are not installed.

    Raises:
        InputError: Names the package.
    """
    for name in names:
        if importlib.util.find_spec(PACKAGES[name]) is None:
            raise InputError(
                f"train.trackers: {name} is not installed here: pip install {PACKAGES[name]}, or remove it"
            )


@dataclass(frozen=True)
class TrackedRun:
    """What trackers are told of a run.

    Attributes:
        name: How they show it.
        settings: Its configuration, as a tree.
        folder: The run directory.
        step: After which it goes on.
    """

    name: str
    settings: dict[str, Any]
    folder: Path
    step: int


def open_trackers(names: Sequence[str], run: TrackedRun) -> list[Tracker]:
    """Opens trackers for a run that goes on; on rank 0.

    MLflow and Weights & Biases read servers and credentials from their own environment variables.
    """
    kinds: dict[str, Callable[[TrackedRun], Tracker]]
    kinds = {"tensorboard": _TensorBoard, "mlflow": _MLflow, "wandb": _Wandb}
    return [kinds[name](run) for name in names]


class _TensorBoard:
    def __init__(self, run: TrackedRun) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._board = SummaryWriter(str(run.folder / "tensorboard"), purge_step=run.step)

    def write(self, numbers: Mapping[str, float], step: int) -> None:
        for name, value in numbers.items():
            self._board.add_scalar(name, value, step)

    def close(self) -> None:
        self._board.close()


class _MLflow:
    def __init__(self, run: TrackedRun) -> None:
        import mlflow

        note = run.folder / "mlflow-run"  # a resumed run goes on in the one that it began
        known = note.read_text() if note.exists() else None
        active = mlflow.start_run(run_id=known, run_name=None if known else run.name)
        note.write_text(active.info.run_id)
        if known is None:
            mlflow.log_dict(run.settings, "config.json")
        self._mlflow: Any = mlflow

    def write(self, numbers: Mapping[str, float], step: int) -> None:
        self._mlflow.log_metrics(dict(numbers), step=step)

    def close(self) -> None:
        self._mlflow.end_run()


class _Wandb:
    def __init__(self, run: TrackedRun) -> None:
        import wandb

        note = run.folder / "wandb-run"
        known = note.read_text() if note.exists() else None
        self._run = wandb.init(
            id=known, name=run.name, dir=str(run.folder), config=run.settings, resume="allow"
        )
        note.write_text(self._run.id)

    def write(self, numbers: Mapping[str, float], step: int) -> None:
        self._run.log(dict(numbers), step=step)

    def close(self) -> None:
        self._run.finish()
