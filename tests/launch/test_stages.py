"""When a stage is complete; which stages a second call runs again."""

import os
from pathlib import Path

import pytest

from launch.stages import (
    Stage,
    is_evaluated,
    is_extracted,
    is_prepared,
    is_reported,
    is_trained,
    run_stages,
    stores_of,
)
from llm_knowledge.errors import InputError
from llm_knowledge.extraction.config import ExtractConfig
from tests.helpers.training_data import make_config, make_inputs
from trainer.config.run import save_config


def write(file: Path, seconds: int, content: str = "{}") -> Path:
    """Writes a file that was last changed `seconds` after the epoch."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(content)
    os.utime(file, (seconds, seconds))
    return file


def test_a_dataset_and_its_stores_are_complete_by_what_is_written_last(tmp_path: Path) -> None:
    data, stores = make_inputs(tmp_path)
    job = ExtractConfig(data=data, out=stores, level="all")
    assert is_prepared(data)
    assert is_extracted(job)
    (stores / "item/manifest.json").unlink()
    assert not is_extracted(job)
    (data / "dataset.json").write_text("{")
    with pytest.raises(InputError, match=r"dataset\.json"):
        is_prepared(data)
    (data / "dataset.json").unlink()
    assert not is_prepared(data)


def test_dated_stores_are_complete_when_each_of_them_is(tmp_path: Path) -> None:
    data, _ = make_inputs(tmp_path)
    job = ExtractConfig(data=data, out=tmp_path / "out", level="all", cutoffs=["5", "7"])
    dated = [f"{level}/cutoff-{time}" for level in ("user", "scenario") for time in (5, 7)]
    assert stores_of(job) == [job.out / name for name in (*dated, "item")]
    assert not is_extracted(job)


def test_a_run_is_complete_when_it_is_the_one_that_is_asked_for(tmp_path: Path) -> None:
    config = make_config(*make_inputs(tmp_path), tmp_path / "run")
    assert not is_trained(config)
    (tmp_path / "run").mkdir()
    save_config(config, tmp_path / "run/config.yaml")
    assert not is_trained(config)
    write(tmp_path / "run/summary.json", 1)
    assert is_trained(config)
    other_rank_count = {"log_every": 7}  # may change without changing the result
    train = config.train.model_copy(update=other_rank_count)
    assert is_trained(config.model_copy(update={"train": train}))
    train = config.train.model_copy(update={"seed": 5})
    with pytest.raises(InputError, match=r"config\.yaml: differs .*train\.seed: 0, now 5"):
        is_trained(config.model_copy(update={"train": train}))


def test_what_is_older_than_its_input_is_not_complete(tmp_path: Path) -> None:
    run, page = tmp_path / "run", tmp_path / "report.html"
    assert not is_evaluated(run)
    write(run / "summary.json", 10)
    assert not is_evaluated(run)
    write(run / "evaluation.json", 11)
    assert is_evaluated(run)
    assert not is_evaluated(run, "valid")
    write(page, 12)
    assert is_reported(page, [run])
    write(run / "evaluation.json", 13)
    assert not is_reported(page, [run])
    write(run / "summary.json", 14)
    assert not is_evaluated(run)


def test_stages_are_looked_at_in_turn_and_a_failure_ends_the_chain(tmp_path: Path) -> None:
    done: list[str] = []

    def stage(name: str) -> Stage:
        return Stage(name, lambda: name in done, lambda: done.append(name))

    def fail() -> None:
        raise InputError("a wrong input")

    chain = [stage("first"), Stage("second", lambda: "first" not in done, fail), stage("third")]
    with pytest.raises(InputError, match="a wrong input"):
        run_stages(chain)
    assert done == ["first"]
    run_stages([stage("first"), stage("third")])
    assert done == ["first", "third"]
