"""What every worker of an extraction has done so far, and when all of it will be done."""

from __future__ import annotations

import sys
import time
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llm_knowledge.encoding.encoder import Counters
    from llm_knowledge.extraction.workers import Workers

# The workers' own lines stand above the bar this often.
SECONDS_BETWEEN_LINES = 60.0


class Progress:
    """One worker's share of a level; on rank 0 also the bar and the lines of all workers."""

    def __init__(
        self, workers: Workers, unit: str, total: int, before: int, counters: Counters, show: bool
    ) -> None:
        """Begins a level.

        Args:
            workers: all workers of the run.
            unit: what a row is: "user", "item" or "scenario".
            total: rows of the store.
            before: rows that an earlier run has written.
            counters: of this worker's encoder; only what is added from now on counts here.
            show: whether rank 0 draws.
        """
        from tqdm import tqdm

        self._workers, self._unit, self._total, self._before = workers, unit, total, before
        self._counters, self._start = counters, replace(counters)
        self._begun, self._shown, self._rows = time.monotonic(), time.monotonic(), 0
        self.bar: Any = tqdm(
            total=total,
            initial=before,
            unit=unit,
            mininterval=0.5,
            desc=f"{unit} knowledge",
            leave=False,
            disable=not (show and workers.rank == 0),
        )

    def begin(self, chunk: int) -> None:
        """Tells the others that this worker reads the next `chunk` rows."""
        self._note(chunk)

    def add(self, rows: int) -> None:
        """Tells the others that this worker has written `rows` more rows."""
        self._rows += rows
        self._note(0)
        self.draw()

    def _note(self, chunk: int) -> None:
        now, start = asdict(self._counters), asdict(self._start)
        values = {name: now[name] - start[name] for name in now}
        values |= {
            "rows": self._rows,
            "chunk": chunk,
            "clock": time.monotonic() - self._begun,
            "at": time.time(),
        }
        self._workers.note(f"{self._unit}/progress", values)

    def draw(self, last: bool = False) -> None:
        """Brings the bar up to date; from time to time a line for every worker, at the end one for all."""
        if self.bar.disable:
            return
        shares = self._workers.notes(f"{self._unit}/progress")
        rows = int(sum(share["rows"] for share in shares.values()))
        self.bar.set_postfix_str(speed(list(shares.values())), refresh=False)
        self.bar.update(self._before + rows - self.bar.n)
        if not last and time.monotonic() - self._shown < SECONDS_BETWEEN_LINES:
            return
        self._shown = time.monotonic()
        told = lines(shares, self._unit, self._total - self._before - rows)
        for line in told[-1:] if last else told:
            self.bar.write(line, file=sys.stderr)

    def close(self) -> None:
        """Draws for the last time."""
        self.draw(last=True)
        self.bar.close()


def speed(shares: list[dict[str, float]]) -> str:
    """Tokens per second, padding and reuse of the workers together."""
    rate = sum(share["tokens"] / max(share["clock"], 1e-9) for share in shares)
    whole = {
        name: sum(share[name] for share in shares)
        for name in ("tokens", "computed", "padding", "reused")
    }
    return (
        f"{rate:,.0f} tokens/s, padding {whole['padding'] / max(1, whole['computed']):.0%}, "
        f"reused {whole['reused'] / max(1, whole['tokens']):.0%}"
    )


def lines(shares: dict[int, dict[str, float]], unit: str, left: int) -> list[str]:
    """One line per worker, and one for all of them.

    Args:
        shares: by rank, what it noted last.
        unit: what a row is.
        left: rows that nobody has written yet.
    """
    out, rates = [], {}
    for rank, share in sorted(shares.items()):
        rate = rates[rank] = share["rows"] / max(share["clock"], 1e-9)
        said = (
            f"worker {rank}: {share['rows']:,.0f} {unit}s, {rate:,.1f} {unit}s/s, {speed([share])}"
        )
        if share["chunk"] and rate:
            rest = share["chunk"] / rate - (time.time() - share["at"])
            said += f"; its chunk of {share['chunk']:.0f} ends in about {max(0.0, rest):.0f} s"
        out.append(said)
    total = sum(rates.values())
    said = f"all: {sum(share['rows'] for share in shares.values()):,.0f} {unit}s, {total:,.1f} {unit}s/s"
    said += f", {speed(list(shares.values()))}"
    out.append(said + (f"; {left:,} to go, about {left / total:,.0f} s" if left and total else ""))
    return out
