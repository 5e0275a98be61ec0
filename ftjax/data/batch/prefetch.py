"""Batches made ahead of the step, in a thread; what they are does not change."""

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Generic, TypeVar

Batch = TypeVar("Batch")


class Prefetched(Generic[Batch]):
    """`batch_at` for a caller that asks for one index after the other: the next `depth` are made while it is busy.

    A pure function behind a pure function: any index may be asked for at any time, and gives what `batch_at` gives; one
    that is not the next only has to be made first. An error of `batch_at` comes when its index is asked for. To be used
    as a context manager, by one thread; leaving it waits for the batch in the making, not for those after it.

        with Prefetched(loader.batch) as batch_at:
            for step in range(start, stop):
                batch = batch_at(step)

    Attributes:
      waited: seconds that the last call took.
    """

    def __init__(self, batch_at: Callable[[int], Batch], depth: int = 2, stop: int | None = None):
        """stop: the first index that is never asked for, so that none is made in vain; None where it is not known."""
        if depth < 1:
            raise ValueError(f"depth {depth} must be positive")
        self._batch_at, self._depth, self._stop = batch_at, depth, stop
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="prefetch")  # one: batches are made in order
        self._ahead: dict[int, Future[Batch]] = {}
        self.waited = 0.0

    def __call__(self, index: int) -> Batch:
        began = time.perf_counter()
        wanted = [index, *range(index + 1, index + 1 + self._depth)]
        if self._stop is not None:
            wanted = [index, *(one for one in wanted[1:] if one < self._stop)]
        for other in self._ahead.keys() - wanted:
            self._ahead.pop(other).cancel()
        for one in wanted:
            if one not in self._ahead:
                self._ahead[one] = self._pool.submit(self._batch_at, one)
        try:
            return self._ahead.pop(index).result()
        finally:
            self.waited = time.perf_counter() - began

    def __enter__(self) -> "Prefetched[Batch]":
        return self

    def __exit__(self, *error: Any) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._ahead.clear()
