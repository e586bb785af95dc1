"""Checkpoints on disk: written while training goes on, kept, described, damaged, resumed."""

import json
import os
import random
import re
import shutil
import subprocess
import sys
import tarfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp

from embeddings.optimizer import update_count
from llm_knowledge.errors import InputError
from tests.drills.restore_matrix import whole_state
from tests.helpers.training_data import make_config, make_inputs, write_stores
from tests.trainer.training.test_train import ENVIRONMENT, ROOT, lines
from trainer.checkpoint import writer as checkpoint_writer
from trainer.checkpoint.directory import (
    checkpoints,
    problem_of,
    problem_within,
    prune,
    read_state,
)
from trainer.checkpoint.loop_state import LoopState
from trainer.checkpoint.restore import load_checkpoint
from trainer.checkpoint.writer import CheckpointWriter
from trainer.distributed.process_group import distributed
from trainer.observe.metrics_log import RunLog, Window
from trainer.run.build import build
from trainer.run.inputs import open_inputs
from trainer.training.loop import train
from trainer.training.run_folder import prepare_folder


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return make_inputs(tmp_path_factory.mktemp("checkpoint"))


def names(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def interrupt_at(step: int, monkeypatch: pytest.MonkeyPatch, config: Any) -> None:
    """Trains until a step and dies there."""
    exchange = RunLog.exchange

    def cut(self: RunLog, at: int, *rest: Any) -> Window:
        if at == step:
            raise KeyboardInterrupt
        return exchange(self, at, *rest)

    with monkeypatch.context() as patched:
        patched.setattr(RunLog, "exchange", cut)
        with pytest.raises(KeyboardInterrupt):
            train(config)


def test_a_write_holds_the_values_of_its_call_though_training_goes_on(
    inputs: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config(*inputs, tmp_path / "run", train__checkpoint_async=True)
    trained = threading.Event()
    save = dcp.save

    def late(*arguments: Any, **options: Any) -> Any:
        assert trained.wait(30)
        return save(*arguments, **options)

    monkeypatch.setattr(checkpoint_writer.dcp, "save", late)
    with distributed(60) as runtime:
        inputs_ = open_inputs(config, runtime)
        run = build(config, runtime, prepare_folder(config, runtime, resume=False), inputs_)
        run.model.train()
        batches = iter(run.stream(["train"], shuffle=True).batches())
        run.pipeline.progress(batches)
        folder = run.folder / "checkpoints"
        with CheckpointWriter(run, folder) as writer:
            before = whole_state(run)
            writer.save(LoopState(step=1))
            assert checkpoints(folder) == []  # not before it is whole
            run.pipeline.progress(batches)
            after = whole_state(run)
            trained.set()
        assert not (
            before["sparse.pooled.embedding_bags.user.weight"]
            == after["sparse.pooled.embedding_bags.user.weight"]
        ).all()
        assert update_count(run.model) == 2
        assert load_checkpoint(folder / "step-00000001", run) == LoopState(step=1, table_updates=1)
        assert update_count(run.model) == 1
        restored = whole_state(run)
        assert set(restored) == set(before)
        for name, value in before.items():
            assert (restored[name] == value).all(), name


@pytest.mark.slow
def test_asynchronous_runs_end_as_synchronous_ones(
    inputs: tuple[Path, Path], tmp_path: Path
) -> None:
    runs = [
        train(
            make_config(
                *inputs, tmp_path / str(on), train__checkpoint_every=3, train__checkpoint_async=on
            )
        )
        for on in (True, False)
    ]
    assert names(runs[0]) == names(runs[1])
    losses = [[line["loss"] for line in lines(run, "train")] for run in runs]
    assert losses[0] == losses[1]


@pytest.mark.slow
@pytest.mark.parametrize("asynchronous", [True, False])
def test_a_failed_write_is_told_and_leaves_the_one_before(
    inputs: tuple[Path, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    asynchronous: bool,
) -> None:
    options = {"train__checkpoint_every": 4, "train__checkpoint_async": asynchronous}
    config = make_config(*inputs, tmp_path / "run", train__eval_every=20, **options)
    begin, calls = shutil.rmtree, []

    def full(path: Path, **rest: Any) -> None:
        if Path(path).name == "step-00000008.partial":
            calls.append(path)
            raise OSError(28, "No space left on device")
        begin(path, **rest)

    with monkeypatch.context() as patched:
        patched.setattr(checkpoint_writer.shutil, "rmtree", full)
        with pytest.raises(
            InputError, match=r"step-00000008: rank 0 could not write it: no space left .*--resume"
        ):
            train(config)
    # Synchronously training stops at once; asynchronously at the next checkpoint.
    assert len(lines(tmp_path / "run", "train")) == (12 if asynchronous else 8)
    assert len(calls) == 1
    assert names(tmp_path / "run") == ["step-00000004"]
    train(config, resume=True)
    assert [line["step"] for line in lines(tmp_path / "run", "train")] == list(range(1, 21))


def test_a_failed_last_write_is_told_at_the_end(
    inputs: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config(*inputs, tmp_path / "run", train__checkpoint_async=True)
    rename = Path.rename

    def refuse(self: Path, target: Path) -> Path:
        if self.name == "step-00000020.partial":
            raise PermissionError(13, "Permission denied")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(InputError, match=r"step-00000020: rank 0 .*Permission denied"):
        train(config)
    assert not (tmp_path / "run/summary.json").exists()


@pytest.mark.distributed
def test_a_rank_that_cannot_write_is_named_on_all_ranks(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.drills.write_failure", str(tmp_path)],
        cwd=ROOT,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    first, second = json.loads(done.stdout)
    assert first == second
    assert re.search(r"step-00000002: rank 1 could not write it: no space left", first["told"])
    assert first["whole"] == ["step-00000001"]


def test_the_newest_and_the_best_are_kept(inputs: tuple[Path, Path], tmp_path: Path) -> None:
    config = make_config(*inputs, tmp_path / "source", train__epochs=1)
    source = checkpoints(train(config) / "checkpoints")[-1]
    folder = tmp_path / "many"
    aucs = {1: None, 2: 0.8, 3: 0.9, 4: 0.7, 5: None, 6: 0.6, 7: None}
    for step, auc in aucs.items():
        copied = shutil.copytree(source, folder / f"step-{step:08d}")
        description = json.loads((copied / "checkpoint.json").read_text())
        description["loop"] |= {"step": step, "auc": auc, "best_step": 3 if step > 2 else 0}
        # As version 0.1 wrote it, which chose by AUC.
        for name in ("score", "best_score", "best_by", "best_normalised_entropy"):
            del description["loop"][name]
        del description["checksum"], description["checksums"]
        (copied / "checkpoint.json").write_text(json.dumps(description))
    (folder / "step-00000009.partial").mkdir()  # what a killed writer leaves
    prune(folder, keep_last=3, keep_best=2)
    assert [path.name[-1] for path in checkpoints(folder)] == ["2", "3", "5", "6", "7"]
    prune(folder, keep_last=1, keep_best=1)
    assert [path.name[-1] for path in sorted(folder.iterdir())] == ["3", "7"]


def test_a_checkpoint_describes_itself(inputs: tuple[Path, Path], tmp_path: Path) -> None:
    config = make_config(*inputs, tmp_path / "run", train__epochs=1)
    newest = checkpoints(train(config) / "checkpoints")[-1]
    found = json.loads((newest / "checkpoint.json").read_text())
    assert found["format_version"] == 2
    assert (found["loop"]["step"], found["loop"]["epoch"], found["world_size"]) == (10, 1, 1)
    tables = {table["table"]: table for table in found["tables"]}
    assert (tables["user"]["rows"], tables["user"]["dim"]) == (41, 4)
    assert tables["user"]["sharding"] == "row_wise"
    assert set(found["fingerprints"]) == {"user", "item", "scenario"}
    assert found["config"] == config.model_dump()
    assert torch.__version__.startswith(found["versions"]["torch"].split("+")[0])
    assert found["files"].keys() == {path.name for path in newest.iterdir()} - {"checkpoint.json"}


def cut_short(checkpoint: Path) -> str:
    file = max(checkpoint.glob("*.distcp"))
    os.truncate(file, file.stat().st_size - 1)
    return rf"{file.name} has \d+ bytes instead of \d+"


def lose_a_file(checkpoint: Path) -> str:
    (checkpoint / ".metadata").unlink()
    return r"\.metadata is missing"


def flip_a_bit(checkpoint: Path) -> str:
    file = next(checkpoint.glob("*.distcp"))
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    return rf"{file.name} has another checksum than when it was written"


def lose_the_description(checkpoint: Path) -> str:
    (checkpoint / "checkpoint.json").write_text('{"format_')
    return r"checkpoint\.json is missing or damaged"


@pytest.mark.slow
@pytest.mark.parametrize("damage", [cut_short, flip_a_bit, lose_a_file, lose_the_description])
def test_resuming_passes_over_a_damaged_checkpoint_and_says_so(
    inputs: tuple[Path, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    damage: Any,
) -> None:
    options = {"train__checkpoint_every": 3, "train__keep_checkpoints": 3, "train__eval_every": 20}
    config = make_config(*inputs, tmp_path / "run", **options)
    interrupt_at(11, monkeypatch, config)
    folder = tmp_path / "run/checkpoints"
    assert names(tmp_path / "run") == ["step-00000003", "step-00000006", "step-00000009"]
    (folder / "step-00000012.partial").mkdir()
    reason = damage(folder / "step-00000009")
    train(config, resume=True)
    told = capsys.readouterr().err
    assert re.search(rf"skipped .*step-00000009: {reason}", told)
    assert re.search(r"resumed from .*step-00000006", told)
    assert [line["step"] for line in lines(tmp_path / "run", "train")] == list(range(1, 21))
    assert not list(folder.glob("*.partial"))
    assert all(problem_of(path) is None for path in checkpoints(folder))


def _same_json(one: bytes, other: bytes) -> bool:
    """Whether nothing has changed: 1e-05 and 1E-05 differ by a bit."""
    try:
        return json.loads(one) == json.loads(other)
    except ValueError:
        return False


def test_every_flipped_bit_is_found(inputs: tuple[Path, Path], tmp_path: Path) -> None:
    run = train(make_config(*inputs, tmp_path / "run", train__epochs=1))
    checkpoint = checkpoints(run / "checkpoints")[-1]
    assert problem_within(checkpoint) is None
    generator = random.Random(0)
    for file in sorted(checkpoint.iterdir()):
        content = file.read_bytes()
        for _ in range(50):
            damaged = bytearray(content)
            damaged[generator.randrange(len(content))] ^= 1 << generator.randrange(8)
            file.write_bytes(damaged)
            assert problem_within(checkpoint) is not None or _same_json(damaged, content)
        file.write_bytes(content)
    assert problem_within(checkpoint) is None


@pytest.mark.parametrize("moment", ["set aside", "complete"])
def test_a_crash_while_a_step_is_saved_again_loses_no_copy(
    inputs: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    config = make_config(*inputs, tmp_path / "run", train__checkpoint_every=3)
    interrupt_at(7, monkeypatch, config)
    folder = tmp_path / "run/checkpoints"
    newest = checkpoints(folder)[-1]
    assert newest.name == "step-00000006"
    # What `finish` leaves when it is killed between its two renames.
    shutil.copytree(newest, folder / "step-00000006.partial")
    newest.rename(folder / "step-00000006.replaced.partial")
    if moment == "complete":
        (folder / "step-00000006.partial").rename(newest)
    resumed = restored_at(config, monkeypatch)
    assert resumed == 6


def restored_at(config: Any, monkeypatch: pytest.MonkeyPatch) -> int:
    """Resumes a run; returns the step that it goes on from, by what the loop gets."""
    steps: list[int] = []
    opened = RunLog.__init__

    def note(self: RunLog, run: Any, step: int) -> None:
        steps.append(step)
        opened(self, run, step)

    with monkeypatch.context() as patched:
        patched.setattr(RunLog, "__init__", note)
        train(config, resume=True)
    return steps[0]


def test_a_finished_run_without_its_best_checkpoint_takes_its_last(
    inputs: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # Next to nothing is learned, so that an evaluation without gain ends it.
    rates = ("train__learning_rate", "train__meta_learning_rate", "tables__learning_rate")
    options = dict.fromkeys(rates, 1e-12) | {"train__patience": 1}
    config = make_config(*inputs, tmp_path / "run", **options)
    run = train(config)
    best, last = names(run)
    assert json.loads((run / "summary.json").read_text())["best_step"] == int(best[-8:])
    flip_a_bit(run / "checkpoints" / best)
    train(config, resume=True)
    told = capsys.readouterr().err
    assert re.search(r"best checkpoint is not whole: .* checksum .*; this one is the best", told)
    assert json.loads((run / "summary.json").read_text())["best_step"] == int(last[-8:])


def test_only_damaged_checkpoints_are_refused(
    inputs: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config(*inputs, tmp_path / "run", train__checkpoint_every=3)
    interrupt_at(4, monkeypatch, config)
    cut_short(tmp_path / "run/checkpoints/step-00000003")
    with pytest.raises(InputError, match=r"bytes instead of .*\nno checkpoint is whole: remove"):
        train(config, resume=True)


@pytest.mark.slow
def test_a_lost_best_checkpoint_is_told_and_found_anew(
    inputs: tuple[Path, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = make_config(*inputs, tmp_path / "run", train__checkpoint_every=7)
    interrupt_at(8, monkeypatch, config)
    shutil.rmtree(tmp_path / "run/checkpoints/step-00000005")
    train(config, resume=True)
    assert "step-00000005: the best checkpoint is not whole" in capsys.readouterr().err
    assert json.loads((tmp_path / "run/summary.json").read_text())["best_step"] > 5


@pytest.mark.slow
def test_a_run_is_resumed_with_other_shardings_and_not_with_another_rate(
    inputs: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"train__checkpoint_every": 3, "train__eval_every": 20}
    interrupt_at(5, monkeypatch, make_config(*inputs, tmp_path / "run", **options))
    with pytest.raises(InputError, match=r"train.learning_rate: 0.001, now 0.01\); change it back"):
        train(make_config(*inputs, tmp_path / "run", train__learning_rate=0.01, **options), True)
    sharded = {"tables__sharding": "{user: column_wise, item: table_wise}"}
    run = train(make_config(*inputs, tmp_path / "run", **options, **sharded), resume=True)
    plan = {
        table["table"]: table["sharding"] for table in json.loads((run / "plan.json").read_text())
    }
    assert plan["user"] == "column_wise"
    assert "column_wise" in (run / "config.yaml").read_text()


@pytest.mark.slow
def test_other_knowledge_is_refused(
    inputs: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config(*inputs, tmp_path / "run", train__checkpoint_every=3)
    interrupt_at(5, monkeypatch, config)
    newest = checkpoints(tmp_path / "run/checkpoints")[-1]
    other = write_stores(inputs[0], tmp_path / "other", seed=9)
    changed = make_config(inputs[0], other, tmp_path / "changed")
    with distributed(60) as runtime:
        opened = open_inputs(changed, runtime)
        run = build(changed, runtime, prepare_folder(changed, runtime, resume=False), opened)
        with pytest.raises(InputError, match="trained with knowledge"):
            load_checkpoint(newest, run)


@pytest.mark.parametrize(
    "edit",
    [
        lambda about: about.pop("files"),
        lambda about: about.pop("loop"),
        lambda about: about.update(files=[]),
        lambda about: about.update(loop=3),
        lambda about: about.pop("fingerprints"),
        lambda about: about.update(config=None),
        lambda about: about["config"].pop("tables"),
        lambda about: about["config"].update(data=[]),
        lambda about: about["loop"].update(step="9"),
        lambda about: about["loop"].update(best_step=None),
        lambda about: about["loop"].update(left_out=[1.5]),
    ],
)
def test_a_description_without_its_fields_is_a_damaged_checkpoint(
    tmp_path: Path, edit: Callable[[dict[str, Any]], Any]
) -> None:
    with tarfile.open(ROOT / "tests/stored/v0.1.tar.xz") as archive:
        archive.extractall(tmp_path, filter="data")
    checkpoint = tmp_path / "runs/vocabulary/checkpoints/step-00000060"
    assert problem_of(checkpoint) is None
    file = checkpoint / "checkpoint.json"
    about = json.loads(file.read_text())
    edit(about)
    file.write_text(json.dumps(about))
    with pytest.raises(InputError, match=r"checkpoint\.json is missing or damaged"):
        read_state(checkpoint)


def test_a_pipe_is_a_damaged_checkpoint(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "checkpoint.json")
    assert problem_of(tmp_path) == "checkpoint.json is missing or damaged"
