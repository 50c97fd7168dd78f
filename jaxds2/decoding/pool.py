"""Processes that decode, or do other work on one item at a time, in the order of the items."""

import contextlib
import multiprocessing
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, Generic, TypeVar

from jaxds2.config import ConfigError
from jaxds2.decoding.hypothesis import DecoderError
from jaxds2.worker import prepare_worker

AHEAD = 32
"""Items for each process that may wait, so that none is idle while the device works on the next batch."""

Item = TypeVar("Item")
Result = TypeVar("Result")

_work: Callable[[Any], Any]  # in a process of the pool


class Pool(Generic[Item, Result]):
    """Processes with a function each, as a context.

    They are spawned, not forked: a fork of a process that runs a device's threads may hang.
    """

    def __init__(self, make: Callable[[], Callable[[Item], Result]], workers: int) -> None:
        """Start the processes.

        Args:
          make: called once in each, must be picklable; what it gives is called with each item.
          workers: how many.
        """
        self._ahead = AHEAD * workers
        self._executor = ProcessPoolExecutor(
            workers, multiprocessing.get_context("spawn"), initializer=_prepare, initargs=(make,)
        )

    def __enter__(self) -> "Pool[Item, Result]":
        return self

    def __exit__(self, *_: object) -> None:
        self._executor.shutdown(wait=True, cancel_futures=True)

    def map(self, items: Iterable[Item]) -> Iterator[Result]:
        """The result of each item, in their order; items are taken a bounded number ahead.

        Raises:
          DecoderError: a process died. What the function raises is raised here.
        """
        waiting: deque[Future[Result]] = deque()
        try:
            for item in items:
                waiting.append(self._executor.submit(_call, item))
                if len(waiting) >= self._ahead:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except BrokenProcessPool:
            raise DecoderError(
                "a decoding process ended before its work was done: killed, or out of memory; "
                "try fewer of them (--decode-workers)"
            ) from None


@contextlib.contextmanager
def open_pool(make: Callable[[], Callable[[Item], Result]], workers: int) -> Iterator[Pool[Item, Result] | None]:
    """A pool for the block, or None where no processes are asked for.

    Raises:
      ConfigError: a negative number of workers.
    """
    if workers < 0:
        raise ConfigError(f"{workers} decoding processes: must be 0 or more")
    if not workers:
        yield None
        return
    with Pool(make, workers) as pool:
        yield pool


def _prepare(make: Callable[[], Callable[[Any], Any]]) -> None:
    global _work
    prepare_worker()
    _work = make()


def _call(item: Any) -> Any:
    return _work(item)
