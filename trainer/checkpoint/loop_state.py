"""Where a training loop stands. Its numbers change here and nowhere else."""

from collections.abc import Iterable
from dataclasses import dataclass, field


@dataclass
class LoopState:
    """Where the loop stands; everything else is derived from the configuration.

    Attributes:
        step: Updates done.
        epoch: Passes done.
        auc: AUC on the valid split at this step; None where it was not measured.
        best_auc: The best AUC so far.
        best_step: Its step; 0 before the first evaluation.
        evaluations_without_gain: Evaluations since then.
        finished: Whether training is over.
        table_updates: What `embeddings.optimizer.update_count` gives.
        left_out: Steps, from 0, whose batches a rollback has left out.
    """

    step: int = 0
    epoch: int = 0
    auc: float | None = None
    best_auc: float | None = None
    best_step: int = 0
    evaluations_without_gain: int = 0
    finished: bool = False
    table_updates: int = 0
    left_out: list[int] = field(default_factory=list)

    def count_step(self, step: int, steps_per_epoch: int) -> None:
        """Notes that the update of `step`, from 0, is done."""
        self.step = step + 1
        self.epoch, self.auc = self.step // steps_per_epoch, None

    def record_evaluation(self, auc: float | None) -> bool:
        """Takes an evaluation at this step; returns whether it is the best so far."""
        self.auc = auc
        improved = auc is not None and (self.best_auc is None or auc > self.best_auc)
        self.evaluations_without_gain = 0 if improved else self.evaluations_without_gain + 1
        if improved or self.best_step == 0:
            self.best_auc, self.best_step = auc, self.step
        return improved

    def finish_if_done(self, total: int, patience: int) -> None:
        """Ends training after `total` steps, or after `patience` evaluations without gain."""
        self.finished = self.step == total or self.evaluations_without_gain >= patience

    def forget_best(self) -> None:
        """Lets the next evaluation be the best: the checkpoint of the best one is damaged.

        A finished run has no next one: its last step is the best that there is.
        """
        self.best_step, self.best_auc = (self.step, self.auc) if self.finished else (0, None)

    def leave_out(self, steps: Iterable[int]) -> None:
        """Leaves out the batches of these steps, from 0, from now on."""
        self.left_out = sorted({*self.left_out, *steps})
