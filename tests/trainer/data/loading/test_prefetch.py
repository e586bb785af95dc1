"""Reading ahead in a thread: order, errors, bounds, and no thread that is left over."""

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import pytest

from llm_knowledge.errors import InputError
from tests.helpers.paths import ROOT
from trainer.data.loading.prefetch import BatchFeed, in_background
from trainer.run.session import reading_threads


def readers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "reads-ahead"]


def test_items_keep_their_order_and_the_thread_ends() -> None:
    assert list(in_background(iter(range(1000)), 3)) == list(range(1000))
    assert readers() == []


def test_an_error_comes_after_the_items_before_it() -> None:
    def broken() -> Iterator[int]:
        yield 1
        raise InputError("part-3: row 7")

    items = in_background(broken(), 4)
    assert next(items) == 1
    with pytest.raises(InputError, match="part-3: row 7"):
        next(items)
    assert readers() == []


def test_never_further_ahead_than_asked_for() -> None:
    made = []

    def source() -> Iterator[int]:
        for number in range(100):
            made.append(number)
            yield number

    items = in_background(source(), 3)
    assert next(items) == 0
    time.sleep(0.1)
    assert len(made) <= 1 + 3 + 1  # taken, finished, in the thread's hand
    items.close()
    assert readers() == []


def test_closing_early_closes_what_lies_behind() -> None:
    ended = []

    def source() -> Iterator[int]:
        try:
            yield from range(10**9)
        finally:
            ended.append(threading.current_thread().name)

    items = in_background(in_background(source(), 2), 2)
    assert [next(items), next(items)] == [0, 1]
    items.close()
    assert ended == ["reads-ahead"]
    assert readers() == []


@pytest.mark.parametrize("last", ["", "raise SystemExit(3)", "1 / 0"])
def test_the_interpreter_exits_with_a_thread_under_way(last: str) -> None:
    program = (
        "import itertools\n"
        "from trainer.data.loading.prefetch import in_background\n"
        "items = in_background(itertools.count(), 2)\n"
        f"assert next(items) == 0\n{last}\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, timeout=20, capture_output=True, text=True
    )
    assert done.returncode == {"": 0, "1 / 0": 1}.get(last, 3), done.stderr


def test_a_feed_goes_on_without_rows_after_bad_input() -> None:
    def broken() -> Iterator[str]:
        yield "batch"
        raise InputError("gone")

    with BatchFeed(in_background(broken(), 2), 4, lambda: "nothing") as feed:  # type: ignore[arg-type]
        assert next(feed) == "batch"
        feed.check()
        assert list(feed) == ["nothing"] * 3
        with pytest.raises(InputError, match="gone"):
            feed.check()


def test_a_thread_reads_ahead_where_a_core_is_to_spare(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 2})
    assert [reading_threads(None, ranks) for ranks in (1, 2, 3, 8)] == [1, 1, 0, 0]
    assert [reading_threads(wanted, 8) for wanted in (0, 1, 5)] == [0, 1, 5]
