"""The study of docs/results: arms, held-out users of the simulated log, tables."""

import json
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from benchmarks.quality import bound, page, regularisation, study, tables
from benchmarks.quality.__main__ import main as quality
from benchmarks.quality.arms import (
    ARMS,
    CLOSE,
    DATASETS,
    DIFFERENCES,
    MAIN,
    REGULARISED,
    SEEDS,
    TUNED_ON,
)
from tests.helpers.paths import ROOT
from trainer.config.run import load_config, save_config
from trainer.data.dataset import open_dataset, validate_dataset
from trainer.data.sources.simulate import simulate
from trainer.models import BACKBONES


def finished(run: Path, valid: float, auc: float = 0.5, words: list[str] | None = None) -> None:
    """What a trained and evaluated run leaves that the study reads."""
    run.mkdir(parents=True, exist_ok=True)
    (run / "summary.json").write_text(json.dumps({"valid_auc": valid}))
    block = {"auc": auc, "rows": 1, "users": 1}
    segments = {"known": block, "new_user": block}
    evaluation = {"overall": block, "scenarios": {}, "segments": segments}
    (run / "evaluation.json").write_text(json.dumps(evaluation))
    if words:
        save_config(load_config(None, words), run / "config.yaml")


@pytest.mark.parametrize("name", DATASETS)
@pytest.mark.parametrize("arm", ARMS)
def test_every_arm_is_a_valid_run_that_reads_its_stores(
    tmp_path: Path, name: str, arm: str
) -> None:
    if other := ARMS[arm].tuned_as:
        for number, (run, _) in enumerate(study.trials(tmp_path, name, "star", other)):
            finished(run, 0.5 + 0.1 * number)
    tried = study.trials(tmp_path, name, "star", arm)
    assert len(tried) == (1 if other else len(DATASETS[name].trials)) > (not other)
    for run, words in tried:
        config = load_config(None, words)
        assert config.output == str(run)
        assert config.model.meta.enabled is bool(ARMS[arm].stores)
        for level in ("user", "scenario", "item"):
            assert (getattr(config.knowledge, level) is not None) is (level in ARMS[arm].stores)


def test_controls_differ_from_llm4msr_in_their_stores_alone(tmp_path: Path) -> None:
    def settings(arm: str) -> dict:
        words = study.assignments(tmp_path, "movielens", "star", arm, 0, tmp_path / "run", {})
        return load_config(None, words).model_dump(exclude={"name"})

    full = settings("llm4msr")
    for arm in (
        "shuffled",
        "shuffled_alike",
        "random",
        "constant",
        "leak",
        "tastes",
        "tastes_shuffled",
    ):
        other = settings(arm)
        assert other.pop("knowledge") != full["knowledge"]
        assert other == {key: value for key, value in full.items() if key != "knowledge"}
    assert set(MAIN).union(DIFFERENCES, *DIFFERENCES.values()) == set(ARMS)


def test_slow_layers_keep_the_step_size_of_inputs_and_match(tmp_path: Path) -> None:
    trial = DATASETS["movielens"].trials[0]
    found = {}
    for arm in ("llm4msr", "slow_layers"):
        words = study.assignments(tmp_path, "movielens", "star", arm, 0, tmp_path / "run", trial)
        found[arm] = load_config(None, words)
    slow, full = found["slow_layers"].train, found["llm4msr"].train
    assert slow.knowledge_learning_rate == full.meta_learning_rate
    assert slow.meta_learning_rate == pytest.approx(0.1 * full.meta_learning_rate)
    assert found["slow_layers"].model == found["llm4msr"].model


@pytest.mark.slow
def test_the_simulated_log_is_prepared_again_with_users_held_out(tmp_path: Path) -> None:
    info = simulate(tmp_path / "log", users=80, items=40, scenarios=2, events=3000, seed=0)
    study._prepare_again(tmp_path / "log", tmp_path / "data", 0.25)
    again = open_dataset(tmp_path / "data")
    assert again.scenarios == info.scenarios
    assert sum(again.rows.values()) + again.introduction_rows == sum(info.rows.values())

    def people(split: str) -> set[int]:
        return set(pq.read_table(tmp_path / "data" / split)["user_id"].to_pylist())

    held_out = people("introduction")
    assert 8 < len(held_out) < 35
    assert held_out.isdisjoint(people("profile") | people("train") | people("valid"))
    assert held_out <= people("test")
    titles = [
        pq.read_table(tmp_path / of / "items.parquet").sort_by("item_id").select([1, 2])
        for of in ("log", "data")
    ]
    assert titles[0].to_pylist() == titles[1].to_pylist()


