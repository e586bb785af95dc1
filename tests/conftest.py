"""For every test: what the session leaves to the garbage collector, who shares a worker, what is logged."""

import gc
import os

import pytest

from launch.logs import set_up_logging

# A fork has none of the session's threads. Collecting there what the session left, such as a
# connection whose destructor waits for its thread, would never end.
os.register_at_fork(before=gc.freeze, after_in_parent=gc.unfreeze)

# Network namespaces and a Slurm have names and addresses that a machine has once.
ONE_PER_MACHINE = ("namespaces", "slurm")


# First: xdist reads the groups in a hook of the same name.
@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Makes each file one unit of work for the parallel workers, files with slow tests first.

    A file's fixtures are then made once, and no worker ends with a slow file that it began last. All
    that a machine has only once is one unit.
    """
    groups = {
        item: "local_cluster"
        if any(item.get_closest_marker(name) for name in ONE_PER_MACHINE)
        else item.nodeid.partition("::")[0]
        for item in items
    }
    slow = {groups[item] for item in items if item.get_closest_marker("slow")}
    for item in items:
        item.add_marker(pytest.mark.xdist_group(groups[item]))
    items.sort(key=lambda item: groups[item] not in slow)


@pytest.fixture(autouse=True)
def _as_a_command_logs() -> None:
    """What is called in a test's own process says on stderr what a command would, whatever ran before."""
    set_up_logging()
