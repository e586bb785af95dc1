"""Metrics against brute-force oracles, and what happens to bad predictions."""

import itertools
import json
import math
from collections import defaultdict

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from llm_knowledge.errors import InputError
from tests.helpers.evaluation_data import make_dataset, make_run, noisy_truth, write_rows
from trainer.evaluation import metrics
from trainer.evaluation.metrics import compute_metrics, write_evaluation
from trainer.evaluation.predictions import database, load_predictions


def rows_of(user, label, prediction, scenario=None):
    n = len(user)
    return {
        "user_id": pa.array(user, pa.int64()),
        "item_id": pa.array(range(n), pa.int64()),
        "scenario_id": pa.array(scenario or ["a"] * n),
        "timestamp": pa.array(range(n), pa.int64()),
        "label": pa.array(label, pa.int8()),
        "prediction": pa.array(prediction, pa.float32()),
        "has_knowledge": pa.array([u % 2 == 0 for u in user]),
    }


def brute_auc(label, prediction):
    pos = [p for y, p in zip(label, prediction, strict=True) if y]
    neg = [p for y, p in zip(label, prediction, strict=True) if not y]
    if not pos or not neg:
        return None
    return sum((p > n) + 0.5 * (p == n) for p in pos for n in neg) / (len(pos) * len(neg))


def by_user(user, label, prediction):
    groups = defaultdict(lambda: ([], []))
    for u, y, p in zip(user, label, prediction, strict=True):
        groups[u][0].append(y)
        groups[u][1].append(p)
    return groups


def brute_ranking(label, prediction, k=10):
    """Recall and NDCG of one user by trying every order of tied rows (so: few rows)."""
    recalls, gains = [], []
    for order in itertools.permutations(range(len(label))):
        ranked = [prediction[i] for i in order]
        if any(a < b for a, b in itertools.pairwise(ranked)):
            continue
        top = [label[i] for i in order][:k]
        ideal = sum(1 / math.log2(r + 2) for r in range(min(sum(label), k)))
        recalls.append(sum(top) / sum(label))
        gains.append(sum(y / math.log2(r + 2) for r, y in enumerate(top)) / ideal)
    return np.mean(recalls), np.mean(gains)


@pytest.fixture
def log(tmp_path):
    rng = np.random.default_rng(3)
    user = rng.integers(0, 25, 400).tolist()
    label = rng.integers(0, 2, 400).tolist()
    prediction = (rng.integers(0, 12, 400) / 12).astype(np.float32).tolist()  # many ties
    write_rows(tmp_path / "p", rows_of(user, label, prediction), parts=3)
    return tmp_path / "p", user, label, prediction


def test_auc_with_ties_equals_pair_counting(log):
    path, _, label, prediction = log
    assert compute_metrics(path, None)["overall"]["auc"] == brute_auc(label, prediction)


def test_gauc_is_impression_weighted_mean_over_users_with_both_classes(log):
    path, user, label, prediction = log
    parts = [(brute_auc(y, p), len(y)) for y, p in by_user(user, label, prediction).values()]
    parts = [(auc, n) for auc, n in parts if auc is not None]
    expected = sum(auc * n for auc, n in parts) / sum(n for _, n in parts)
    block = compute_metrics(path, None)["overall"]
    assert block["gauc"] == pytest.approx(expected, abs=1e-12)
    assert block["users_with_both_classes"] == len(parts)


def test_logloss_and_normalised_entropy(log):
    path, _, label, prediction = log
    p = np.clip(np.asarray(prediction, np.float64), 1e-7, 1 - 1e-7)
    y = np.asarray(label)
    loss = -np.mean(y * np.log(p) + (1 - y) * np.log(1 - p))
    rate = y.mean()
    entropy = -(rate * np.log(rate) + (1 - rate) * np.log(1 - rate))
    block = compute_metrics(path, None)["overall"]
    assert block["logloss"] == pytest.approx(loss, rel=1e-12)
    assert block["ne"] == pytest.approx(loss / entropy, rel=1e-12)
    assert block["positives"] == y.sum()
    assert block["base_rate"] == y.mean()


