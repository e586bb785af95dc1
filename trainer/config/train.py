"""Configuration of the loop: batches, epochs, step sizes, checkpoints, what is done when it goes wrong."""

from typing import Literal

from pydantic import Field, model_validator

from trainer.config.tables import ScheduleConfig, Section

Precision = Literal["float32", "tf32", "bf16"]
Selection = Literal["auc", "gauc", "logloss"]


class GuardConfig(Section):
    """What is done about training that goes wrong; found every log_every steps, before any checkpoint."""

    non_finite: Literal["stop", "skip", "rollback"] = Field(
        default="stop",
        description="A loss or gradient that is not finite. skip: the dense update of the step, and what "
        "the rank's batch sends to the tables, count as zero; rollback: go back to the newest checkpoint "
        "and leave the step's batch out.",
    )
    spike_factor: float | None = Field(
        default=None, gt=1, description="A loss that is so many times its running mean is a spike."
    )
    on_spike: Literal["report", "stop", "rollback"] = Field(
        default="report", description="What is done about a spike."
    )
    damage: Literal["stop", "rollback"] = Field(
        default="stop",
        description="Tables or optimizer state that are not finite, or ranks whose dense parameters "
        "differ.",
    )
    rollbacks: int = Field(default=3, ge=1, description="Rollbacks of one process, then it stops.")


class TrainConfig(Section):
    """The loop."""

    global_batch_size: int = Field(
        default=1024, ge=1, description="Samples per step over all ranks."
    )
    eval_batch_size: int | None = Field(
        default=None,
        ge=1,
        description="Samples over all ranks that are scored at once, in evaluations and predictions; "
        "default: `global_batch_size`. Larger ones are faster where a model is small.",
    )
    epochs: int = Field(default=8, ge=1, description="Passes over the training splits, at most.")
    learning_rate: float = Field(
        default=1e-3, gt=0, description="Adam step size of dense parameters."
    )
    meta_learning_rate: float = Field(
        default=1e-3, gt=0, description="Adam step size of meta networks."
    )
    knowledge_learning_rate: float | None = Field(
        default=None,
        gt=0,
        description="Adam step size of knowledge inputs and of the match, meta layers on it included; "
        "default: `meta_learning_rate`.",
    )
    schedule: ScheduleConfig = ScheduleConfig()
    meta_schedule: ScheduleConfig = ScheduleConfig()
    weight_decay: float = Field(
        default=1e-5, ge=0, description="Decoupled weight decay of dense parameters."
    )
    eval_every: int = Field(
        default=80, ge=1, description="Steps between evaluations on the valid split."
    )
    select_by: Selection = Field(
        default="auc",
        description="What makes an evaluation on the valid split the best, which checkpoint is scored, "
        "and when patience ends: auc; gauc, the AUC within users, whose predictions rank 0 collects; "
        "logloss, which also decides where the valid split has one class only.",
    )
    patience: int = Field(
        default=3, ge=1, description="Evaluations without improvement before stopping."
    )
    checkpoint_every: int = Field(default=80, ge=1, description="Steps between checkpoints.")
    checkpoint_async: bool = Field(
        default=False,
        description="Write checkpoints while training goes on, from a copy in host memory.",
    )
    keep_checkpoints: int = Field(default=1, ge=1, description="Newest checkpoints that are kept.")
    keep_best: int = Field(
        default=1, ge=1, description="Checkpoints of the best evaluations that are kept as well."
    )
    start_from: str | None = Field(
        default=None,
        description="Run (its best checkpoint) or checkpoint that a new run starts from; rows follow "
        "their ids, what is new starts fresh. `--resume` is something else: it continues one run.",
    )
    log_every: int = Field(default=10, ge=1, description="Steps between lines of metrics.jsonl.")
    continue_from: str | None = Field(
        default=None,
        description="Run directory to go on from, on data that later events were appended to: its best "
        "checkpoint is the beginning, and only rows that it has not seen are trained on.",
    )
    precision: Precision | None = Field(
        default=None,
        description="Of the products of the dense part: float32; tf32, on a GPU only; bf16, by autocast, "
        "where weights, their gradients and updates, tables, loss and predictions stay float32. Default: "
        "bf16 on a GPU, float32 on a CPU.",
    )
    seed: int = Field(
        default=0, ge=0, description="Seeds initialisation, shuffling, dropout and noise."
    )
    timeout_seconds: int = Field(
        default=600, ge=1, description="A collective that waits longer fails."
    )
    guard: GuardConfig = GuardConfig()
    trackers: list[Literal["tensorboard", "mlflow", "wandb"]] = Field(
        default=["tensorboard"],
        description="Where numbers go besides metrics.jsonl; mlflow and wandb through their own clients, "
        "which read servers and keys from their own environment variables.",
    )
    hang_seconds: float | None = Field(
        default=None,
        gt=0,
        description="Without a batch for so long, stacks of all ranks are written and those that hold up "
        "the others are named; null: half of timeout_seconds.",
    )
    grace_seconds: float = Field(
        default=25.0,
        gt=0,
        description="After SIGTERM, log_every steps and a checkpoint have this long; then the rank ends "
        "without. torchrun kills after 30 s, see its --shutdown-timeout.",
    )

    @model_validator(mode="after")
    def _one_beginning(self) -> "TrainConfig":
        if self.start_from is not None and self.continue_from is not None:
            raise ValueError(
                "start_from and continue_from: a run begins in one way, set one of them"
            )
        return self
