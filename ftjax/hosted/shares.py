"""What few can do at the same time, divided so that no key keeps the others from it."""

import contextlib
from collections.abc import AsyncIterator, Callable
from typing import TypeVar

import anyio
import anyio.to_thread

from ftjax.hosted.refusals import Refused

Made = TypeVar("Made")


class Shares:
    """For one event loop.

    Args:
      what: is done, for messages: "checks".
      at_once: that are done at the same time; of_key: of one key, of those.
      open: that a key may have, those that wait among them.
    """

    def __init__(self, what: str, at_once: int, of_key: int, open: int):
        self._what, self._of_key, self._most = what, of_key, open
        self._all, self._threads = anyio.CapacityLimiter(at_once), anyio.CapacityLimiter(at_once)
        self._keys: dict[str, tuple[anyio.Semaphore, list[None]]] = {}

    @contextlib.asynccontextmanager
    async def of(self, owner: str) -> AsyncIterator[None]:
        """Waits for its turn; Refused (429) where the key has as many open as it may have."""
        turns, opened = self._keys.setdefault(owner, (anyio.Semaphore(self._of_key), []))
        if len(opened) == self._most:
            raise Refused(
                f"{self._most} {self._what} of your key are not done; wait for one of them",
                code="rate_limit_exceeded",
                status=429,
                headers={"Retry-After": "1"},
            )
        opened.append(None)
        try:
            async with turns, self._all:
                yield
        finally:
            opened.pop()
            if not opened:
                del self._keys[owner]

    async def run(self, owner: str, do: Callable[..., Made], *arguments: object) -> Made:
        """In a thread, which is none of those that the other routes have."""
        async with self.of(owner):
            return await anyio.to_thread.run_sync(do, *arguments, limiter=self._threads)
