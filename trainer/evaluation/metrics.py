"""Exact metrics from prediction files, out of core.

DuckDB reads the prediction Parquet of a run (see the run directory in docs/explain/architecture.md) into a
temporary database that spills to disk, so a split may be far larger than memory. Counts stay
integers up to the last division, so AUC has no rounding error of its own and ties are exact.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llm_knowledge.dataset_files import read_description, split_files
from llm_knowledge.errors import InputError
from llm_knowledge.files import write_json
from llm_knowledge.locks import directory_lock
from llm_knowledge.parquet import parquet_sql
from trainer.data.fingerprint import description_fingerprint
from trainer.evaluation.predictions import (
    SPARSE_BELOW,
    RunDirectory,
    database,
    load_predictions,
    read_run,
)

if TYPE_CHECKING:
    import duckdb

SEGMENTS = ("known", "sparse", "new_in_scenario", "new_user")
TOP_K = 10
WAIT_SECONDS = 30.0  # for another command that is writing in the run
# Half the distance from 1 to the next smaller float32: clipping moves exact 0 and 1 only (and
# probabilities below 1e-7).
EPSILON = 1e-7
DEFINITIONS = {
    "auc": "probability that a random positive ranks above a random negative; a tie counts 1/2",
    "gauc": "mean of the AUC inside each user's impressions, weighted by impressions, over users "
    "with both classes",
    "logloss": f"mean negative log likelihood in nats; clipped to [{EPSILON}, 1-{EPSILON}]",
    "ne": "logloss divided by the entropy of the base rate; below 1 is better than a constant",
    "recall_at_10": "share of a user's positives among the user's 10 highest predictions, mean "
    "over users with a positive; equal predictions: mean over every order of the tie",
    "ndcg_at_10": "binary gain, discount 1/log2(rank+1), ideal over min(positives, 10); mean "
    "over users with a positive; equal predictions: mean over every order of the tie",
    "knowledge_coverage": "share of impressions whose user vector was joined",
    "segments": "new_user: no training row; new_in_scenario: has training rows, but no row of this "
    f"scenario in the profile and training windows; sparse: of the rest, fewer than {SPARSE_BELOW} "
    "positive training rows; known: the others",
}


def compute_metrics(
    predictions: list[Path] | Path,
    dataset: Path | None,
    memory_limit: str = "2GB",
) -> dict[str, Any]:
    """Computes exact metrics overall, per scenario and per segment.

    Args:
        predictions: Prediction Parquet files, one file, or a directory with `part-*.parquet`.
        dataset: Prepared dataset directory: defines segments, scenarios without rows and the Bayes
            AUC of a simulated log. None: `segments` is empty.
        memory_limit: DuckDB memory limit, for example "2GB"; beyond it tables spill to disk.

    Returns:
        `{"overall": M, "scenarios": {id: M}, "segments": {name: M}}`. M holds rows, users,
        positives, base_rate, auc, gauc, logloss, ne, recall_at_10, ndcg_at_10,
        knowledge_coverage, users_with_both_classes, users_with_positive, `undefined` (metric ->
        why it is None), and, where the dataset states it, bayes_auc and bayes_gap (bayes_auc -
        auc). Undefined values are None. Definitions and the handling of ties: `DEFINITIONS`.

    Raises:
        InputError: See `load_predictions`.
    """
    if isinstance(predictions, str | Path):
        path = Path(predictions)
        predictions = sorted(path.glob("part-*.parquet")) if path.is_dir() else [path]
        if not predictions:
            raise InputError(f"{path}: no part-*.parquet. Give one split's folder.")
    facts = read_description(dataset) if dataset is not None else None
    with database(memory_limit) as con:
        load_predictions(con, predictions, dataset)
        return _all_metrics(con, facts)


def _all_metrics(con: duckdb.DuckDBPyConnection, facts: dict[str, Any] | None) -> dict[str, Any]:
    truth = ((facts or {}).get("truth") or {}).get("bayes_auc") or {}
    overall = _grouped(con, "'overall'")
    scenarios = _grouped(con, "scenario")
    names = [str(entry["scenario_id"]) for entry in facts["scenarios"]] if facts else []
    names += sorted(set(scenarios) - set(names))
    segments = _grouped(con, "segment") if facts else {}
    result = {
        "overall": overall.get("overall") or _empty(),
        "scenarios": {name: scenarios.get(name) or _empty() for name in names},
        "segments": {name: segments.get(name) or _empty() for name in SEGMENTS} if facts else {},
    }
    for name, block in [("overall", result["overall"]), *result["scenarios"].items()]:
        if name in truth:
            block["bayes_auc"] = truth[name]
            known = truth[name] is not None and block["auc"] is not None
            block["bayes_gap"] = truth[name] - block["auc"] if known else None
    return result


def _empty() -> dict[str, Any]:
    return _block((0, 0, 0, None, None), None, None)


def _grouped(con: duckdb.DuckDBPyConnection, key: str) -> dict[str, dict[str, Any]]:
    """Metrics of every value of one of our own column expressions (never user text)."""
    clipped = f"least(greatest(prediction::DOUBLE, {EPSILON}), 1 - {EPSILON})"
    basic = con.execute(
        f"""SELECT {key} AS grp, count(*), count(DISTINCT user_id), sum(label)::BIGINT,
            favg(CASE WHEN label = 1 THEN -ln({clipped}) ELSE -ln(1 - {clipped}) END),
            favg(has_knowledge::INT) FROM p GROUP BY 1"""
    ).fetchall()
    pairs = con.execute(
        f"""WITH t AS (SELECT {key} AS grp, prediction, sum(label)::BIGINT AS pos,
                       (count(*) - sum(label))::BIGINT AS neg FROM p GROUP BY ALL),
                 w AS (SELECT grp, pos, neg, sum(neg) OVER (PARTITION BY grp ORDER BY prediction
                       ROWS BETWEEN UNBOUNDED PRECEDING AND CURRENT ROW) - neg AS below FROM t)
            SELECT grp, sum(pos * (2 * below + neg)) FROM w GROUP BY 1"""
    ).fetchall()
    per_user = con.execute(_user_sql(key)).fetchall()
    wins, users = dict(pairs), {row[0]: row[1:] for row in per_user}
    return {row[0]: _block(row[1:], wins[row[0]], users[row[0]]) for row in basic}


def _user_sql(key: str) -> str:
    """Query for ranking inside users: one row per user and distinct prediction, then per user.

    A tie spreads its positives evenly over the ranks it takes: the mean over all its orders.
    """
    # Element k + 1 is the sum of 1 / log2(rank + 1) over ranks 1..k.
    ranks = [1 / math.log2(rank + 1) for rank in range(1, TOP_K + 1)]
    discounts = [sum(ranks[:k]) for k in range(TOP_K + 1)]
    return f"""
