"""What an evaluation on the valid split comes to, and by what the best one is chosen."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from llm_knowledge.dataset_files import split_files
from llm_knowledge.errors import InputError
from trainer.config.train import Selection
from trainer.data.loading.loader import EventStream
from trainer.run.session import Run
from trainer.training.scoring import score

# Of equal width in logits from -LARGEST to LARGEST: rare positives are apart there, but not as
# probabilities. The AUC of so fine a histogram is exact to 1e-4 whatever the base rate.
BINS, LARGEST = 65_536, 30.0


@dataclass(frozen=True)
class Evaluation:
    """Metrics of a split over all ranks; None where they are undefined.

    Attributes:
        logloss: Mean negative log likelihood in nats.
        normalised_entropy: Logloss divided by the entropy of the base rate; None for one class.
        auc: Of a histogram, exact to 1e-4; None for one class.
        gauc: As `evaluate` computes it; None where it was not asked for, or no user has both classes.
    """

    logloss: float
    normalised_entropy: float | None = None
    auc: float | None = None
    gauc: float | None = None

    def criterion(self, select_by: Selection) -> tuple[Selection, float]:
        """By what evaluations of this split are compared, and the number, higher for better models.

        A ranking metric that the split does not define is replaced by the logloss, the same at every
        evaluation since labels do not change.
        """
        ranking = {"auc": self.auc, "gauc": self.gauc, "logloss": None}[select_by]
        return ("logloss", -self.logloss) if ranking is None else (select_by, ranking)


def measure(run: Run, events: EventStream, split: str | None = None) -> Evaluation:
    """Evaluates a split over all ranks, in constant memory but for GAUC.

    Args:
        run: The run.
        events: The split, every row once, in the order of its files.
        split: Its name where GAUC is wanted: rank 0 then holds 20 bytes of each of its rows.

    Raises:
        InputError: On all ranks: predictions are not finite.
    """
    device = run.runtime.device
    counts = torch.zeros(2, BINS, dtype=torch.float64, device=device)
    sums = torch.zeros(2, dtype=torch.float64, device=device)
    scored = []
    for predictions in score(run, events):
        shifted = predictions.logits.float().nan_to_num().clamp(-LARGEST, LARGEST) + LARGEST
        bins = (shifted * (BINS / (2 * LARGEST))).long().clamp(max=BINS - 1)
        for label in (0, 1):
            counts[label].index_add_(
                0, bins, (predictions.weight * (predictions.label == label)).double()
            )
        loss = F.binary_cross_entropy_with_logits(
            predictions.logits, predictions.label, predictions.weight, reduction="sum"
        )
        sums += torch.stack([loss, predictions.weight.sum()]).double()
        if split is not None:
            scored.append(torch.stack([predictions.logits.sigmoid(), predictions.label]).float())
    dist.all_reduce(counts)
    dist.all_reduce(sums)
    if not torch.isfinite(sums).all():
        raise InputError(
            f"{run.folder}: predictions are not finite, training has diverged; lower train.learning_rate, "
            "train.meta_learning_rate or tables.learning_rate",
            shared=True,
        )
    total, rows = sums.tolist()
    logloss, rate = total / rows, counts[1].sum().item() / rows
    entropy = -sum(share * math.log(share) for share in (rate, 1 - rate) if share > 0)
    return Evaluation(
        logloss,
        logloss / entropy if entropy else None,
        histogram_auc(counts),
        None if split is None else _gauc(run, events, split, torch.cat(scored, 1)),
    )


def histogram_auc(counts: Tensor) -> float | None:
    """AUC from [2, bins] counts of negatives and positives; a shared bin counts as a tie."""
    negatives, positives = counts
    pairs = negatives.sum() * positives.sum()
    if pairs == 0:
        return None
    below = negatives.cumsum(0) - negatives
    return ((positives * (below + 0.5 * negatives)).sum() / pairs).item()


def _gauc(run: Run, events: EventStream, split: str, scored: Tensor) -> float | None:
    """GAUC over all ranks of this rank's predictions and labels, float32 [2, rows with padding].

    A user's rows lie on several ranks, so rank 0 gets all predictions; it reads the users itself.
    """
    runtime, device = run.runtime, scored.device
    ranks = range(runtime.world_size)
    rows = torch.zeros(runtime.world_size, dtype=torch.int64, device=device)
    rows[runtime.rank] = events.stop - events.start
    dist.all_reduce(rows)
    lengths = rows.tolist()
    sent = scored.new_zeros(2, max(lengths))
    sent[:, : lengths[runtime.rank]] = scored[:, : lengths[runtime.rank]]
    received = [torch.empty_like(sent) for _ in ranks] if runtime.is_main else None
    dist.gather(sent, received)
    result = torch.full((1,), math.nan, dtype=torch.float64, device=device)
    if received is not None:
        parts = [part[:, :length] for part, length in zip(received, lengths, strict=True)]
        predictions, labels = torch.cat(parts, 1).cpu().numpy()
        gauc = grouped_auc(_users(run.config.data.path, split), predictions, labels)
        result.fill_(math.nan if gauc is None else gauc)
    dist.broadcast(result, 0)
    return None if result.isnan().item() else result.item()


def _users(data: str, split: str) -> np.ndarray:
    """A number for the user of every row of a split, int32 [rows], equal where the user is."""
    parts = [pq.read_table(part, columns=["user_id"]) for part in split_files(data, split)]
    users = pa.concat_tables(parts).column("user_id").combine_chunks()
    return users.dictionary_encode().indices.to_numpy()


def grouped_auc(users: np.ndarray, predictions: np.ndarray, labels: np.ndarray) -> float | None:
    """Mean of the AUC inside each user's rows, weighted by rows, over users with both classes.

    Args:
        users: Numbers of users, integers [rows].
        predictions: Floats [rows]; a tie counts 1/2.
        labels: 0 or 1, [rows].

    Returns:
        The mean, or None if no user has both classes.
    """
    order = np.lexsort((predictions, users))
    users, predictions, labels = users[order], predictions[order], labels[order].astype(np.int64)
    starts_user = np.diff(users, prepend=users[0] - 1) != 0
    starts_tie = starts_user | (np.diff(predictions, prepend=predictions[0]) != 0)
    ties, first_ties = np.flatnonzero(starts_tie), np.flatnonzero(starts_user[starts_tie])
    positives = np.add.reduceat(labels, ties)
    negatives = np.diff(np.append(ties, len(users))) - positives
    # Negatives below a tie, counted from the first row of its user.
    below = np.cumsum(negatives) - negatives
    ties_per_user = np.diff(np.append(first_ties, len(ties)))
    below -= np.repeat(below[first_ties], ties_per_user)
    half_wins = np.add.reduceat(positives * (2 * below + negatives), first_ties)
    positives, negatives = (
        np.add.reduceat(counts, first_ties) for counts in (positives, negatives)
    )
    both = (positives > 0) & (negatives > 0)
    if not both.any():
        return None
    aucs = half_wins[both] / (2 * positives[both] * negatives[both])
    return float(np.average(aucs, weights=(positives + negatives)[both]))