def test_the_best_trial_is_the_first_seed(tmp_path: Path) -> None:
    number = len(DATASETS["movielens"].trials)
    for trial, (run, words) in enumerate(study.trials(tmp_path, "movielens", "star", "alone")):
        finished(run, 0.5 + 0.01 * trial, words=words)
    assert study.deciders(tmp_path, "movielens", "star", "alone") == []
    runs = study.seeds(tmp_path, "movielens", "star", "alone", 3)
    first = f"trial-{number - 1}"
    assert [run.name for run, _ in runs] == [first, f"{first}.seed-1", f"{first}.seed-2"]
    assert [study.seed_of(run) for run, _ in runs] == [0, 1, 2]
    best = DATASETS["movielens"].trials[-1]
    for seed, (_, words) in enumerate(runs):
        train = load_config(None, words).train
        assert (train.learning_rate, train.seed) == (best["train.learning_rate"], seed)
    assert tables._complete(tmp_path, "movielens", "star") == {"alone": [runs[0][0]]}


@pytest.mark.parametrize(
    "second", [0.6, 0.5]
)  # of the further seeds of the setting that was behind
def test_settings_that_one_seed_cannot_tell_apart_are_told_apart_by_three(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, second: float
) -> None:
    cell = (tmp_path, "movielens", "star", "alone")
    first = DATASETS["movielens"].trials[0]
    tried = [{**first, "train.learning_rate": rate} for rate in (0.1, 0.2, 0.3)]
    monkeypatch.setitem(DATASETS, "movielens", replace(DATASETS["movielens"], trials=tried))
    runs = study.trials(*cell)
    for auc, (run, words) in zip((0.5, 0.5 + CLOSE, 0.501 + CLOSE), runs, strict=True):
        finished(run, auc, words=words)
    further = study.deciders(*cell)
    names = [f"trial-{number}.seed-{seed}" for number in (1, 2) for seed in (1, 2)]
    assert [run.name for run, _ in further] == names
    # Until these are trained there is no decision, and no result.
    assert not study.has_tried(*cell)
    assert tables._complete(*cell[:3]) == {}
    for auc, (run, words) in zip((second, second, 0.55, 0.55), further, strict=True):
        finished(run, auc, words=words)
    assert study.has_tried(*cell)
    best = 1 if second > 0.55 else 2
    assert study.best_setting(*cell) == (best, tried[best])
    found = study.seeds(*cell, 5)
    assert [run for run, _ in found][:3] == [
        runs[best][0],
        *(run for run, _ in further if run.name.startswith(f"trial-{best}")),
    ]
    assert tables._complete(*cell[:3]) == {"alone": [run for run, _ in found][:3]}


