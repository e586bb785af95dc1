"""Reading ahead in threads, and bad input that ends a loop on all ranks at once."""

import atexit
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator
from types import TracebackType
from typing import Generic, TypeVar

from llm_knowledge.errors import InputError

T = TypeVar("T")


def in_background(items: Iterator[T], depth: int) -> Generator[T, None, None]:
    """Runs an iterator in a thread that stays at most `depth` finished items ahead.

    Items come in the iterator's order, and what it raises is raised here, after the items before it.
    The thread ends with the iterator, when the generator is closed, and when the interpreter exits.

    Args:
        items: Used by the thread alone from now on.
        depth: At least 1.
    """
    worker = _Worker(items, depth)
    try:
        yield from worker.items()
    finally:
        worker.close()


class _Worker(Generic[T]):
    """One thread and what it has made."""

    def __init__(self, source: Iterator[T], depth: int) -> None:
        self._source, self._depth = source, depth
        self._made: deque[T] = deque()
        self._error: BaseException | None = None
        self._ended = self._closed = False
        self._changed = threading.Condition()
        # A thread that still runs while the interpreter is taken down can crash it; a thread that is
        # waited for can hold it up for ever. So: a daemon, told to stop before that point.
        self._thread = threading.Thread(target=self._run, name="reads-ahead", daemon=True)
        atexit.register(self.close)
        self._thread.start()

    def _run(self) -> None:
        error: BaseException | None = None
        try:
            for item in self._source:
                if not self._hand_over(item):
                    break
            if isinstance(self._source, Generator):
                self._source.close()  # here: another thread may not, while it runs
        except BaseException as caught:  # the loop's thread raises it
            error = caught
        with self._changed:
            self._error, self._ended = error, True
            self._changed.notify_all()

    def _hand_over(self, item: T) -> bool:
        with self._changed:
            self._changed.wait_for(lambda: self._closed or len(self._made) < self._depth)
            if not self._closed:
                self._made.append(item)
                self._changed.notify_all()
            return not self._closed

    def items(self) -> Iterator[T]:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._made or self._ended)
                if not self._made:
                    break
                item = self._made.popleft()
                self._changed.notify_all()
            yield item
        if self._error is not None:
            raise self._error

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._made.clear()
            self._changed.notify_all()
        self._thread.join()
        atexit.unregister(self.close)


class BatchFeed(Generic[T]):
    """Batches for a loop in which all ranks must take part; bad input does not break it off.

    A rank that left alone would leave the others in a collective with a broken connection. So from the
    bad input on it is fed batches without rows, and `problem` is set. The ranks look at it where they
    exchange numbers anyway, and stop together; what was trained in between is never saved.

    Args:
        items: The batches; closed with the feed.
        count: Number of batches.
        nothing: Makes a batch without rows.
    """

    def __init__(
        self, items: Generator[T, None, None], count: int, nothing: Callable[[], T]
    ) -> None:
        self._items, self._left, self._nothing = items, count, nothing
        self.problem: InputError | None = None
        self.waited = 0.0  # seconds, in all

    def __iter__(self) -> "BatchFeed[T]":
        """Itself."""
        return self

    def __next__(self) -> T:
        """The next batch."""
        if self._left == 0:
            raise StopIteration
        self._left -= 1
        if self.problem is None:
            began = time.perf_counter()
            try:
                return next(self._items)
            except InputError as error:
                self.problem = error
            finally:
                self.waited += time.perf_counter() - began
        return self._nothing()

    def check(self) -> None:
        """Raises the problem, if there is one.

        Raises:
            InputError: What reading a batch found.
        """
        if self.problem is not None:
            raise self.problem

    def __enter__(self) -> "BatchFeed[T]":
        """Itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Ends the threads behind the batches."""
        self._items.close()
