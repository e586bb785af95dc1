"""For every test: what the session leaves to the garbage collector, who shares a worker, what is logged."""

import gc
import os

import pytest

from launch.logs import set_up_logging

# A fork has none of the session's threads. Collecting there what the session left, such as a
# connection whose destructor waits for its thread, would never end.
os.register_at_fork(before=gc.freeze, after_in_parent=gc.unfreeze)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Puts files with slow tests first, so that no worker ends with one that it began last.

    Parallel workers take whole files (`--dist loadfile`): a file's fixtures are made once, and what a
    machine has only once, such as the names of network namespaces, is used by one file.
    """
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.fixture(autouse=True)
def _as_a_command_logs() -> None:
    """What is called in a test's own process says on stderr what a command would, whatever ran before."""
    set_up_logging()
