"""The ranks that the tests fork."""

import gc
import os
import time

from tests.ranks import Ranks


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
