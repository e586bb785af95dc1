"""The bootstrap: exact weighted AUC, honest intervals, and refusal of runs that do not match."""

import json

import numpy as np
import pyarrow.parquet as pq
import pytest

from llm_knowledge.errors import InputError
from tests.helpers.evaluation_data import make_dataset, make_run, noisy_truth, sigmoid
from trainer.evaluation.bootstrap import (
    ScoredRows,
    WeightedAuc,
    bootstrap,
    seed_draws,
    user_aucs,
    user_weights,
)
from trainer.evaluation.compare import (
    compare,
    format_table,
    group_by_arm,
    group_runs,
    resolve_runs,
    write_comparison,
)
from trainer.evaluation.metrics import write_evaluation


@pytest.fixture
def data(tmp_path):
    return make_dataset(tmp_path / "data")


def arm(tmp_path, data, name, noise, seeds=3, offset=0):
    return [
        make_run(
            tmp_path / name / str(seed), data, noisy_truth(data, noise, offset + seed), name, seed
        )
        for seed in range(seeds)
    ]


def pair_auc(label, prediction):
    wins = pairs = 0.0
    for positive in prediction[label == 1]:
        negatives = prediction[label == 0]
        wins += (positive > negatives).sum() + 0.5 * (positive == negatives).sum()
        pairs += len(negatives)
    return wins / pairs if pairs else np.nan


@pytest.mark.parametrize("values", [7, 10**6])
def test_weighted_auc_equals_auc_of_replicated_rows(values):
    rng = np.random.default_rng(0)
    user, label = rng.integers(0, 20, 300), rng.integers(0, 2, 300).astype(np.int8)
    prediction = (rng.integers(0, values, 300) / values).astype(np.float32)
    weights = user_weights(20, 8, rng)
    assert (weights.sum(axis=0) == 20).all()
    result = WeightedAuc(user, label, prediction)(weights)
    for sample in range(8):
        index = np.repeat(np.arange(300), weights[user, sample].astype(int))
        assert result[sample] == pair_auc(label[index], prediction[index])


def test_weighted_auc_is_nan_when_a_class_vanishes():
    auc = WeightedAuc(np.array([0, 1]), np.array([0, 1], np.int8), np.array([0.1, 0.2]))
    assert np.isnan(auc(np.array([[2.0], [0.0]]))).all()
    assert auc(np.ones((2, 1))) == [1.0]


def test_user_aucs_with_ties():
    rng = np.random.default_rng(1)
    user, label = rng.integers(0, 30, 200), rng.integers(0, 2, 200).astype(np.int8)
    prediction = rng.integers(0, 4, 200) / 4
    result = user_aucs(user, label, prediction, 31)
    for number in range(30):
        expected = pair_auc(label[user == number], prediction[user == number])
        assert result[number] == pytest.approx(expected, nan_ok=True)
    assert np.isnan(result[30])


def test_point_values_agree_with_the_evaluation(tmp_path, data):
    base, other = arm(tmp_path, data, "star", 1.0, 2), arm(tmp_path, data, "other", 0.3, 2)
    result = compare([("star", base), ("other", other)], samples=100)
    evaluations = [write_evaluation(run) for run in other]
    for row in result["table"]:
        section = {"scenario": "scenarios", "segment": "segments"}.get(row["section"])
        blocks = [e[section][row["key"]] if section else e["overall"] for e in evaluations]
        expected = np.mean([block[row["metric"]] for block in blocks])
        assert row["value"] == pytest.approx(expected, abs=1e-12)
        assert row["rows"] == blocks[0]["rows"]
    assert {row["key"] for row in result["table"]} >= {"overall", "drama", "new_user", "known"}


def test_identical_predictions_do_not_differ(tmp_path, data):
    base = arm(tmp_path, data, "a", 0.5)
    same = arm(tmp_path, data, "b", 0.5)
    result = compare([("a", base), ("b", same)], samples=100)
    for row in result["table"]:
        assert row["difference"] == row["low"] == row["high"] == row["seed_sd"] == 0
        assert row["p_value"] == 1
        assert not row["significant"]
        assert row["verdict"] == "no significant difference"