WITH t AS (SELECT {key} AS grp, user_id, prediction, count(*) AS n, sum(label)::BIGINT AS pos
           FROM p GROUP BY ALL),
w AS (SELECT *, sum(n) OVER above - n AS start, sum(n - pos) OVER above - (n - pos) AS neg_above
      FROM t WINDOW above AS (PARTITION BY grp, user_id ORDER BY prediction DESC
                              ROWS BETWEEN UNBOUNDED PRECEDING AND CURRENT ROW)),
r AS (SELECT *, least(start, {TOP_K})::INT AS first, least(start + n, {TOP_K})::INT AS last,
      {discounts}::DOUBLE[] AS d FROM w),
u AS (SELECT grp, sum(n) AS rows, sum(pos) AS pos,
      sum(pos * (2 * neg_above + n - pos)) AS lost,
      sum(pos::DOUBLE / n * (last - first)) AS hits,
      sum(pos::DOUBLE / n * (d[last + 1] - d[first + 1])) AS gain,
      any_value(d) AS d FROM r GROUP BY grp, user_id)
SELECT grp, count(*) FILTER (both_classes), count(*) FILTER (pos > 0),
  fsum(rows * (1 - lost::DOUBLE / (2 * pos * (rows - pos)))) FILTER (both_classes)
    / sum(rows) FILTER (both_classes),
  favg(hits / pos) FILTER (pos > 0), favg(gain / d[least(pos, {TOP_K})::INT + 1]) FILTER (pos > 0)
