"""Hosts that do not agree are refused, and named. A rank in a folder of its own plays a host of its own."""

import socket
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from llm_knowledge.errors import InputError
from tests.helpers.ranks import Ranks
from trainer.distributed import host_check as hosts
from trainer.distributed.host_check import check_agreement, check_hosts, check_shared
from trainer.distributed.process_group import distributed

pytestmark = pytest.mark.distributed


def on_two_hosts(check: Callable[[int], None]) -> list[str]:
    """Runs `check(rank)` on two ranks that believe to be on hosts of their own; returns what it raised."""

    def rank_main(rank: int) -> str:
        socket.gethostname = lambda: f"host-{rank}"
        hosts.PATIENCE_SECONDS = 0.3
        try:
            check(rank)
        except InputError as error:
            return str(error) if error.shared else f"only here: {error}"
        return ""

    return Ranks(2, rank_main).join()


def test_a_shared_folder_is_accepted_and_left_as_it_was(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    for name in ("there", "new"):
        assert on_two_hosts(lambda rank, name=name: check_shared(tmp_path / name)) == ["", ""]
    assert not any((tmp_path / "there").iterdir())
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("exists", [True, False])
def test_a_folder_that_is_not_shared_is_found(tmp_path: Path, exists: bool) -> None:
    if exists:
        (tmp_path / "disk-1").mkdir()
    raised = on_two_hosts(lambda rank: check_shared(tmp_path / f"disk-{rank}"))
    for text in raised:
        assert "is not shared" in text
        assert "not seen by host-1 (rank 1)" in text
    assert not (tmp_path / "disk-0").exists()


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for text in on_two_hosts(lambda rank: check_shared(tmp_path / "file" / "run")):
        assert "cannot be written on the first host: Not a directory" in text


def test_other_versions_are_named_with_their_hosts() -> None:
    releases = ["2.13.0", "2.11.0"]
    raised = on_two_hosts(lambda rank: check_agreement({"torch": releases[rank]}))
    for text in raised:
        assert "torch: 2.13.0 on host-0 (rank 0); 2.11.0 on host-1 (rank 1)" in text


def test_other_code_and_other_work_are_found(tmp_path: Path) -> None:
    def check(rank: int) -> None:
        hosts._code_hash = lambda: f"checkout {rank}"
        check_hosts(tmp_path / "run", {"epochs": rank})

    for text in on_two_hosts(check):
        assert "code of llm4msr: checkout 0 on host-0 (rank 0); checkout 1 on host-1" in text
        assert "configuration: " in text
    assert not (tmp_path / "run").exists()


def test_more_ranks_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    with pytest.raises(InputError, match=r"4 ranks on .* has 2 GPUs"), distributed(10):
        pass