def test_constant_base_rate_has_ne_one_and_auc_half(tmp_path):
    label = [1, 0, 0, 0] * 8
    write_rows(tmp_path, rows_of([0] * 32, label, [0.25] * 32))
    block = compute_metrics(tmp_path, None)["overall"]
    assert block["ne"] == pytest.approx(1)
    assert block["auc"] == block["gauc"] == 0.5
    assert block["recall_at_10"] == pytest.approx(10 / 32)  # a constant earns what chance earns


@pytest.mark.parametrize("k", [3, 10])
def test_recall_and_ndcg_equal_the_mean_over_all_orders_of_ties(tmp_path, k, monkeypatch):
    rng = np.random.default_rng(k)
    user = [0] * 7 + [1] * 6 + [2] * 5
    label = [*rng.integers(0, 2, 13).tolist(), 0, 0, 0, 0, 0]
    prediction = (rng.integers(1, 4, 18) / 4).tolist()
    monkeypatch.setattr(metrics, "TOP_K", k)
    write_rows(tmp_path, rows_of(user, label, prediction))
    block = compute_metrics(tmp_path, None)["overall"]
    expected = [
        brute_ranking(y, p, k) for y, p in by_user(user, label, prediction).values() if sum(y)
    ]
    assert block["users_with_positive"] == len(expected) == 2
    assert block["recall_at_10"] == pytest.approx(np.mean([r for r, _ in expected]))
    assert block["ndcg_at_10"] == pytest.approx(np.mean([g for _, g in expected]))


def test_ranking_beyond_ten_without_ties(tmp_path):
    rng = np.random.default_rng(5)
    label, prediction = rng.integers(0, 2, 60).tolist(), rng.permutation(60) / 60
    write_rows(tmp_path, rows_of([7] * 60, label, prediction))
    top = np.asarray(label)[np.argsort(-prediction)][:10]
    discount = 1 / np.log2(np.arange(2, 12))
    block = compute_metrics(tmp_path, None)["overall"]
    assert block["recall_at_10"] == pytest.approx(top.sum() / sum(label))
    assert block["ndcg_at_10"] == pytest.approx((top * discount).sum() / discount.sum())


@pytest.mark.parametrize("label", [0, 1])
def test_single_class_is_none_with_a_reason(tmp_path, label):
    write_rows(tmp_path, rows_of([0, 1, 2], [label] * 3, [0.1, 0.2, 1.0]))
    block = compute_metrics(tmp_path, None)["overall"]
    assert block["auc"] is block["ne"] is block["gauc"] is None
    assert "one class" in block["undefined"]["auc"]
    assert block["undefined"]["gauc"] == "0 of 3 users have both classes"
    assert (block["recall_at_10"] is None) == (label == 0)
    assert math.isfinite(block["logloss"])


def test_two_classes_of_different_users_have_auc_and_no_gauc(tmp_path):
    write_rows(tmp_path, rows_of([0, 0, 1], [1, 1, 0], [0.9, 0.4, 0.6]))
    block = compute_metrics(tmp_path, None)["overall"]
    assert block["auc"] == 0.5
    assert block["gauc"] is None
    assert block["undefined"] == {"gauc": "0 of 2 users have both classes"}


