"""The simulator: sizes, determinism, planted truth."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest

from llm_knowledge.errors import InputError
from tests.helpers.paths import ROOT
from trainer.data.dataset import SPLITS, DatasetInfo, split_files, validate_dataset
from trainer.data.sources import simulate as simulator
from trainer.data.sources.simulate import simulate

SIZES = {"users": 600, "items": 400, "scenarios": 3, "events": 30_000}


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, DatasetInfo]:
    out = tmp_path_factory.mktemp("simulated") / "log"
    return out, simulate(out, **SIZES, seed=5)


def read(out: Path, *splits: str) -> pa.Table:
    files = [str(file) for split in splits for file in split_files(out, split)]
    return ds.dataset(files).to_table()


def exact_auc(score: np.ndarray, label: np.ndarray) -> float:
    positive, negative = score[label == 1], np.sort(score[label == 0])
    below = np.searchsorted(negative, positive, "left") + np.searchsorted(
        negative, positive, "right"
    )
    return below.mean() / 2 / len(negative)


def test_sizes_schema_and_time_split(log):
    out, info = log
    assert validate_dataset(out) == info
    assert sum(info.rows.values()) == SIZES["events"]
    assert info.items == SIZES["items"]
    assert 0.95 * SIZES["users"] < info.users <= SIZES["users"]
    limits = [0, *info.split.boundaries, 2**62]
    for split, low, high, share in zip(
        SPLITS, limits, limits[1:], (0.4, 0.4, 0.1, 0.1), strict=False
    ):
        times = read(out, split)["timestamp"].to_numpy()
        assert low <= times.min()
        assert times.max() < high
        assert np.all(np.diff(times) >= 0)
        assert abs(len(times) / SIZES["events"] - share) < 0.02
    assert len({scenario.name for scenario in info.scenarios}) == 3


def test_same_arguments_same_rows_whatever_the_memory(log, tmp_path):
    out, _ = log
    simulate(tmp_path / "same", **SIZES, seed=5, memory="300MB")
    simulate(tmp_path / "other", **SIZES, seed=6)
    assert read(tmp_path / "same", *SPLITS).equals(read(out, *SPLITS))
    assert not read(tmp_path / "other", "test").equals(read(out, "test"))
    items = [pq.read_table(path / "items.parquet") for path in (out, tmp_path / "same")]
    assert items[0].equals(items[1])


def test_history_over_blocks_is_exact(tmp_path, monkeypatch):
    monkeypatch.setattr(simulator, "BLOCK_EVENTS", 500)
    simulate(tmp_path / "log", users=40, items=30, scenarios=2, events=2_000)
    rows = read(tmp_path / "log", *SPLITS).to_pylist()
    assert len({row["user_id"] for row in rows}) == 40
    for row in rows[::17]:
        past = sorted(
            (other["timestamp"], other["item_id"])
            for other in rows
            if other["user_id"] == row["user_id"]
            and other["timestamp"] < row["timestamp"]
            and other["label"]
        )
        assert row["history"] == [item for _, item in past][-20:]


def test_bayes_auc_is_right_and_in_range(log):
    out, info = log
    test = read(out, "test")
    chance, label = test["truth_probability"].to_numpy(), test["label"].to_numpy()
    assert info.truth is not None
    assert set(info.truth.bayes_auc) == {"overall", "1", "2", "3"}
    assert all(0.74 < value < 0.88 for value in info.truth.bayes_auc.values())
    assert info.truth.bayes_auc["overall"] == pytest.approx(exact_auc(chance, label), abs=1e-4)
    second = test["scenario_id"].to_numpy() == 2
    expected = exact_auc(chance[second], label[second])
    assert info.truth.bayes_auc["2"] == pytest.approx(expected, abs=1e-4)


def test_labels_agree_with_their_probabilities(log):
    rows = read(log[0], *SPLITS)
    chance, label = rows["truth_probability"].to_numpy(), rows["label"].to_numpy()
    for group in np.array_split(np.argsort(chance), 10):
        error = np.sqrt(chance[group].mean() * (1 - chance[group].mean()) / len(group))
        assert abs(label[group].mean() - chance[group].mean()) < 4 * error


def test_scenarios_have_their_own_rates_and_tastes(log):
    rows = read(log[0], *SPLITS)
    chance, scenario = rows["truth_probability"].to_numpy(), rows["scenario_id"].to_numpy()
    item = rows["item_id"].to_numpy()
    titles = pq.read_table(log[0] / "items.parquet")
    topics = np.array([value[0] for value in titles["categories"].to_pylist()])[item - 1]
    assert np.ptp([chance[scenario == number].mean() for number in (1, 2, 3)]) > 0.05
    names = sorted(set(topics))
    rates = np.array(
        [[chance[(scenario == s) & (topics == name)].mean() for name in names] for s in (1, 2)]
    )
    shift = rates - rates.mean(axis=1, keepdims=True)
    assert np.abs(shift[0] - shift[1]).max() > 0.1


def test_some_users_meet_a_scenario_only_after_training(log):
    out, _ = log

    def pairs(*splits: str) -> set[tuple[int, int]]:
        table = read(out, *splits)
        return set(zip(table["user_id"].to_pylist(), table["scenario_id"].to_pylist(), strict=True))

    known, later = pairs("profile", "train"), pairs("valid", "test")
    known_users = {user for user, _ in known}
    new = {user for user, scenario in later - known if user in known_users}
    assert len(new) > 0.05 * SIZES["users"]


def test_taste_can_be_read_from_the_profile(log):
    """The topics that a user liked in the profile window are liked later: text can carry it."""
    out, _ = log
    categories = pq.read_table(out / "items.parquet")["categories"].to_pylist()
    names = sorted({value[0] for value in categories})
    topic = np.array([names.index(value[0]) for value in categories])
    liked = np.zeros((SIZES["users"] + 1, len(names)))
    profile = read(out, "profile")
    user, item = profile["user_id"].to_numpy(), profile["item_id"].to_numpy()
    np.add.at(liked, (user, topic[item - 1]), profile["label"].to_numpy() - 0.5)
    test = read(out, "test")
    score = liked[test["user_id"].to_numpy(), topic[test["item_id"].to_numpy() - 1]]
    assert exact_auc(score, test["label"].to_numpy()) > 0.62


def test_titles_are_readable_and_told_apart(tmp_path, log):
    titles = pq.read_table(log[0] / "items.parquet")["title"].to_pylist()
    assert all(" with " in title and title[0].isupper() for title in titles)
    assert len(set(titles)) > 0.97 * len(titles)
    simulate(tmp_path / "many", users=20, items=70_000, scenarios=2, events=500)
    many = pq.read_table(tmp_path / "many/items.parquet")
    assert len(set(many["title"].to_pylist())) == 70_000
    assert many["item_id"].to_pylist() == list(range(1, 70_001))


def test_many_scenarios_are_numbered(tmp_path):
    info = simulate(tmp_path / "log", users=300, items=50, scenarios=30, events=6_000)
    names = [scenario.name for scenario in info.scenarios]
    assert len(set(names)) == 30
    assert (names[0], names[8]) == ("Home feed", "Home feed 2")


@pytest.mark.parametrize("name", [*SIZES, "days"])
def test_sizes_below_one_are_refused(tmp_path, name):
    with pytest.raises(InputError, match=f"{name} is 0"):
        simulate(tmp_path / "log", **(SIZES | {name: 0}))
    assert list(tmp_path.iterdir()) == []


def test_too_few_events_leave_an_empty_split(tmp_path):
    with pytest.raises(InputError, match="split is empty"):
        simulate(tmp_path / "log", users=1, items=2, scenarios=1, events=2)
    assert list(tmp_path.iterdir()) == []


PROGRAM = """
import resource, sys
from pathlib import Path
from trainer.data.sources.simulate import simulate
simulate(Path(sys.argv[1]), users=20_000, items=5_000, scenarios=3, events=int(sys.argv[2]), memory="200MB")
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_the_log(tmp_path):
    def peak(events: int) -> int:
        command = [sys.executable, "-c", PROGRAM, str(tmp_path / str(events)), str(events)]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            command, env=environment, cwd=ROOT, stdout=subprocess.PIPE, timeout=200, check=True
        )
        return int(done.stdout)

    small, large = peak(500_000), peak(3_000_000)
    assert large < small + 300  # MiB; the added rows alone would take more than that many