@pytest.mark.slow
def test_a_truly_better_arm_is_better_and_the_reverse_is_worse(tmp_path, data):
    noisy, sharp = arm(tmp_path, data, "noisy", 3.0), arm(tmp_path, data, "sharp", 0.1, offset=50)
    result = compare([("noisy", noisy), ("sharp", sharp)], samples=300)
    back = compare([("sharp", sharp), ("noisy", noisy)], samples=300)
    for metric, sign in (("auc", 1), ("logloss", -1)):
        row = next(r for r in result["table"] if r["metric"] == metric)
        assert (row["verdict"], row["significant"]) == ("better", True)
        assert sign * row["difference"] > 0
        assert row["low"] < row["difference"] < row["high"]
        assert row["p_value"] < 0.02
        assert row["paired_seeds"]
        mirrored = next(r for r in back["table"] if r["metric"] == metric)
        assert mirrored["verdict"] == "worse"
        assert mirrored["difference"] == pytest.approx(-row["difference"])
    assert compare([("noisy", noisy), ("sharp", sharp)], samples=300) == result


def test_error_rate_on_null_data_is_about_five_percent():
    """Two models with equally noisy scores, user effects included: one seed each, users only."""
    rejected = 0
    for repeat in range(120):
        rng = np.random.default_rng(repeat)
        users = 80
        user = np.repeat(np.arange(users), 6)
        logit = rng.normal(size=users)[user] + rng.normal(size=len(user))
        label = (rng.random(len(user)) < sigmoid(logit)).astype(np.int8)
        noise = [rng.normal(size=users)[user] + rng.normal(size=len(user)) for _ in range(2)]
        prediction = np.stack([sigmoid(logit + n) for n in noise]).astype(np.float32)
        sections = [("overall", "overall", np.arange(len(user)))]
        rows = ScoredRows(user, users, label, prediction, sections)
        _, _, resampled = bootstrap(rows, 200, repeat)
        low, high = np.percentile(resampled[0, 0, 1] - resampled[0, 0, 0], [2.5, 97.5])
        rejected += low > 0 or high < 0
    assert 1 <= rejected <= 16  # binomial(120, .05): outside with probability below 0.003


def test_seed_draws_reproduce_the_variance_of_a_mean():
    values = np.array([0.70, 0.72, 0.77])
    draws = seed_draws(3, 200_000, np.random.default_rng(0))
    assert np.allclose(draws.sum(axis=0), 1)
    assert (values @ draws).var() == pytest.approx(values.var(ddof=1) / 3, rel=0.02)
    assert (seed_draws(1, 5, np.random.default_rng(0)) == 1).all()


def test_seed_spread_widens_the_interval(tmp_path, data):
    base = arm(tmp_path, data, "base", 0.5)
    unstable = [
        make_run(tmp_path / "u" / str(s), data, noisy_truth(data, noise, 9), "u", s)
        for s, noise in enumerate((0.1, 2.0, 6.0))
    ]
    steady = [
        make_run(tmp_path / "s" / str(s), data, noisy_truth(data, 2.0, 9), "s", s) for s in range(3)
    ]
    result = compare([("base", base), ("u", unstable), ("s", steady)], samples=300)
    rows = {r["group"]: r for r in result["table"] if (r["key"], r["metric"]) == ("overall", "auc")}
    width = {name: row["high"] - row["low"] for name, row in rows.items()}
    assert rows["u"]["seed_sd"] > 3 * rows["s"]["seed_sd"]
    assert width["u"] > 1.3 * width["s"]
    assert any("3 seeds" in note for note in result["notes"])


def test_unpaired_and_single_seeds(tmp_path, data):
    one = [make_run(tmp_path / "one", data, noisy_truth(data, 0.5, 1), "one", 7)]
    three = arm(tmp_path, data, "three", 0.5)
    row = compare([("one", one), ("three", three)], samples=100)["table"][0]
    assert not row["paired_seeds"]
    assert row["seed_sd"] is None
    assert any("one seed only" in n for n in compare([("t", three), ("o", one)], 100)["notes"])


