"""Ranks on one machine: how they meet, what they inherit, what their end means."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.helpers.paths import ROOT
from tests.helpers.training_data import make_config, make_inputs, write_config

LISTENS = "0A"  # a state in /proc/net/tcp
LOOPBACK = {"0100007F", "0" * 24 + "01000000", "0000000000000000FFFF00000100007F"}


def process_tree(root: int) -> list[int]:
    """A process and all that descend from it."""
    children: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue  # it has ended
        children.setdefault(int(fields[1]), []).append(int(stat.parent.name))
    tree = [root]
    for process in tree:
        tree += children.get(process, [])
    return tree


def listening_addresses(processes: list[int]) -> set[str]:
    """Addresses, in the kernel's hexadecimal, on which any of the processes listens."""
    sockets = set()
    for process in processes:
        for link in Path(f"/proc/{process}/fd").glob("*"):
            try:
                sockets.add(os.readlink(link))
            except OSError:
                continue  # closed meanwhile
    addresses = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == LISTENS and f"socket:[{fields[9]}]" in sockets:
                addresses.add(fields[1].partition(":")[0])
    return addresses


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/net/tcp").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize("processes", [1, 2])
def test_training_on_one_machine_listens_on_no_interface_but_its_own(
    tmp_path: Path, processes: int
) -> None:
    config = make_config(*make_inputs(tmp_path), tmp_path / "run", train__epochs=2)
    file = write_config(config, tmp_path / "config.yaml")
    command = [sys.executable, "-m", "launch", "train", "--config", str(file)]
    with (tmp_path / "output").open("w") as output:
        training = subprocess.Popen(
            [*command, "--processes", str(processes)], cwd=ROOT, stdout=output, stderr=output
        )
        seen: set[str] = set()
        while training.poll() is None:
            seen |= listening_addresses(process_tree(training.pid))
            time.sleep(0.05)
    assert training.returncode == 0, (tmp_path / "output").read_text()
    assert seen, "gloo listens for the other ranks: the test would see nothing else either"
    assert seen <= LOOPBACK


def test_what_ranks_inherit_does_not_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from launch.workers import run_workers

    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    (tmp_path / "rank_module.py").write_text(
        "import os, pathlib, sys\n"
        "pathlib.Path(sys.argv[1]).write_text('\\n'.join(f'{k}={v}' for k, v in os.environ.items()))\n"
        "sys.exit(7)\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    before = dict(os.environ)
    assert run_workers("rank_module", [str(tmp_path / "environment")], 1) == 7
    assert dict(os.environ) == before
    lines = (tmp_path / "environment").read_text().splitlines()
    inherited = dict(line.partition("=")[::2] for line in lines)
    assert inherited["OMP_NUM_THREADS"] == "3"
    folder = Path(inherited["LLM4MSR_STORE"]).parent
    assert not folder.exists()