def test_scenarios_segments_and_bayes_gap(tmp_path):
    data = make_dataset(tmp_path / "data")
    run = make_run(tmp_path / "run", data, noisy_truth(data, 0.1, 0))
    result = write_evaluation(run)
    assert result == json.loads((run / "evaluation.json").read_text())
    overall, scenarios, segments = (result[k] for k in ("overall", "scenarios", "segments"))
    assert list(scenarios) == ["comedy", "drama"]
    assert sum(block["rows"] for block in scenarios.values()) == overall["rows"] == 480
    assert overall["bayes_gap"] == pytest.approx(0.8 - overall["auc"])
    assert scenarios["drama"]["bayes_auc"] is None
    test = pq.ParquetDataset(data / "test").read()
    user = np.asarray(test["user_id"])
    drama = np.asarray(test["scenario_id"].to_pylist()) == "drama"
    assert segments["new_user"]["rows"] == (user % 10 == 0).sum()
    seen = set()
    for split in ("profile", "train"):
        table = pq.ParquetDataset(data / split).read()
        seen |= set(
            zip(table["user_id"].to_pylist(), table["scenario_id"].to_pylist(), strict=True)
        )
    new = [
        u % 10 != 0 and (u, "drama" if d else "comedy") not in seen
        for u, d in zip(user.tolist(), drama.tolist(), strict=True)
    ]
    assert sum(new) >= ((user % 10 == 1) & drama).sum() > 0
    assert segments["new_in_scenario"]["rows"] == sum(new)
    train = pq.ParquetDataset(data / "train").read()
    liked = np.asarray(train["user_id"])[np.asarray(train["label"]) == 1]
    few = np.array([np.sum(liked == u) < 5 for u in user]) & (user % 10 != 0) & ~np.array(new)
    assert 0 < segments["sparse"]["rows"] == few.sum() < len(few)
    assert segments["known"]["rows"] + few.sum() + sum(new) + (user % 10 == 0).sum() == len(user)
    assert overall["knowledge_coverage"] == pytest.approx((user % 4 != 3).mean())


def test_valid_split_goes_to_its_own_file(tmp_path):
    data = make_dataset(tmp_path / "data")
    run = make_run(tmp_path / "run", data, noisy_truth(data, 0.1, 0))
    assert write_evaluation(run, "valid")["split"] == "valid"
    assert (run / "evaluation-valid.json").is_file()
    assert not (run / "evaluation.json").exists()


def test_scenario_without_test_rows_is_listed(tmp_path):
    data = make_dataset(tmp_path / "data")
    facts = json.loads((data / "dataset.json").read_text())
    facts["scenarios"].append({"scenario_id": "western", "name": "Western", "description": ""})
    (data / "dataset.json").write_text(json.dumps(facts))
    run = make_run(tmp_path / "run", data, noisy_truth(data, 0.1, 0))
    block = write_evaluation(run)["scenarios"]["western"]
    assert block["rows"] == 0
    assert block["logloss"] is None


def edit_part(run, change):
    part = run / "predictions" / "test" / "part-00000.parquet"
    pq.write_table(change(pq.read_table(part)), part)


def replace_value(name, value):
    def change(table):
        values = table[name].to_pylist()
        values[5] = value
        index = table.column_names.index(name)
        return table.set_column(index, name, pa.array(values, table.schema.field(name).type))

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (replace_value("prediction", float("nan")), r"part-00000.parquet: row 5 .*nan"),
        (replace_value("prediction", 1.5), r"row 5 .*1\.5, must be a number in \[0, 1\]"),
        (replace_value("prediction", -0.1), r"row 5 .*must be a number in \[0, 1\]"),
        (replace_value("prediction", float("inf")), r"row 5 .*inf"),
        (replace_value("prediction", None), r"row 5 .*null"),
        (replace_value("label", 2), r"row 5 .*label is 2, must be 0 or 1"),
        (lambda t: t.drop_columns(["label"]), r"column 'label' is missing"),
        (
            lambda t: t.add_column(0, "Label", pa.array([0] * t.num_rows)),
            r"two columns are called 'label'",
        ),
        (lambda t: t.slice(1), r"479 rows, the split has 480.*too rarely"),
        (lambda t: pa.concat_tables([t, t.slice(3, 1)]), r"481 rows.*1 time\(s\) too often"),
        (
            lambda t: pa.concat_tables([t.slice(1), t.slice(3, 1)]),
            r"480 rows.*time\(s\) too often",
        ),
        (replace_value("user_id", 10**9), r"1000000000.*too often"),
        (
            lambda t: t.set_column(0, "user_id", pa.array(map(str, t["user_id"].to_pylist()))),
            r"another dataset",
        ),
    ],
)
def test_bad_predictions_are_named_and_nothing_is_written(tmp_path, change, message):
    data = make_dataset(tmp_path / "data")
    run = make_run(tmp_path / "run", data, noisy_truth(data, 0.1, 0))
    (run / "evaluation.json").write_text("earlier")
    edit_part(run, change)
    with pytest.raises(InputError, match=message):
        write_evaluation(run)
    assert (run / "evaluation.json").read_text() == "earlier"
    assert not list(run.glob(".*"))


