"""Where a training loop stands. Its numbers change here and nowhere else."""

from collections.abc import Iterable
from dataclasses import dataclass, field


@dataclass
class LoopState:
    """Where the loop stands; everything else is derived from the configuration.

    Attributes:
        step: Updates done.
        epoch: Passes done.
        auc: AUC on the valid split at this step; None where it was not measured or is undefined.
        score: What evaluations are compared by (`train.select_by`), None where there was none; higher is
            better.
        best_auc: AUC of the best evaluation so far.
        best_score: Its score.
        best_by: What that is: auc, gauc or logloss.
        best_normalised_entropy: Its logloss over the entropy of the base rate.
        best_step: Its step; 0 before the first evaluation: then the newest step is the best.
        evaluations_without_gain: Evaluations since then.
        finished: Whether training is over.
        table_updates: What `embeddings.optimizer.update_count` gives.
        left_out: Steps, from 0, whose batches a rollback has left out.
    """

    step: int = 0
    epoch: int = 0
    auc: float | None = None
    score: float | None = None
    best_auc: float | None = None
    best_score: float | None = None
    best_by: str | None = None
    best_normalised_entropy: float | None = None
    best_step: int = 0
    evaluations_without_gain: int = 0
    finished: bool = False
    table_updates: int = 0
    left_out: list[int] = field(default_factory=list)

    def count_step(self, step: int, steps_per_epoch: int) -> None:
        """Notes that the update of `step`, from 0, is done."""
        self.step = step + 1
        self.epoch, self.auc, self.score = self.step // steps_per_epoch, None, None

    def record_evaluation(
        self, criterion: tuple[str, float], auc: float | None, normalised_entropy: float | None
    ) -> bool:
        """Takes an evaluation at this step; returns whether it is the best so far.

        Args:
            criterion: What it is judged by, and its score.
            auc: Its AUC, None where undefined.
            normalised_entropy: Likewise.
        """
        self.auc, (name, self.score) = auc, criterion
        improved = self.best_score is None or self.score > self.best_score
        self.evaluations_without_gain = 0 if improved else self.evaluations_without_gain + 1
        if improved:
            self.best_step, self.best_score, self.best_by = self.step, self.score, name
            self.best_auc, self.best_normalised_entropy = auc, normalised_entropy
        return improved

    def finish_if_done(self, total: int, patience: int) -> None:
        """Ends training after `total` steps, or after `patience` evaluations without gain."""
        self.finished = self.step == total or self.evaluations_without_gain >= patience

    def forget_best(self) -> None:
        """Lets the next evaluation be the best: the checkpoint of the best one is damaged.

        A finished run has no next one: its last step is the best that there is.
        """
        self.best_step, self.best_score, self.best_auc = 0, None, None
        self.best_by = self.best_normalised_entropy = None
        if self.finished:
            self.best_step, self.best_score, self.best_auc = self.step, self.score, self.auc

    def leave_out(self, steps: Iterable[int]) -> None:
        """Leaves out the batches of these steps, from 0, from now on."""
        self.left_out = sorted({*self.left_out, *steps})
