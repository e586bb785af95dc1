"""Negatives for one's own log of positives, against the published rule."""

from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest

from launch.main import main
from llm_knowledge.errors import InputError
from tests.helpers.log_data import SCHEMA, all_rows, random_log, write_log
from trainer.data.dataset import validate_dataset
from trainer.data.sources import staging
from trainer.data.sources.append import append_parquet
from trainer.data.sources.parquet_log import prepare_parquet

RULES = SCHEMA | {"negatives": {"per_positive": 3}}


def positives(rows: int = 900, strings: bool = False, seed: int = 1) -> dict:
    log = random_log(rows, strings=strings, seed=seed)
    items = np.random.default_rng(seed + 1).integers(0, 400, rows)
    spelled = [f"é{item:03d}" for item in items] if strings else items.tolist()
    return log | {"item_id": spelled, "label": [1] * rows}


@pytest.mark.slow
@pytest.mark.parametrize("avoid", ["earlier", "all"])
@pytest.mark.parametrize("rule", ["per_user_time", "global_time"])
@pytest.mark.parametrize("strings", [False, True])
def test_negatives_follow_the_rule(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, avoid: str, rule: str, strings: bool
) -> None:
    monkeypatch.setattr(staging, "BLOCK_ROWS", 200)
    log = positives(strings=strings)
    rules = RULES | {"split": {"rule": rule}, "negatives": {"per_positive": 3, "avoid": avoid}}
    raw, schema = write_log(tmp_path / "raw", log, rules)
    info = prepare_parquet(raw, tmp_path / "out", schema)
    assert validate_dataset(tmp_path / "out") == info
    assert info.negative_name is None
    assert info.negatives is not None
    assert ("whatever the time" in info.negatives.rule) == (avoid == "all")
    rows = all_rows(tmp_path / "out")
    bought, of_scenario = defaultdict(list), defaultdict(set)
    for user, item, scenario, time in zip(
        *(log[n] for n in ("user_id", "item_id", "scenario_id", "timestamp")), strict=True
    ):
        bought[user, item].append(time)
        of_scenario[scenario].add(item)
    names = ("user_id", "item_id", "scenario_id", "timestamp")
    found = Counter(tuple(row[n] for n in names) for row in rows if row["label"])
    assert found == Counter(zip(*(log[n] for n in names), strict=True))
    events = Counter(
        (r["user_id"], r["scenario_id"], r["timestamp"], r["split"]) for r in rows if r["label"]
    )
    drawn, later = Counter(), 0
    for row in rows:
        if row["label"]:
            continue
        drawn[row["user_id"], row["scenario_id"], row["timestamp"], row["split"]] += 1
        times = bought.get((row["user_id"], row["item_id"]), [])
        assert not times or (avoid == "earlier" and min(times) > row["timestamp"])
        later += bool(times)
        assert row["item_id"] in of_scenario[row["scenario_id"]]
    assert drawn == {key: 3 * count for key, count in events.items() if key[3] != "profile"}
    assert (later > 0) == (avoid == "earlier")  # what is bought later tells nothing before
    for row in rows:  # histories are as if there were no negatives
        past = [
            (time, item)
            for (user, item), times in bought.items()
            for time in times
            if user == row["user_id"] and time < row["timestamp"]
        ]
        assert row["history"] == [item for _, item in sorted(past)][-20:]


