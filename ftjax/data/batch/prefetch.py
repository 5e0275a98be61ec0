"""Batches made ahead of the step, in a thread."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Generic, TypeVar

Batch = TypeVar("Batch")


class Prefetched(Generic[Batch]):
    """`batch_at` for a caller that asks for indices in order: while it is busy, the next `depth` batches are made.

    It returns what `batch_at` returns, for any index at any time; an index out of order only takes longer. An error of
    `batch_at` is raised when its index is asked for. Use it as a context manager, from one thread; leaving it waits for
    the batch in progress, not for those after it.

        with Prefetched(loader.batch) as batch_at:
            for step in range(start, stop):
                batch = batch_at(step)
    """

    def __init__(self, batch_at: Callable[[int], Batch], depth: int = 2, stop: int | None = None):
        """stop: the first index that is never asked for, so that no batch is made in vain; None if unknown."""
        if depth < 1:
            raise ValueError(f"depth {depth} must be positive")
        self._batch_at, self._depth, self._stop = batch_at, depth, stop
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="prefetch")  # one: batches are made in order
        self._ahead: dict[int, Future[Batch]] = {}

    def __call__(self, index: int) -> Batch:
        end = index + 1 + self._depth
        wanted = [index, *range(index + 1, end if self._stop is None else min(end, self._stop))]
        for other in self._ahead.keys() - wanted:
            self._ahead.pop(other).cancel()
        for i in wanted:
            if i not in self._ahead:
                self._ahead[i] = self._pool.submit(self._batch_at, i)
        return self._ahead.pop(index).result()

    def __enter__(self) -> "Prefetched[Batch]":
        return self

    def __exit__(self, *error: Any) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._ahead.clear()
