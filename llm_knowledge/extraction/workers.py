"""How the workers of one extraction share the work: a key-value store, no collectives.

Chunks are claimed by a counter, so a slow worker takes fewer of them, and nobody waits for a
collective that a long chunk would let time out.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, Protocol

from llm_knowledge.errors import InputError


class Workers(Protocol):
    """What an extraction needs from its peers. `name` keeps the stages of a run apart."""

    rank: int
    size: int

    def publish(self, name: str, value: dict[str, Any]) -> None:
        """Rank 0 hands a JSON-able value to all."""

    def receive(self, name: str) -> dict[str, Any]:
        """Waits for a published value."""

    def count(self, name: str, amount: int) -> int:
        """Adds to a counter of all workers and returns its new value."""

    def note(self, name: str, value: dict[str, float]) -> None:
        """Leaves this worker's latest value for all to see."""

    def notes(self, name: str) -> dict[int, dict[str, float]]:
        """The latest values by rank, of those who left one. Waits for nobody."""


class OneWorker:
    """A run in a single process."""

    rank, size = 0, 1

    def __init__(self) -> None:
        self._counts: dict[str, int] = {}
        self._values: dict[str, dict[str, Any]] = {}

    def publish(self, name: str, value: dict[str, Any]) -> None:
        """Keeps a value."""
        self._values[name] = value

    def receive(self, name: str) -> dict[str, Any]:
        """Returns a kept value."""
        return self._values[name]

    def count(self, name: str, amount: int) -> int:
        """Adds to a counter."""
        self._counts[name] = self._counts.get(name, 0) + amount
        return self._counts[name]

    def note(self, name: str, value: dict[str, float]) -> None:
        """Keeps a value."""
        self._values[f"note/{name}"] = value

    def notes(self, name: str) -> dict[int, dict[str, float]]:
        """The kept value."""
        notes = self._values.get(f"note/{name}")
        return {} if notes is None else {0: notes}


class StoreWorkers:
    """Workers started by torchrun (or anything that sets RANK, WORLD_SIZE, MASTER_ADDR/PORT)."""

    def __init__(self, timeout: timedelta) -> None:
        import torch.distributed as dist

        from llm_knowledge.job_store import open_job_store

        try:
            store, self.rank, self.size = open_job_store(timeout)
        except (ValueError, RuntimeError) as error:
            raise InputError(f"the workers cannot find each other: {error}") from error
        store.set_timeout(timeout)
        # torchrun shares one store between restarts: keys of a dead attempt must not be seen.
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        self._store = dist.PrefixStore(f"extract/{attempt}", store)

    def publish(self, name: str, value: dict[str, Any]) -> None:
        """Hands a value to all workers."""
        self._store.set(name, json.dumps(value))

    def receive(self, name: str) -> dict[str, Any]:
        """Waits for a published value, up to the timeout."""
        return json.loads(self._store.get(name))

    def count(self, name: str, amount: int) -> int:
        """Adds to a counter of all workers."""
        return self._store.add(name, amount)

    def note(self, name: str, value: dict[str, float]) -> None:
        """Leaves this worker's latest value for all to see."""
        self._store.set(f"{name}/{self.rank}", json.dumps(value))

    def notes(self, name: str) -> dict[int, dict[str, float]]:
        """The latest values by rank, of those who left one."""
        slots = {rank: f"{name}/{rank}" for rank in range(self.size)}
        ranks = [rank for rank, slot in slots.items() if self._store.check([slot])]
        if not ranks:
            return {}
        notes = self._store.multi_get([slots[rank] for rank in ranks])
        return {rank: json.loads(value) for rank, value in zip(ranks, notes, strict=True)}


@contextmanager
def connect(timeout: timedelta) -> Iterator[Workers]:
    """The workers of this run; on the way out, rank 0 (which may host the store) leaves last."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield OneWorker()
        return
    workers = StoreWorkers(timeout)
    try:
        yield workers
    finally:
        workers.count("left", 1)
        if workers.rank == 0:
            wait_until(lambda: workers.count("left", 0) >= workers.size, timedelta(seconds=20))


def wait_until(done: Callable[[], bool], timeout: timedelta, pause: float = 0.05) -> bool:
    """Polls until `done()`; false if that took longer than `timeout`."""
    import time

    end = time.monotonic() + timeout.total_seconds()
    while not done():
        if time.monotonic() > end:
            return False
        time.sleep(pause)
    return True