def test_one_segment_only(tmp_path, data):
    base, other = arm(tmp_path, data, "a", 1.0, 1), arm(tmp_path, data, "b", 0.5, 1)
    groups = [("a", base), ("b", other)]
    whole, part = compare(groups, 100), compare(groups, 100, segment="new_user")
    expected = next(r for r in whole["table"] if r["key"] == "new_user")
    assert part["table"][0]["key"] == "overall"
    assert part["table"][0]["value"] == expected["value"]
    assert part["rows"] == expected["rows"] == 48
    assert not any(row["section"] == "segment" for row in part["table"])
    with pytest.raises(InputError, match="choose one of known, sparse, new_in_scenario, new_user"):
        compare(groups, segment="old")


def test_single_class_section_is_not_defined(tmp_path, data):
    facts = json.loads((data / "dataset.json").read_text())
    facts["scenarios"].append({"scenario_id": "western", "name": "Western", "description": ""})
    (data / "dataset.json").write_text(json.dumps(facts))
    groups = [(name, arm(tmp_path, data, name, 0.5, 1)) for name in ("a", "b")]
    result = compare(groups, 100)
    row = next(r for r in result["table"] if r["key"] == "western")
    assert row["verdict"] == "not defined"
    assert row["value"] is None
    written = write_comparison(result, tmp_path / "out" / "comparison.json")
    assert json.loads(written.read_text()) == result
    assert "not defined" in format_table(result)


def test_table_for_terminals(tmp_path, data):
    groups = [
        ("a", arm(tmp_path, data, "a", 2.0, 2)),
        ("b\x1b[31m", arm(tmp_path, data, "b", 0.2, 2)),
    ]
    text = format_table(compare(groups, 100))
    assert "Differences to a on the test split (480 rows, 40 users, 100 bootstrap" in text
    assert "better" in text
    assert "\x1b" not in text
    assert "scenario drama" in text


def test_runs_on_other_rows_are_refused_by_name(tmp_path, data):
    base = arm(tmp_path, data, "a", 0.5, 1)
    elsewhere = make_dataset(tmp_path / "data2", users=50)
    other = [make_run(tmp_path / "other", elsewhere, noisy_truth(elsewhere, 0.5, 0), "o", 0)]
    with pytest.raises(InputError, match=r"other: trained on another dataset"):
        compare([("a", base), ("o", other)])
    broken = make_run(tmp_path / "broken", data, noisy_truth(data, 0.5, 0), "broken", 0)
    part = broken / "predictions" / "test" / "part-00000.parquet"
    pq.write_table(pq.read_table(part).slice(1), part)
    with pytest.raises(InputError, match=r"broken: its test predictions are for other rows"):
        compare([("a", base), ("broken", [broken])])


def test_groups_from_the_command_line(tmp_path, data):
    for name in ("star", "star+llm4msr"):
        arm(tmp_path / "runs", data, name, 0.5, 2)
    (tmp_path / "runs" / "star" / "notes").mkdir()
    star, meta = tmp_path / "runs" / "star", tmp_path / "runs" / "star+llm4msr"
    assert resolve_runs(star) == [star / "0", star / "1"]
    assert resolve_runs(star / "1") == [star / "1"]
    assert [name for name, _ in group_runs([star, meta])] == ["star", "star+llm4msr"]
    assert [n for n, _ in group_runs([star / "0", star / "1"])] == [
        str(star / "0"),
        str(star / "1"),
    ]
    assert [(n, len(r)) for n, r in group_by_arm([meta, star / "0"])] == [
        ("star+llm4msr", 2),
        ("star", 1),
    ]
    with pytest.raises(InputError, match="neither a run directory"):
        resolve_runs(tmp_path / "runs")
    with pytest.raises(InputError, match="at least two groups"):
        compare(group_runs([star]))
    with pytest.raises(InputError, match=r"is given twice"):
        compare([("a", [star / "0"]), ("b", [star / "0"])])
    with pytest.raises(InputError, match=r"at least 100"):
        compare(group_runs([star, meta]), samples=10)