def test_draws_are_as_likely_as_the_rule_says(tmp_path: Path) -> None:
    """Many users with one event per split: nothing is avoided, so frequencies are the weights."""
    draw = np.random.default_rng(0)
    users = 3_000
    items = np.minimum(draw.geometric(0.15, (users, 4)), 20)
    log = {
        "user_id": np.repeat(np.arange(users), 4).tolist(),
        "item_id": items.reshape(-1).tolist(),
        "scenario_id": [1 + n % 2 for n in range(users) for _ in range(4)],
        "timestamp": [1_700_000_000 + 100 * n + step for n in range(users) for step in range(4)],
    }
    columns = {"columns": {"label": "none"}}
    split = {
        "split": {
            "rule": "per_user_time",
            "fractions": dict.fromkeys(("profile", "train", "valid", "test"), 0.25),
        }
    }
    rules = RULES | columns | split | {"negatives": {"per_positive": 1, "avoid": "earlier"}}
    raw, schema = write_log(tmp_path / "raw", log, rules)
    prepare_parquet(raw, tmp_path / "out", schema)
    rows = all_rows(tmp_path / "out")
    for scenario in (1, 2):
        mine = items[np.arange(users) % 2 == scenario - 1]
        weight = (1 + np.bincount(mine[:, :2].reshape(-1), minlength=21)) ** 0.75
        weight[np.isin(np.arange(21), mine, invert=True)] = 0
        expected = np.zeros(21)
        for row in rows:  # of each negative: the weights without what the user had until then
            if not row["label"] and row["scenario_id"] == scenario:
                step = (row["timestamp"] - 1_700_000_000) % 100
                free = weight.copy()
                free[items[row["user_id"]][: step + 1]] = 0
                expected += free / free.sum()
        counts = np.bincount(
            [r["item_id"] for r in rows if not r["label"] and r["scenario_id"] == scenario],
            minlength=21,
        )
        assert np.all(np.abs(counts - expected) < 4.5 * np.sqrt(expected + 1))


def test_seeds_and_the_option(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = positives(500)
    results = {}
    for name, negatives, words in (
        ("a", {"per_positive": 2}, []),
        ("b", {"per_positive": 2}, []),
        ("c", {"per_positive": 2, "seed": 1}, []),
        ("d", {"per_positive": 9}, ["--negatives", "2"]),
        ("e", None, ["--negatives", "2"]),
    ):
        raw, schema = write_log(
            tmp_path / "raw", log, SCHEMA | ({"negatives": negatives} if negatives else {})
        )
        options = ["--raw", str(raw), "--schema", str(schema), "--out", str(tmp_path / name)]
        assert main(["prepare", "parquet", *options, *words]) == 0
        results[name] = all_rows(tmp_path / name)
    assert results["a"] == results["b"] == results["d"] == results["e"] != results["c"]
    capsys.readouterr()
    assert main(["prepare", "movielens", "--out", str(tmp_path / "m"), "--negatives", "2"]) == 2
    assert "--negatives goes with logs of positives alone" in capsys.readouterr().err


def test_what_cannot_be_sampled(tmp_path: Path) -> None:
    log = positives(300)
    raw, schema = write_log(tmp_path / "raw", random_log(300), RULES)
    with pytest.raises(InputError, match=r"the log has \d+ rows of label 0 of its own"):
        prepare_parquet(raw, tmp_path / "out", schema)
    few = log | {"item_id": [n % 3 for n in range(300)]}
    raw, schema = write_log(tmp_path / "raw", few, RULES)
    with pytest.raises(InputError, match=r"per_positive: 3 items cannot be sampled for user"):
        prepare_parquet(raw, tmp_path / "out", schema)
    rules = RULES | {"split": {"rule": "global_time"}}
    raw, schema = write_log(tmp_path / "raw", log, rules)
    prepare_parquet(raw, tmp_path / "out", schema)
    later = log | {"timestamp": [time + 1_000 for time in log["timestamp"]]}
    day, schema = write_log(tmp_path / "day", later, rules)
    with pytest.raises(InputError, match="prepare the whole log anew"):
        append_parquet(day, tmp_path / "out", tmp_path / "next", schema)


def test_further_labels_of_negatives_are_0(tmp_path: Path) -> None:
    log = positives(400) | {"stars": [1] * 400}
    raw, schema = write_log(tmp_path / "raw", log, RULES | {"labels": {"rated": "stars"}})
    prepare_parquet(raw, tmp_path / "out", schema)
    assert all(row["label_rated"] == row["label"] for row in all_rows(tmp_path / "out"))
