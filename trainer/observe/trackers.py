"""Where the numbers of a run are shown besides metrics.jsonl; imported only where asked for."""

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from llm_knowledge.errors import InputError
from trainer.config.run import RunConfig

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


def open_trackers(config: RunConfig, folder: Path, step: int) -> list[Tracker]:
    """Opens the configured trackers for a run that goes on after `step`; on rank 0.

    MLflow and Weights & Biases read servers and credentials from their own environment variables.
    """
    kinds: dict[str, Callable[[RunConfig, Path, int], Tracker]]
    kinds = {"tensorboard": _TensorBoard, "mlflow": _MLflow, "wandb": _Wandb}
    return [kinds[name](config, folder, step) for name in config.train.trackers]


class _TensorBoard:
    def __init__(self, config: RunConfig, folder: Path, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=step)

    def write(self, numbers: Mapping[str, float], step: int) -> None:
        for name, value in numbers.items():
            self._board.add_scalar(name, value, step)

    def close(self) -> None:
        self._board.close()


class _MLflow:
    def __init__(self, config: RunConfig, folder: Path, step: int) -> None:
        import mlflow

        note = folder / "mlflow-run"  # a resumed run goes on in the one that it began
        known = note.read_text() if note.exists() else None
        run = mlflow.start_run(run_id=known, run_name=None if known else config.name)
        note.write_text(run.info.run_id)
        if known is None:
            mlflow.log_dict(config.model_dump(), "config.json")
        self._mlflow: Any = mlflow

    def write(self, numbers: Mapping[str, float], step: int) -> None:
        self._mlflow.log_metrics(dict(numbers), step=step)

    def close(self) -> None:
        self._mlflow.end_run()


class _Wandb:
    def __init__(self, config: RunConfig, folder: Path, step: int) -> None:
        import wandb

        note = folder / "wandb-run"
        known = note.read_text() if note.exists() else None
        self._run = wandb.init(
            id=known, name=config.name, dir=str(folder), config=config.model_dump(), resume="allow"
        )
        note.write_text(self._run.id)

    def write(self, numbers: Mapping[str, float], step: int) -> None:
        self._run.log(dict(numbers), step=step)

    def close(self) -> None:
        self._run.finish()