@pytest.mark.parametrize("label", [None, "bought"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_numbers_that_statistics_do_not_show_are_found(tmp_path, label, value):
    """One part with statistics: its minimum and maximum leave NaN out."""
    name = "prediction" if label is None else f"prediction_{label}"
    rows = {
        column: values.to_pylist() if hasattr(values, "to_pylist") else list(values)
        for column, values in rows_of([1, 1, 2, 2], [0, 1, 0, 1], [0.1, 0.2, 0.3, 0.4]).items()
    }
    rows |= {"label_bought": rows["label"], "prediction_bought": list(rows["prediction"])}
    rows[name][2] = value
    table = pa.table(rows)
    for column in ("prediction", "prediction_bought"):
        place = table.column_names.index(column)
        table = table.set_column(place, column, pa.array(rows[column], pa.float32()))
    file = tmp_path / "part-00000.parquet"
    pq.write_table(table, file, write_statistics=True)
    with (
        database() as con,
        pytest.raises(InputError, match=r"row 2 .*must be a number in \[0, 1\]"),
    ):
        load_predictions(con, [file], None, label)


def test_missing_and_truncated_files(tmp_path):
    data = make_dataset(tmp_path / "data")
    run = make_run(tmp_path / "run", data, noisy_truth(data, 0.1, 0))
    part = run / "predictions" / "test" / "part-00001.parquet"
    part.write_bytes(part.read_bytes()[:-20])
    with pytest.raises(InputError, match=r"part-00001.parquet: not readable as Parquet"):
        write_evaluation(run)
    for file in part.parent.iterdir():
        file.unlink()
    with pytest.raises(InputError, match=r"no predictions/test/part-"):
        write_evaluation(run)
    with pytest.raises(InputError, match=r"not a run directory"):
        write_evaluation(tmp_path)
    with pytest.raises(InputError, match="choose test or valid"):
        write_evaluation(run, "train")
    (data / "dataset.json").unlink()
    with pytest.raises(InputError, match=r"holds no dataset.json"):
        write_evaluation(run)


@pytest.mark.slow
def test_a_small_memory_limit_gives_the_same_numbers(tmp_path):
    rng = np.random.default_rng(0)
    n = 200_000
    prediction = rng.random(n).astype(np.float32)
    label = (rng.random(n) < prediction).astype(int)
    write_rows(tmp_path, rows_of(rng.integers(0, 20_000, n).tolist(), label, prediction))
    tight = compute_metrics(tmp_path, None, memory_limit="64MB")["overall"]
    roomy = compute_metrics(tmp_path, None)["overall"]
    for name, value in roomy.items():
        assert tight[name] == (pytest.approx(value, rel=1e-12) if value != {} else {})


@pytest.mark.parametrize(
    "facts",
    [
        "[]",
        "3",
        "null",
        "{}",
        '{"format_version": 1, "rows": {}}',
        '{"format_version": 1, "rows": {}, "scenarios": {}}',
        '{"format_version": 1, "scenarios": []}',
    ],
)
def test_a_dataset_json_without_its_fields_is_refused(tmp_path, facts):
    data = make_dataset(tmp_path / "data")
    run = make_run(tmp_path / "run", data, noisy_truth(data, 0.1, 0))
    (data / "dataset.json").write_text(facts)
    with pytest.raises(
        InputError,
        match=r"dataset.json.*(format_version|rows|scenarios|an object).*prepare the data again",
    ):
        write_evaluation(run)
    assert not (run / "evaluation.json").exists()


def test_metrics_of_no_files_are_refused():
    with database() as connection, pytest.raises(InputError, match="no prediction files"):
        load_predictions(connection, [], None)