FROM (SELECT *, pos > 0 AND pos < rows AS both_classes FROM u) GROUP BY grp
"""


def _block(
    basic: Sequence[Any], wins: int | None, per_user: Sequence[Any] | None
) -> dict[str, Any]:
    rows, users, positives, logloss, coverage = basic
    negatives = rows - positives
    undefined: dict[str, str] = {}
    single = f"{rows} rows, {positives} positive, {negatives} negative: one class only"
    auc = ne = None
    if positives and negatives and wins is not None:
        auc = wins / (2 * positives * negatives)
        rate = positives / rows
        ne = logloss / -(rate * math.log(rate) + (1 - rate) * math.log(1 - rate))
    else:
        undefined |= {"auc": single, "ne": single}
    both, with_positive, gauc, recall, ndcg = per_user or (None, None, None, None, None)
    if gauc is None:
        undefined["gauc"] = f"0 of {users} users have both classes"
    if recall is None:
        why = f"0 of {users} users have a positive"
        undefined |= {"recall_at_10": why, "ndcg_at_10": why}
    if not rows:
        undefined |= dict.fromkeys(("base_rate", "logloss", "knowledge_coverage"), "0 rows")
    return {
        "rows": rows,
        "users": users,
        "positives": positives,
        "base_rate": positives / rows if rows else None,
        "auc": auc,
        "gauc": gauc,
        "logloss": logloss,
        "ne": ne,
        "recall_at_10": recall,
        "ndcg_at_10": ndcg,
        "knowledge_coverage": coverage,
        "users_with_both_classes": both,
        "users_with_positive": with_positive,
        "undefined": undefined,
    }


def evaluation_file(run: Path, split: str = "test") -> Path:
    """Path of the evaluation of a split: `evaluation.json`, or `evaluation-valid.json`."""
    return Path(run) / ("evaluation.json" if split == "test" else f"evaluation-{split}.json")


def is_evaluation(content: Any) -> bool:
    """Whether a value read from JSON has all that `write_evaluation` writes, in its form."""
    try:
        blocks = [content["overall"], *content["scenarios"].values()]
        blocks += content["segments"].values()
        if not isinstance(content["dataset"], dict):
            return False
        numbers = [block[name] for block in blocks for name in _empty().keys() - {"undefined"}]
        return all(value is None or isinstance(value, int | float) for value in numbers)
    except (KeyError, TypeError, AttributeError, IndexError):
        return False


def write_evaluation(run: Path, split: str = "test", dataset: Path | None = None) -> dict[str, Any]:
    """Evaluates a run's predictions and writes `evaluation_file(run, split)` atomically.

    Args:
        run: Run directory.
        split: "test" or "valid".
        dataset: Prepared dataset, when it no longer lies where config.yaml says.

    Returns:
        What was written: the blocks of `compute_metrics` plus format_version, name, seed, split,
        dataset and definitions; under `labels`, the same blocks for each further label.

    Raises:
        InputError: The dataset or the predictions are missing or broken, or the predictions do not
            hold each row of the split exactly once.
    """
    if split not in ("test", "valid"):
        raise InputError(f"split '{split}' is unknown; choose test or valid.")
    directory = read_run(run)
    data = Path(dataset) if dataset is not None else directory.dataset
    if data is None:
        raise InputError(
            f"{directory.path}/config.yaml: data.path {directory.config['data']['path']} holds no "
            "dataset.json. Give the dataset's present place."
        )
    facts = read_description(data)
    # Another command may be replacing the predictions, by its own ones of the same rows.
    with directory_lock(directory.path, WAIT_SECONDS), database() as con:
        load_predictions(con, directory.predictions(split), data)
        _check_complete(con, directory, split, data, facts)
        blocks = _all_metrics(con, facts)
        for label in directory.config.get("data", {}).get("labels") or {}:
            load_predictions(con, directory.predictions(split), data, label)
            # The simulator's truth is that of the first label.
            more = _all_metrics(con, {**facts, "truth": None})
            blocks.setdefault("labels", {})[label] = more
        result = {
            "format_version": 1,
            "name": directory.arm,
            "seed": directory.seed,
            "split": split,
            "dataset": {"name": facts.get("name"), "fingerprint": description_fingerprint(facts)},
            **blocks,
            "definitions": DEFINITIONS,
        }
        write_json(evaluation_file(run, split), result)
    return result


def _check_complete(
    con: duckdb.DuckDBPyConnection,
    run: RunDirectory,
    split: str,
    dataset: Path,
    facts: dict[str, Any],
) -> None:
    """Compares predictions and split as multisets; the worst difference is an InputError."""
    keys = "user_id, item_id, scenario_id, timestamp, label"
    where = f"{run.path}/predictions/{split}"
    rows = con.execute("SELECT count(*) FROM p").fetchone()
    count, expected = (rows[0] if rows else 0), facts["rows"].get(split)
    files = split_files(dataset, split)
    odd = con.execute(
        f"""SELECT {keys}, sum(side) AS extra FROM (SELECT {keys}, 1 AS side FROM p UNION ALL
            SELECT {keys}, -1 FROM {parquet_sql(files)}) GROUP BY ALL HAVING extra <> 0
            ORDER BY abs(extra) DESC, extra DESC, user_id, timestamp LIMIT 1"""
    ).fetchone()
    if odd:
        verb = "too often" if odd[5] > 0 else "too rarely"
        raise InputError(
            f"{where}: {count} rows, the split has {expected}; for example user {odd[0]!r}, item "
            f"{odd[1]!r}, scenario {odd[2]!r}, timestamp {odd[3]}, label {odd[4]} is there "
            f"{abs(odd[5])} time(s) {verb}. Each row of the split must be there once: write the "
            "predictions again."
        )
    if count != expected:
        raise InputError(
            f"{dataset}/dataset.json: rows.{split} is {expected}, but the files hold {count}. "
            "Prepare the dataset again."
        )
