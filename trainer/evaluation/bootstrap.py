"""Paired bootstrap over users: the three metrics of many runs under many user weights at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from llm_knowledge.dataset_files import read_description
from llm_knowledge.errors import InputError
from trainer.data.fingerprint import description_fingerprint
from trainer.evaluation.metrics import EPSILON, SEGMENTS
from trainer.evaluation.predictions import (
    RunDirectory,
    database,
    load_predictions,
)

METRICS = ("auc", "gauc", "logloss")
_BLOCK_CELLS = 2**20  # cells of one [rows, samples] work array: small enough for the cache


@dataclass(frozen=True)
class ScoredRows:
    """Test rows in one order for all runs.

    Attributes:
        user: Dense user number per row, int64 [rows].
        users: Number of distinct users.
        label: int8 [rows].
        prediction: float32 [runs, rows].
        sections: (kind, key, row numbers) of every part of the table.
    """

    user: np.ndarray
    users: int
    label: np.ndarray
    prediction: np.ndarray
    sections: list[tuple[str, str, np.ndarray]]


def read_sorted(run: RunDirectory, dataset: Path | None, split: str) -> dict[str, np.ndarray]:
    """Reads a run's predictions as columns in an order that is the same for every run.

    Args:
        run: The run.
        dataset: Dataset that defines column `segment`; None leaves it null.
        split: "test" or "valid".
    """
    with database() as con:
        load_predictions(con, run.predictions(split), dataset)
        table = con.execute(
            """SELECT user_id, item_id, scenario, timestamp, label, prediction, segment,
               has_knowledge FROM p
               ORDER BY user_id, item_id, scenario, timestamp, label, prediction"""
        ).to_arrow_table()
    return {name: table[name].to_numpy(zero_copy_only=False) for name in table.column_names}


def load_rows(
    runs: Sequence[RunDirectory], split: str = "test", segment: str | None = None
) -> ScoredRows:
    """Reads the predictions of several runs and puts them in one order.

    Memory: about 4 bytes per row and run, plus one run's columns at a time.

    Raises:
        InputError: A run was made from another dataset or predicts other rows (names the run).
    """
    first = runs[0]
    if first.dataset is None:
        raise InputError(
            f"{first.path}/config.yaml: data.path {first.config['data']['path']} holds no "
            "dataset.json; it defines the segments. Put the dataset back or correct the path."
        )
    facts = read_description(first.dataset)
    base = read_sorted(first, first.dataset, split)
    predictions = [base["prediction"]]
    for run in runs[1:]:
        if run.dataset is not None:
            other = description_fingerprint(read_description(run.dataset))
            if other != description_fingerprint(facts):
                raise InputError(
                    f"{run.path}: trained on another dataset ({run.dataset}) than {first.path} "
                    f"({first.dataset}). Only runs on the same prepared dataset can be compared."
                )
        rows = read_sorted(run, None, split)
        for name in ("user_id", "item_id", "scenario", "timestamp", "label"):
            if not np.array_equal(rows[name], base[name]):
                raise InputError(
                    f"{run.path}: its {split} predictions are for other rows than those of "
                    f"{first.path} (column '{name}'). Evaluate both runs on the same dataset."
                )
        predictions.append(rows["prediction"])
    keep = np.arange(len(base["label"]))
    if segment is not None:
        keep = keep[base["segment"] == segment]
        if not len(keep):
            raise InputError(f"segment '{segment}' has no {split} row in {first.dataset}.")
    codes, user = np.unique(base["user_id"][keep], return_inverse=True)
    sections = [("overall", "overall", np.arange(len(keep)))]
    names = [str(entry["scenario_id"]) for entry in facts["scenarios"]]
    sections += [("scenario", n, np.flatnonzero(base["scenario"][keep] == n)) for n in names]
    if segment is None:
        sections += [("segment", n, np.flatnonzero(base["segment"] == n)) for n in SEGMENTS]
    return ScoredRows(
        user=user,
        users=len(codes),
        label=base["label"][keep],
        prediction=np.stack([values[keep] for values in predictions]),
        sections=sections,
    )


class WeightedAuc:
    """AUC of fixed rows under many user weights, ties exact.

    Rows are sorted once; every weighting then costs one cumulative sum. Weights are whole numbers
    in float64, so every sum is exact below 2**53 weighted pairs.

    Args:
        user: int64 [rows], user number of each row.
        label: int8 [rows], 0 or 1.
        prediction: float [rows].
    """

    def __init__(self, user: np.ndarray, label: np.ndarray, prediction: np.ndarray):
        order = np.argsort(prediction, kind="stable")
        user, label, prediction = user[order], label[order], prediction[order]
        negative = label == 0
        self._negative_user = user[negative]
        # A positive beats the first `start` negatives and ties with those in [start, stop).
        positive_score = prediction[~negative]
        start = np.searchsorted(prediction[negative], positive_score, side="left")
        stop = np.searchsorted(prediction[negative], positive_score, side="right")
        self._positive_user, self._start, self._stop = user[~negative], start, stop
        self._has_ties = bool((start != stop).any())

    def __call__(self, weights: np.ndarray) -> np.ndarray:
        """AUC for each column of weights [users, samples]: float64 [samples], or NaN."""
        values = np.empty(weights.shape[1])
        below = np.zeros(len(self._negative_user) + 1)
        # One sample at a time: its user weights stay in the cache while rows pick from them.
        for sample, weight in enumerate(np.ascontiguousarray(weights.T)):
            np.cumsum(weight[self._negative_user], out=below[1:])
            won = below[self._start]
            if self._has_ties:
                won = (won + below[self._stop]) / 2
            positive = weight[self._positive_user]
            pairs = positive.sum() * below[-1]
            values[sample] = (positive @ won) / pairs if pairs > 0 else np.nan
        return values


def user_aucs(
    user: np.ndarray, label: np.ndarray, prediction: np.ndarray, users: int
) -> np.ndarray:
    """AUC inside each user, float64 [users], ties exact; NaN where a user lacks a class."""
    order = np.lexsort((prediction, user))
    user, label, prediction = user[order], label[order], prediction[order]
    rank = np.arange(1, len(user) + 1, dtype=np.float64)
    if len(user):
        new = np.r_[True, (user[1:] != user[:-1]) | (prediction[1:] != prediction[:-1])]
        tie = np.cumsum(new) - 1
        rank = (np.bincount(tie, rank) / np.bincount(tie))[tie]
    rows = np.bincount(user, minlength=users)
    positives = np.bincount(user, label, minlength=users)
    before = np.cumsum(rows) - rows
    ranks = np.bincount(user, (rank - before[user]) * label, minlength=users)
    pairs = positives * (rows - positives)
    wins = ranks - positives * (positives + 1) / 2
    return np.divide(wins, pairs, out=np.full(users, np.nan), where=pairs > 0)


class SectionStatistics:
    """Everything needed to recompute the three metrics of one section for weighted users."""

    def __init__(self, rows: ScoredRows, index: np.ndarray):
        user, label = rows.user[index], rows.label[index]
        self.rows, self.users = len(index), len(np.unique(user))
        runs = len(rows.prediction)
        self._auc = [WeightedAuc(user, label, p[index]) for p in rows.prediction]
        self._count = np.bincount(user, minlength=rows.users).astype(np.float64)
        self._loss = np.empty((runs, rows.users))
        self._user_auc = np.empty((runs, rows.users))
        for run, prediction in enumerate(rows.prediction):
            p = np.clip(prediction[index].astype(np.float64), EPSILON, 1 - EPSILON)
            loss = -np.log(np.where(label == 1, p, 1 - p))
            self._loss[run] = np.bincount(user, loss, minlength=rows.users)
            self._user_auc[run] = user_aucs(user, label, prediction[index], rows.users)
        # Whether a user has both classes depends on labels alone: the same for every run.
        both = ~np.isnan(self._user_auc[0])
        self._impressions = np.where(both, self._count, 0.0)
        self._user_auc = np.where(both, self._user_auc, 0.0) * self._impressions

    def statistics(self, weights: np.ndarray) -> np.ndarray:
        """Metrics for weights [users, samples]: float64 [metrics, runs, samples], or NaN."""
        with np.errstate(invalid="ignore", divide="ignore"):
            auc = np.stack([auc(weights) for auc in self._auc])
            gauc = (self._user_auc @ weights) / (self._impressions @ weights)
            logloss = (self._loss @ weights) / (self._count @ weights)
        return np.stack([auc, gauc, logloss])


def user_weights(users: int, samples: int, rng: np.random.Generator) -> np.ndarray:
    """Times each user is drawn, with replacement: float64 [users, samples]."""
    draws = [np.bincount(rng.integers(0, users, users), minlength=users) for _ in range(samples)]
    return np.stack(draws, axis=1).astype(np.float64)


def bootstrap(
    rows: ScoredRows, samples: int, seed: int
) -> tuple[list[SectionStatistics], np.ndarray, np.ndarray]:
    """Computes every metric of every run, plain and for resampled users.

    Args:
        rows: Rows of all runs.
        samples: Number of user resamples; every run gets the same ones.
        seed: Seed of the resampling.

    Returns:
        The sections, values float64 [sections, metrics, runs] and resampled values float64
        [sections, metrics, runs, samples]; NaN where a metric is undefined.
    """
    sections = [SectionStatistics(rows, index) for _, _, index in rows.sections]
    ones = np.ones((rows.users, 1))
    values = np.stack([section.statistics(ones)[..., 0] for section in sections])
    resampled = np.empty((*values.shape, samples))
    rng = np.random.default_rng(seed)
    step = int(np.clip(_BLOCK_CELLS // max(len(rows.label), 1), 1, 128))
    for start in range(0, samples, step):
        weights = user_weights(rows.users, min(step, samples - start), rng)
        for number, section in enumerate(sections):
            block = section.statistics(weights)
            resampled[number, ..., start : start + block.shape[-1]] = block
    return sections, values, resampled


def seed_draws(runs: int, samples: int, rng: np.random.Generator) -> np.ndarray:
    """Weights of a group's runs in each sample: float64 [runs, samples], columns sum to 1.

    Draws runs - 1 of the runs with replacement: drawing all n of a few seeds would understate the
    variance of their mean by (n - 1) / n; n - 1 draws make it unbiased.
    """
    draws = max(runs - 1, 1)
    return rng.multinomial(draws, np.full(runs, 1 / runs), size=samples).T / draws