def test_a_further_trial_takes_the_place_of_seeds_by_an_earlier_best(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number, (run, words) in enumerate(study.trials(tmp_path, "movielens", "star", "alone")):
        finished(run, 0.6 - 0.1 * number, words=words)
    before = study.seeds(tmp_path, "movielens", "star", "alone", 3)
    for run, words in before:
        finished(run, 0.6, words=words)
    folders = {"alone": [run for run, _ in before]}
    assert tables._complete(tmp_path, "movielens", "star") == folders
    first = DATASETS["movielens"].trials[0]
    more = [*DATASETS["movielens"].trials, {**first, "train.learning_rate": 0.5}]
    monkeypatch.setitem(DATASETS, "movielens", replace(DATASETS["movielens"], trials=more))
    # What was the best of fewer trials is no result until the further one has been trained,
    assert tables._complete(tmp_path, "movielens", "star") == {}
    run, words = study.trials(tmp_path, "movielens", "star", "alone")[-1]
    finished(run, 0.7, words=words)
    # nor are the seeds that were trained with the earlier best.
    assert tables._complete(tmp_path, "movielens", "star") == {"alone": [run]}
    further = study.seeds(tmp_path, "movielens", "star", "alone", 3)
    rates = [load_config(None, words).train.learning_rate for _, words in further]
    assert rates == [0.5, 0.5, 0.5]
    for run, words in further[1:]:
        assert not study.is_current(run, words)
        finished(run, 0.7, words=words)
        assert study.is_current(run, words)
    found = tables._complete(tmp_path, "movielens", "star")
    assert found == {"alone": [run for run, _ in further]}
    # A run of a setting that has changed since is not current either.
    monkeypatch.setitem(DATASETS, "movielens", replace(DATASETS["movielens"], trials=[first]))
    other = {**first, "train.learning_rate": 0.25}
    monkeypatch.setitem(DATASETS, "movielens", replace(DATASETS["movielens"], trials=[other]))
    assert tables._complete(tmp_path, "movielens", "star") == {}


def test_a_backbones_arms_are_tried_and_then_trained_with_the_seeds_of_their_best(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, list[list[tuple[str, str]]]] = {}

    def train(runs: list[tuple[Path, list[str]]], jobs: int, minutes: float) -> bool:
        assert jobs == 1
        assert 9 < minutes < 10
        if not runs:  # no trials that are too close to decide
            return True
        backbone = runs[0][0].parents[1].name
        asked.setdefault(backbone, []).append([(run.parent.name, run.name) for run, _ in runs])
        for number, (run, words) in enumerate(runs):
            finished(run, 0.5 + 0.1 * number, words=words)
        return backbone != "mmoe"

    monkeypatch.setattr(study, "train", train)
    arms = ("alone", "llm4msr")
    count = len(DATASETS["movielens"].trials)
    trials = [(arm, f"trial-{number}") for arm in arms for number in range(count)]
    best = f"trial-{count - 1}"
    names = (best, f"{best}.seed-1", f"{best}.seed-2")
    seeds = [(arm, name) for arm in arms for name in names]
    cells = [("movielens", "star", arm) for arm in arms]
    ends = time.monotonic() + 600
    assert study.train_cells(tmp_path, cells, 3, 2, ends)
    assert asked == {"star": [trials, seeds]}
    # Where the time is over after the trials there are no seeds, and the study is not done.
    more = [("movielens", "mmoe", arm) for arm in arms]
    assert not study.train_cells(tmp_path, [*cells, *more], 3, 2, ends)
    assert asked["mmoe"] == [trials]


def test_the_record_keeps_what_another_folder_has_run(tmp_path: Path) -> None:
    def run(backbone: str, arm: str, auc: str) -> dict[str, object]:
        return {"dataset": "movielens", "backbone": backbone, "arm": arm, "seed": 0, "auc": auc}

    def difference(backbone: str, arm: str, base: str, value: str) -> dict[str, object]:
        head = {"dataset": "movielens", "backbone": backbone, "arm": arm, "base": base}
        return head | {"difference": value}

    runs, pairs = tmp_path / "runs.csv", tmp_path / "differences.csv"
    first = [run("star", arm, "0.5") for arm in ("llm4msr", "shuffled", "random")]
    tables._save(runs, [*first, run("star", "truth", "0.9")], tables.CELL)
    old = [difference("star", "llm4msr", base, "0.1") for base in ("shuffled", "random")]
    tables._save(pairs, [*old, difference("star", "random", "shuffled", "0.3")], tables.PAIR)

    # The same results once more, and another backbone's: nothing of before is lost.
    again = [run("star", "llm4msr", "0.5"), run("shared_bottom", "alone", "0.4")]
    assert tables.changed_cells(again, tables.read_csv(runs)) == set()
    found = tables._save(runs, again, tables.CELL)
    names = [(row["backbone"], row["arm"]) for row in found]
    assert names == [
        ("shared_bottom", "alone"),
        *(("star", arm) for arm in ("llm4msr", "shuffled", "random", "truth")),
    ]
    assert found == tables.read_csv(runs)

    # Other results of one arm: its differences of before are none any more, those of others stay.
    other = [run("star", "llm4msr", "0.6")]
    changed = tables.changed_cells(other, found)
    assert changed == {("movielens", "star", "llm4msr")}
    new = [difference("star", "llm4msr", "shuffled", "0.2")]
    left = tables._save(pairs, new, tables.PAIR, changed)
    assert [(row["arm"], row["base"], row["difference"]) for row in left] == [
        ("llm4msr", "shuffled", "0.2"),
        ("random", "shuffled", "0.3"),
    ]
    assert not list(tmp_path.glob("*.partial"))


def test_an_arm_on_its_way_does_not_replace_the_record() -> None:
    record = [
        {"dataset": "movielens", "backbone": "star", "arm": "llm4msr", "seed": seed}
        for seed in ("0", "0", "1")  # a line per section
    ]
    one, two = [Path("seed-0")], [Path("seed-0"), Path("seed-1")]
    for found, kept in (({"llm4msr": one, "alone": one}, {"alone": one}), ({"llm4msr": two},) * 2):
        assert tables.not_fewer("movielens", "star", found, record) == kept
    assert tables.not_fewer("movielens", "mmoe", {"llm4msr": one}, record) == {"llm4msr": one}


def test_a_control_tuned_alike_takes_the_other_arms_choice(tmp_path: Path) -> None:
    for number, (run, _) in enumerate(study.trials(tmp_path, "movielens", "star", "llm4msr")):
        finished(run, 0.5 + 0.1 * number)
    rate = DATASETS["movielens"].trials[-1]["train.learning_rate"]
    ((run, words),) = study.trials(tmp_path, "movielens", "star", "shuffled_alike")
    assert load_config(None, words).train.learning_rate == rate
    finished(run, 0.1)
    further = study.seeds(tmp_path, "movielens", "star", "shuffled_alike", 5)
    assert {load_config(None, words).train.learning_rate for _, words in further} == {rate}
    assert len(further) == 5


def test_regularisation_needs_trials_of_the_backbones_it_tunes_on_and_of_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained: list[Path] = []

    def train(runs: list[tuple[Path, list[str]]], jobs: int) -> None:
        trained.extend(run for run, _ in runs)
        for run, words in runs:
            finished(run, 0.1, auc=0.9 if "dropout-0.5" in str(run) else 0.8, words=words)

    monkeypatch.setattr(study, "train", train)
    monkeypatch.setattr(regularisation, "make_data", lambda work, name: None)
    words = f"regularisation --work {tmp_path} --datasets movielens --arms alone features"
    monkeypatch.setattr("sys.argv", ["quality", *words.split()])
    for backbone in (*TUNED_ON, "mmoe"):
        for number, (run, words) in enumerate(
            study.trials(tmp_path, "movielens", backbone, "alone")
        ):
            finished(run, 0.6 + 0.1 * number, words=words)
    names = " ".join(TUNED_ON)
    with pytest.raises(SystemExit, match=f"movielens --backbones {names} --arms features$"):
        quality()
    assert trained == []
    monkeypatch.setattr("sys.argv", [one for one in sys.argv if one != "features"])
    quality()
    seeds = [run for run in trained if run.name.startswith("seed-")]
    assert {run.parents[2].name for run in seeds} == {*TUNED_ON, "mmoe"}  # all that have been run
    assert len(seeds) == 5 * (len(TUNED_ON) + 1)


@pytest.mark.slow
def test_every_arm_is_regularised_by_the_same_budget(tmp_path: Path) -> None:
    best = DATASETS["movielens"].trials[1]
    before: dict[str, list[Path]] = {}
    for backbone in (*TUNED_ON, "mmoe"):
        for arm in REGULARISED:
            tried = study.trials(tmp_path, "movielens", backbone, arm)
            for number, (run, words) in enumerate(tried):
                finished(run, 0.6 + 0.1 * number, words=words)
            folder = tmp_path / "movielens/runs" / backbone / arm
            before[arm] = [folder / f"seed-{seed}" for seed in range(5)]
    assert regularisation.chosen(tmp_path, "movielens") == {}
    settings = list(regularisation.SETTINGS.items())
    for arm in REGULARISED:
        tried = regularisation.trials(tmp_path, "movielens", arm)
        assert len({run for run, _ in tried}) == len(tried) == len(TUNED_ON) * len(settings)
        for number, (run, words) in enumerate(tried):
            setting, changes = settings[number % len(settings)]
            config = load_config(None, words)
            assert config.data.path == str(tmp_path / "movielens/tuning/data")
            # The arm's own step sizes.
            assert config.train.learning_rate == best["train.learning_rate"]
            assert all(f"{key}={value}" in words for key, value in changes.items())
            better = arm == "llm4msr" and setting == "dropout .5"
            finished(run, 0.1, auc=0.9 if better else 0.8, words=words)
    chosen = regularisation.chosen(tmp_path, "movielens")
    assert chosen.pop("llm4msr") == "dropout .5"
    assert set(chosen.values()) == {regularisation.UNCHANGED}
    chosen["llm4msr"] = "dropout .5"
    cell = (tmp_path, "movielens", "mmoe")
    assert regularisation.seeds(*cell, "alone", chosen["alone"]) == []
    further = regularisation.seeds(*cell, "llm4msr", chosen["llm4msr"])
    folder = tmp_path / "movielens/regularisation/mmoe/llm4msr/dropout-0.5"
    assert [run for run, _ in further] == [folder / f"seed-{seed}" for seed in range(5)]
    for seed, (_, words) in enumerate(further):
        config = load_config(None, words)
        assert (config.model.dropout, config.train.seed) == (0.5, seed)
        assert config.data.path == str(tmp_path / "movielens/data")
    others = {arm: before[arm] for arm in REGULARISED if arm != "llm4msr"}
    assert regularisation.complete(*cell, chosen, before) == others
    for run, words in further:
        finished(run, 0.9, auc=0.81, words=words)
    found = regularisation.complete(*cell, chosen, before)
    assert found == others | {"llm4msr": [run for run, _ in further]}
    # Trials with other step sizes than the arm's best of today are none.
    run, words = regularisation.trials(tmp_path, "movielens", "alone")[0]
    finished(run, 0.1, words=[*words, "train.learning_rate=0.5"])
    assert "alone" not in regularisation.chosen(tmp_path, "movielens")


def test_a_setting_is_chosen_only_where_it_wins_on_every_backbone() -> None:
    own = {regularisation.UNCHANGED: [0.60, 0.70, 0.65]}
    assert regularisation.choose(own) == regularisation.UNCHANGED
    unsteady = {"dropout .1": [0.80, 0.70, 0.66]}  # one of three is not better
    assert regularisation.choose(own | unsteady) == regularisation.UNCHANGED
    steady = {"dropout .5": [0.61, 0.71, 0.66], "user dropout 0": [0.605, 0.72, 0.66]}
    assert regularisation.choose(own | unsteady | steady) == "user dropout 0"


@pytest.mark.slow
def test_tuning_holds_users_out_of_the_training_split_alone(tmp_path: Path) -> None:
    work = tmp_path / "simulated"
    simulate(work / "log", users=200, items=40, scenarios=2, events=8000, seed=0)
    study._prepare_again(work / "log", work / "data", 0.25)
    before, after = work / "data", regularisation.make_data(tmp_path, "simulated")

    def events(data: Path, *splits: str) -> list[tuple]:
        rows = [row for split in splits for row in pq.read_table(data / split).to_pylist()]
        return sorted(tuple(map(str, row.values())) for row in rows)

    def people(data: Path, split: str) -> set[int]:
        return set(pq.read_table(data / split)["user_id"].to_pylist())

    held_out = people(after, "introduction") - people(before, "introduction")
    assert 15 < len(held_out) < 50  # of some 150
    assert held_out.isdisjoint(people(after, "train") | people(after, "profile"))
    assert people(before, "train") - people(after, "train") == held_out
    assert held_out <= people(after, "valid")
    # Every event of before is there once, and none of the real test events.
    assert events(after, "profile", "introduction") == events(before, "profile", "introduction")
    assert events(after, "train", "valid") == events(before, "train", "valid")
    assert events(after, "test") == events(after, "valid")
    validate_dataset(after)
    assert regularisation.make_data(tmp_path, "simulated") == after  # and it is not made again


def test_what_tuning_changed_is_compared_again_and_the_rest_is_the_studys_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def runs(where: str, arm: str) -> list[Path]:
        return [tmp_path / where / arm / "seed-0"]

    before = {arm: runs("runs", arm) for arm in ("alone", "llm4msr", "shuffled", "leak")}
    after = {arm: before[arm] for arm in ("alone", "llm4msr", "shuffled")}
    after["alone"] = runs("regularised", "alone")
    head = {"dataset": "movielens", "arm": "llm4msr", "seeds": "5", "low": "0.1"}
    own = [  # as the CSV files have them, MMoE of another folder
        head | {"backbone": backbone, "base": base}
        for backbone in ("mmoe", "star")
        for base in ("alone", "shuffled", "leak")
    ]
    own.append(own[1] | {"backbone": "ple", "seeds": "3"})
    unchanged = regularisation.UNCHANGED
    record = [
        {"dataset": name, "arm": arm, "setting": setting, "chosen": chosen}
        for name, arm, setting, chosen in (
            ("simulated", "alone", "dropout .5", "1"),
            ("movielens", "alone", "dropout .5", "0"),
            ("movielens", "alone", "dropout .1", "1"),
            ("movielens", "llm4msr", unchanged, "1"),
            ("movielens", "shuffled", unchanged, "1"),
        )
    ]
    asked: list[dict] = []

    def complete(work: Path, name: str, backbone: str, settings: dict, found: dict) -> dict:
        assert settings == {"alone": "dropout .1", "llm4msr": unchanged, "shuffled": unchanged}
        return after

    def compared(found: dict, pairs: dict, file: Path) -> list[dict]:
        asked.append(pairs)
        return [{"arm": "llm4msr", "base": "alone", "low": "0.2"}]

    monkeypatch.setattr(regularisation, "complete", complete)
    monkeypatch.setattr(tables, "_differences", compared)
    monkeypatch.setattr(tables, "_rows", lambda *cell: [cell])
    with ThreadPoolExecutor() as pool:
        cells = [("movielens", "star", before)]
        lines, added = tables._regularised(tmp_path, cells, own, record, pool)  # type: ignore[arg-type]
    assert asked == [{"llm4msr": ["alone"]}]
    assert [(row["backbone"], row["base"], row["low"]) for row in lines] == [
        ("mmoe", "shuffled", "0.1"),
        ("star", "alone", "0.2"),
        ("star", "shuffled", "0.1"),
    ]
    assert added == [("movielens", "star", "alone", after["alone"][0])]


@pytest.mark.slow
def test_the_best_possible_auc_is_that_of_the_simulators_probabilities(tmp_path: Path) -> None:
    work = tmp_path / "simulated"
    info = simulate(work / "log", users=200, items=40, scenarios=2, events=8000, seed=0)
    study._prepare_again(work / "log", work / "data", 0.25)
    found = study.truth(tmp_path, "simulated")
    assert found["overall"]["rows"] == open_dataset(work / "data").rows["test"]
    # The log's own statement is of all its test events, of other users.
    assert found["overall"]["auc"] == pytest.approx(info.truth.bayes_auc["overall"], abs=0.02)
    assert found["segments"]["new_user"]["auc"] > 0.6
    assert study.truth(tmp_path, "movielens") == {}
    rows = [
        {"backbone": "", "arm": "truth", "seed": 0} | tables._metrics(*block)
        for block in tables._sections(found)
    ]
    assert f"by the truth of the log: {found['overall']['auc']:.4f}." in page.means(rows)


def failing(run: Path, message: str) -> list[str]:
    """Assignments of a run that ends with a message."""
    return ["name=failing", f"output={run}", f"data.path={run.parent / message}"]


@pytest.mark.slow
def test_a_failed_run_says_why_and_leaves_no_process(tmp_path: Path) -> None:
    runs = [
        (tmp_path / f"run-{n}", failing(tmp_path / f"run-{n}", "no such data")) for n in range(2)
    ]
    with pytest.raises(RuntimeError, match=r"(?s)run-\d\.log.*no such data"):
        study.train(runs, 2, 1.0)


def test_after_a_failure_no_further_training_is_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[Path] = []

    def fail(batch: list[tuple[Path, list[str]]]) -> subprocess.Popen:
        started.append(batch[0][0])
        study._messages(batch[0][0]).write_text("what was wrong")
        return subprocess.Popen(["false"])

    monkeypatch.setattr(study, "_start", fail)
    monkeypatch.setattr(study, "is_current", lambda *_: False)
    runs: list[tuple[Path, list[str]]] = [(tmp_path / f"run-{n}", []) for n in range(40)]
    with pytest.raises(RuntimeError, match="what was wrong"):
        study.train(runs, 1)
    assert started == [tmp_path / "run-0"]


@pytest.mark.slow
def test_what_is_there_is_not_trained_again_and_what_was_not_evaluated_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluated: list[Path] = []

    def evaluate(run: Path) -> None:
        evaluated.append(run)
        (run / "evaluation.json").write_text("{}")

    monkeypatch.setattr(study, "write_evaluation", evaluate)
    done, killed = tmp_path / "done", tmp_path / "killed"
    runs = [
        (run, ['name="done"', f'output="{run}"', 'data.path="somewhere"']) for run in (done, killed)
    ]
    for run, words in runs:
        finished(run, 0.5, words=words)
    (killed / "evaluation.json").unlink()
    assert study.train(runs, 1, 1.0)
    assert evaluated == [killed]
    half = tmp_path / "half"  # killed while it trained: neither summary nor evaluation
    half.mkdir()
    (half / "rest").touch()
    assert not study.train([(half, failing(half, "x"))], 1, 0.0)  # no time left
    with pytest.raises(RuntimeError, match="half"):
        study.train([(half, failing(half, "x"))], 1, 1.0)
    assert not (half / "rest").exists()


def test_a_turned_difference_is_that_of_the_other_side() -> None:
    row = {
        "group": "shuffled",
        "base_value": 0.7,
        "value": 0.6,
        "difference": -0.1,
        "low": -0.2,
        "high": 0.05,
        "verdict": "worse",
    }
    turned = tables._turned(row, "llm4msr")
    assert (turned["base"], turned["arm"], turned["verdict"]) == ("shuffled", "llm4msr", "better")
    assert (turned["base_value"], turned["value"]) == (0.6, 0.7)
    assert (turned["difference"], turned["low"], turned["high"]) == (0.1, -0.05, 0.2)


def test_the_summary_counts_intervals_beside_zero() -> None:
    def row(backbone: str, metric: str, low: float, value: float, high: float) -> dict[str, str]:
        return {
            "dataset": "movielens",
            "backbone": backbone,
            "arm": "llm4msr",
            "base": "alone",
            "section": "overall",
            "key": "overall",
            "metric": metric,
            "low": f"{low}",
            "difference": f"{value}",
            "high": f"{high}",
        }

    rows = [
        row("star", "auc", 0.01, 0.02, 0.03),
        row("mmoe", "auc", -0.01, 0.04, 0.09),
        row("star", "gauc", -0.03, -0.02, -0.01),
        row("mmoe", "gauc", 0.1, 0.2, 0.3),
    ]
    rows += [row | {"section": "segment", "key": "new_user"} for row in rows]
    cells = page.summary(rows).splitlines()[2].split(" | ")
    assert cells[:3] == ["| movielens", "llm4msr - alone", "2"]
    assert cells[3] == "+0.030 (+0.020 to +0.040); 1 above, 0 below"
    assert cells[5] == "+0.090 (-0.020 to +0.200); 1 above, 1 below |"
    without = page.summary([row for row in rows if row["metric"] == "gauc"])
    assert without.splitlines()[2].split(" | ")[3] == "–"


def test_the_pages_have_the_tables_of_the_record() -> None:
    names = ("runs", "differences", "sensitivity", "regularisation", "regularised_differences")
    records = [tables.read_csv(ROOT / f"docs/results/study/{name}.csv") for name in names]
    for file, text in page.filled_pages(*records, ROOT / "docs" / "results").items():
        assert file.read_text(encoding="utf-8") == text, f"{file.name}: benchmarks.quality tables"


def test_an_arm_covers_the_backbones_that_have_all_its_seeds() -> None:
    whole = [
        {"dataset": name, "backbone": backbone, "arm": "alone", "seed": str(seed)}
        for name, backbones in (("movielens", list(BACKBONES)), ("simulated", ["star", "mmoe"]))
        for backbone in backbones
        for seed in range(SEEDS)
        for _ in range(2)  # one line per section
    ]
    lines = page.coverage([*whole, whole[0] | {"dataset": "food_kitchen"}]).splitlines()
    assert f"| alone | {len(BACKBONES)} | 0 | 2: mmoe, star |" in lines
    assert "| features | 0 | 0 | 0 |" in lines


def test_auc_inside_users_sees_their_taste_and_not_how_easily_they_are_pleased() -> None:
    users = np.repeat(["easy", "hard", "pleased by all"], [4, 2, 3])
    labels = np.array([1, 1, 1, 0, 1, 0, 1, 1, 1])
    pleased = np.repeat([0.9, 0.1, 1.0], [4, 2, 3])
    assert bound.gauc(users, labels, pleased) == 0.5  # ties
    assert bound.auc(labels, pleased) == pytest.approx(11 / 14)
    taste = np.array([0.3, 0.2, 0.1, 0.25, 0.9, 0.8, 0, 0, 0])
    assert bound.gauc(users, labels, taste) == pytest.approx((4 * 1 / 3 + 2 * 1) / 6)
