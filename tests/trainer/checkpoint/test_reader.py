"""Checkpoints of strangers: their metadata is read, and runs nothing."""

import importlib
import os
import pickle
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import BytesStorageMetadata

from llm_knowledge.errors import InputError
from trainer.checkpoint.reader import ALLOWED, CheckpointReader
from trainer.checkpoint.state import live_state, saved_tensors


class Reduced:
    """Pickles as the call of a function."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self._call = (function, arguments)

    def __reduce__(self) -> Any:
        return self._call


class WithState:
    """A class of ours whose `__setstate__` acts."""

    def __init__(self, file: str) -> None:
        self.file = file

    def __setstate__(self, state: dict[str, str]) -> None:
        Path(state["file"]).touch()


def hostile(kind: str, mark: str) -> Any:
    """An object whose unpickling makes the file `mark`."""
    code = f"open({mark!r}, 'w').close()"
    return {
        "eval": lambda: Reduced(eval, f"__import__('pathlib').Path({mark!r}).touch()"),
        "exec": lambda: Reduced(exec, code),
        "os.system": lambda: Reduced(os.system, f"touch '{mark}'"),
        "importlib": lambda: Reduced(importlib.import_module, Path(mark).stem),
        "__setstate__": lambda: WithState(mark),
    }[kind]()


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    folder = tmp_path / "step-00000001"
    values = {
        str(dtype): torch.zeros(2, 3).to(dtype)
        for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.uint8)
    }
    dcp.save(values | {"a bool": torch.ones(2, dtype=torch.bool)}, checkpoint_id=folder)
    return folder


def test_real_metadata_is_read(checkpoint: Path) -> None:
    tensors = saved_tensors(checkpoint)
    assert tensors["torch.bfloat16"].size == (2, 3)
    assert tensors["a bool"].properties.dtype == torch.bool
    loaded = {"torch.int64": torch.ones(2, 3, dtype=torch.int64)}
    dcp.load(loaded, storage_reader=CheckpointReader(checkpoint))
    assert (loaded["torch.int64"] == 0).all()


@pytest.mark.parametrize("whole", [True, False], ids=["instead of metadata", "within metadata"])
@pytest.mark.parametrize("kind", ["eval", "exec", "os.system", "importlib", "__setstate__"])
def test_a_hostile_pickle_is_refused_and_runs_nothing(
    checkpoint: Path, tmp_path: Path, kind: str, whole: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    mark = tmp_path / "hostile_mark"
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "hostile_mark", raising=False)
    (tmp_path / "hostile_mark.py").write_text(f"open({str(mark)!r}, 'w').close()")
    content: Any = hostile(kind, str(mark))
    if not whole:
        metadata = pickle.loads((checkpoint / ".metadata").read_bytes())
        metadata.planner_data = {"x": content}
        content = metadata
    (checkpoint / ".metadata").write_bytes(pickle.dumps(content))
    with pytest.raises(InputError, match="which no checkpoint needs and which could run code"):
        saved_tensors(checkpoint)
    assert not mark.exists()
    pickle.loads((checkpoint / ".metadata").read_bytes())  # else the test could not fail
    assert mark.exists()


def test_objects_that_torch_would_unpickle_are_refused(checkpoint: Path) -> None:
    metadata = pickle.loads((checkpoint / ".metadata").read_bytes())
    metadata.state_dict_metadata["model.x"] = BytesStorageMetadata()
    (checkpoint / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(InputError, match="BytesStorageMetadata"):
        saved_tensors(checkpoint)


@pytest.mark.parametrize("name", ["../outside", "/etc/hostname", "absent", "."])
def test_files_outside_of_the_checkpoint_are_refused(checkpoint: Path, name: str) -> None:
    shutil.copy(checkpoint / "__0_0.distcp", checkpoint.parent / "outside")
    metadata = pickle.loads((checkpoint / ".metadata").read_bytes())
    next(iter(metadata.storage_data.values())).relative_path = name
    (checkpoint / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(InputError, match="which is not there"):
        saved_tensors(checkpoint)


@pytest.mark.parametrize("damage", ["empty", "no pickle", "another object", "absent", "a pipe"])
def test_what_is_no_metadata_is_refused(checkpoint: Path, damage: str) -> None:
    file = checkpoint / ".metadata"
    content = file.read_bytes()
    file.unlink()
    if damage == "a pipe":
        os.mkfifo(file)
    elif damage != "absent":
        file.write_bytes(
            {
                "empty": b"",
                "no pickle": content[:40],
                "another object": pickle.dumps({"a": 1}),
            }[damage]
        )
    with pytest.raises(InputError, match="the checkpoint is damaged"):
        saved_tensors(checkpoint)


def test_no_allowed_name_runs_code() -> None:
    """What is allowed are data classes, types, constants, and one function that looks up a name."""
    functions = [
        name for name, value in ALLOWED.items() if not isinstance(value, type | torch.dtype)
    ]
    assert functions == [("torch.serialization", "_get_layout")]


def test_a_fresh_optimizer_counts_its_steps_where_its_parameter_is() -> None:
    """Fused AdamW refuses a step count on the host beside a parameter on a GPU (here: meta)."""
    dense = torch.nn.Linear(2, 3, device="meta")
    run: Any = SimpleNamespace(
        model=SimpleNamespace(
            state_dict=dict,
            fused_optimizer=SimpleNamespace(state_dict=lambda: {"state": {}}),
            module=SimpleNamespace(dense=dense),
        ),
        optimizer=torch.optim.AdamW(dense.parameters()),
    )
    state = live_state(run)
    assert {name.rsplit(".", 1)[1] for name in state} == {"step", "exp_avg", "exp_avg_sq"}
    assert {value.device.type for value in state.values()} == {"meta"}
