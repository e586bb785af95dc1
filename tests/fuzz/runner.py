"""Runs many cases in forked processes: a case that hangs or kills its process is found, and named."""

import contextlib
import io
import json
import os
import select
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

from tests.fuzz.verdicts import Broken

# Of (random numbers, an empty folder): what is returned names the verdict, such as "refused".
Case = Callable[[Random, Path], str]


@dataclass
class Report:
    """What became of the cases: how many ended in which way, and what was wrong.

    Attributes:
        verdicts: How often each verdict was given.
        broken: Number of a case and which promise it broke.
    """

    verdicts: Counter[str] = field(default_factory=Counter)
    broken: list[tuple[int, str]] = field(default_factory=list)


def random_numbers(kind: str, seed: int, number: int) -> Random:
    """The random numbers of one case, whichever cases were run before it."""
    return Random(f"{kind} {seed} {number}")


def run_cases(
    kind: str,
    case: Case,
    seed: int,
    numbers: range,
    workers: int = 1,
    patience: float = 60.0,
    tell: Callable[[int, str], None] = lambda number, problem: None,
) -> Report:
    """Runs the cases with these numbers.

    Args:
        kind: Enters the random numbers.
        case: What is run.
        seed: Enters the random numbers.
        numbers: Of the cases.
        workers: Processes side by side.
        patience: Seconds after which a case counts as a hang.
        tell: Called at once with the number of a case and which promise it broke.
    """
    report = Report()
    lanes = [_Lane(kind, case, seed, numbers[first::workers], patience) for first in range(workers)]
    lanes = [lane for lane in lanes if lane.start()]
    while lanes:
        ready = select.select([lane.pipe for lane in lanes], [], [], 1.0)[0]
        for lane in list(lanes):
            for number, verdict, problem in lane.results(lane.pipe in ready):
                report.verdicts[verdict] += 1
                if problem:
                    report.broken.append((number, problem))
                    tell(number, problem)
            if lane.ended and not lane.start():
                lanes.remove(lane)
    report.broken.sort()
    return report


class _Lane:
    """One process after another that works off its numbers; a new one begins behind a dead one's case."""

    def __init__(self, kind: str, case: Case, seed: int, numbers: range, patience: float) -> None:
        self.kind, self.case, self.seed, self.patience = kind, case, seed, patience
        self.numbers = list(numbers)
        self.pipe, self.pid, self.ended = -1, 0, True
        self._text = b""

    def start(self) -> bool:
        """Forks a process for the numbers that are left; says whether there were any."""
        if not self.numbers:
            return False
        read, write = os.pipe()
        # A session of its own: what a case has started ends with it.
        self.pid = os.fork()
        if self.pid == 0:
            os.close(read)
            os.setsid()
            _work(self.kind, self.case, self.seed, self.numbers, write)
        os.close(write)
        self.pipe, self.ended, self._text = read, False, b""
        self._since = time.monotonic()
        return True

    def results(self, ready: bool) -> Iterator[tuple[int, str, str]]:
        """Yields (number, verdict, what was broken) of the cases that have ended."""
        if ready:
            piece = os.read(self.pipe, 65_536)
            self._text += piece
            *lines, self._text = self._text.split(b"\n")
            for line in lines:
                self._since = time.monotonic()
                self.numbers.pop(0)
                yield tuple(json.loads(line))
            if not piece:
                yield from self._over("died")
        elif time.monotonic() - self._since > self.patience:
            yield from self._over("hung")

    def _over(self, how: str) -> Iterator[tuple[int, str, str]]:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        _, status = os.waitpid(self.pid, 0)
        os.close(self.pipe)
        self.ended = True
        if self.numbers:
            words = f"{how}: {status & 0x7F or status >> 8}" if how == "died" else how
            yield self.numbers.pop(0), how, words


def _work(kind: str, case: Case, seed: int, numbers: list[int], pipe: int) -> None:
    """Runs cases and writes a line for each; never returns."""
    quiet = os.open(os.devnull, os.O_RDWR)
    os.dup2(quiet, 0)
    if "FUZZ_SHOW" not in os.environ:  # libraries write to the descriptors themselves
        os.dup2(quiet, 1)
        os.dup2(quiet, 2)
        sys.stdout, sys.stderr = io.StringIO(), io.StringIO()
    for number in numbers:
        folder = Path(tempfile.mkdtemp(prefix="fuzz-"))
        verdict, problem = "broken", ""
        try:
            os.chdir(folder)
            verdict = case(random_numbers(kind, seed, number), folder)
        except Broken as error:
            problem = str(error)
        except Exception as error:  # a fault of the case itself
            verdict, problem = "faulty", f"the case itself: {type(error).__name__}: {error}"
        finally:
            os.chdir("/")
            if "FUZZ_KEEP" not in os.environ:
                shutil.rmtree(folder, ignore_errors=True)
            else:
                problem += f" [{folder}]"
        os.write(pipe, (json.dumps([number, verdict, problem]) + "\n").encode())
    os._exit(0)
