"""Ranks that fail or hang are named and none is left alive."""

import gc
import os
import time

import pytest
import torch
import torch.distributed as dist

from tests.helpers.ranks import Ranks

pytestmark = pytest.mark.distributed


def test_ranks_meet_and_their_results_are_in_order() -> None:
    def total(rank: int, factor: int) -> tuple[int, int]:
        value = torch.tensor(factor * (rank + 1))
        dist.all_reduce(value)
        return rank, int(value)

    assert Ranks(2, total, 10).join() == [(0, 30), (1, 30)]


def test_the_rank_that_failed_is_named_and_shown(capfd: pytest.CaptureFixture[str]) -> None:
    def fail(rank: int) -> None:
        if rank == 1:
            raise ValueError("broken here")
        time.sleep(30)

    ranks, began = Ranks(2, fail), time.monotonic()
    with pytest.raises(RuntimeError, match=r"^rank 1 of 2 ended with exit code 1$"):
        ranks.join()
    assert time.monotonic() - began < 20  # does not wait for the other
    assert not any(process.is_alive() for process in ranks.processes)
    shown = capfd.readouterr().err
    assert "Process rank 1 of 2:" in shown
    assert "ValueError: broken here" in shown


def test_the_rank_that_hangs_is_named_with_its_stack(capfd: pytest.CaptureFixture[str]) -> None:
    def standing_still(rank: int) -> None:
        if rank == 0:
            time.sleep(30)

    ranks = Ranks(2, standing_still)
    with pytest.raises(RuntimeError, match=r"^rank 0 of 2 hung for 3 s$"):
        ranks.join(3)
    assert not any(process.is_alive() for process in ranks.processes)
    assert "in standing_still" in capfd.readouterr().err


def test_exit_codes_that_are_expected_are_no_failure() -> None:
    def leave(rank: int) -> str:
        if rank == 1:
            raise SystemExit(2)
        return "done"

    assert Ranks(2, leave).join(codes=(0, 2)) == ["done", None]


class NeedsItsThread:
    """Garbage whose destructor waits, in a fork, for a thread that is not there."""

    def __init__(self) -> None:
        self.home = os.getpid()
        self.cycle = self

    def __del__(self) -> None:
        if os.getpid() != self.home:
            time.sleep(60)


def test_ranks_do_not_collect_the_garbage_of_the_session() -> None:
    gc.disable()
    try:
        NeedsItsThread()
        assert Ranks(2, lambda rank: gc.collect() >= 0).join(timeout=20) == [True, True]
    finally:
        gc.enable()
    assert gc.get_freeze_count() == 0
