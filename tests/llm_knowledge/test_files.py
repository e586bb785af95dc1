"""What is written appears whole or not at all, and a killed run leaves nothing that stays."""

import os
import signal
import subprocess
import sys
import tempfile
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from llm_knowledge import files
from llm_knowledge.errors import InputError
from llm_knowledge.files import (
    new_directory,
    new_file,
    recover_replaced,
    remove_abandoned,
    replace_directory,
    workspace,
    write_bytes,
    write_json,
    write_text,
)
from llm_knowledge.locks import directory_lock
from tests.helpers.paths import ROOT

KILLED = """
import os, signal, sys
from llm_knowledge.files import new_directory, new_file
make = {"file": new_file, "directory": new_directory}[sys.argv[1]]
with make(sys.argv[2]) as temporary:
    secret = temporary / "part" if sys.argv[1] == "directory" else temporary
    secret.write_text("what user 7 likes")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def kill_while_writing(kind: str, path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", KILLED, kind, path], cwd=ROOT, check=False)
    assert done.returncode == -signal.SIGKILL


def break_off(writing: AbstractContextManager[Path]) -> None:
    """Fails in the middle of writing a file, or a directory with a file."""
    temporary = writing.__enter__()
    (temporary / "part" if temporary.is_dir() else temporary).write_text("half")
    assert not writing.__exit__(RuntimeError, RuntimeError(), None)


def fill_the_disk(path: Path) -> None:
    with new_file(path) as temporary:
        temporary.symlink_to("/dev/full")
        with temporary.open("w") as file:
            file.write("much")


def test_a_file_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    file = tmp_path / "folder" / "a.json"
    assert write_json(file, {"a": 1}) == file
    break_off(new_file(file))
    assert file.read_text() == '{\n  "a": 1\n}\n'
    assert os.listdir(file.parent) == ["a.json"]
    write_bytes(file, b"b", durable=False)
    assert file.read_bytes() == b"b"
    write_text(file, "\ud800é")
    assert file.read_bytes() == "?é".encode()


def test_rights_are_those_of_any_other_file(tmp_path: Path) -> None:
    (tmp_path / "plain").write_text("")
    (tmp_path / "plain-directory").mkdir()
    write_text(tmp_path / "ours", "")
    with new_directory(tmp_path / "our-directory"):
        pass
    for ours, plain in (("ours", "plain"), ("our-directory", "plain-directory")):
        assert (tmp_path / ours).stat().st_mode == (tmp_path / plain).stat().st_mode


def test_a_directory_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    out = tmp_path / "out"
    break_off(new_directory(out))
    assert os.listdir(tmp_path) == []
    with new_directory(out) as building:
        (building / "part").write_text("whole")
        (building.parent / "scratch").write_text("of the block alone")
    assert [file.name for file in tmp_path.rglob("*")] == ["out", "part"]
    with pytest.raises(InputError, match="out: is not empty"), new_directory(out):
        pass
    with pytest.raises(InputError, match="part: is a file"), new_directory(out / "part"):
        pass


def test_an_empty_directory_may_be_there(tmp_path: Path) -> None:
    with new_directory(tmp_path) as building:
        (building / "part").write_text("whole")
    assert os.listdir(tmp_path) == ["part"]


def test_a_place_that_cannot_be_written_is_one_message(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="a: cannot be written"):
        write_text(tmp_path / "file" / "a", "")
    with pytest.raises(InputError, match="a: cannot be written"), new_directory("/proc/none/a"):
        pass
    with pytest.raises(InputError, match=r"a: cannot be written.*No space left"):
        fill_the_disk(tmp_path / "a")
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("kind", ["file", "directory"])
def test_what_a_kill_left_goes_with_the_next_run(tmp_path: Path, kind: str) -> None:
    """Also where the next run writes something else in that folder."""
    kill_while_writing(kind, tmp_path / "store")
    [left] = tmp_path.iterdir()
    assert [
        file
        for file in left.rglob("*")
        if "user 7" in ((file.is_file() and file.read_text()) or "")
    ]
    with new_directory(tmp_path / "another"):
        pass
    assert os.listdir(tmp_path) == ["another"]


def test_live_workspaces_stay(tmp_path: Path) -> None:
    with workspace(tmp_path / "a") as live:
        assert remove_abandoned(tmp_path) == []
        with workspace(tmp_path / "a") as other:
            assert live.is_dir()
            assert other != live
    assert os.listdir(tmp_path) == []


def test_a_workspace_that_is_cleaned_before_it_is_locked_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    take, cleaned = files.take_lock, []

    def clean_first(path: Path) -> int | None:
        if not cleaned:
            cleaned.append(path)
            path.rmdir()
        return take(path)

    monkeypatch.setattr(files, "take_lock", clean_first)
    write_text(tmp_path / "a", "whole")
    assert (tmp_path / "a").read_text() == "whole"
    assert len(cleaned) == 1


def test_files_are_written_where_there_are_no_locks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path) -> int | None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(files, "take_lock", refuse)
    with workspace(tmp_path / "b") as live:
        write_text(tmp_path / "a", "whole")
        assert live.is_dir()
    assert os.listdir(tmp_path) == ["a"]


def test_temporary_files_of_a_killed_run_go_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    kill_while_writing("directory", tmp_path / "metrics")
    with workspace(Path(tempfile.gettempdir()) / "metrics") as folder:
        assert os.listdir(tmp_path) == [folder.name]


def test_a_directory_replaces_another_and_a_crash_in_between_loses_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, text in (("old", "old"), ("new", "new")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "part").write_text(text)

    def crash(directory: Path, path: Path) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(files, "publish_directory", crash)
        with pytest.raises(KeyboardInterrupt):
            replace_directory(tmp_path / "new", tmp_path / "old")
    assert not (tmp_path / "old").exists()
    assert recover_replaced(tmp_path) == [tmp_path / "old"]
    assert (tmp_path / "old" / "part").read_text() == "old"
    replace_directory(tmp_path / "new", tmp_path / "old")
    assert recover_replaced(tmp_path) == []
    assert [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")] == ["old", "old/part"]
    assert (tmp_path / "old" / "part").read_text() == "new"


def test_a_lock_names_its_owner(tmp_path: Path) -> None:
    with directory_lock(tmp_path), pytest.raises(InputError) as told, directory_lock(tmp_path):
        pass
    assert f"another run is writing here (process {os.getpid()} on " in str(told.value)
    assert " since 20" in str(told.value)
    assert os.listdir(tmp_path) == []
