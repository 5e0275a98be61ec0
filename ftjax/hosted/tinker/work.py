"""What was asked for and is done later: one thread does it, one thing after another, and who asked waits or asks again.

What is asked of one model has numbers, and is done in their order whatever the order of arrival. An id follows from
model and number: what arrives twice, since its answer was lost on the way, is done once.
"""

import concurrent.futures
import queue
import threading
import time
from collections.abc import Callable
from typing import Any

from ftjax.errors import UserError
from ftjax.hosted.logs import log
from ftjax.hosted.refusals import Refused

KEPT = 600  # seconds for which a result can be asked for
GAP = 360  # seconds that something waits for what is to be done before it: longer than the client goes on sending that
MOST_BYTES = 256 * 2**20  # of what a key has asked for and is not done


class Failed(Exception):
    """What a client is told of something that could not be done; `by_user`: who can do something about it."""

    def __init__(self, message: str, by_user: bool):
        super().__init__(message)
        self.message, self.by_user = message, by_user


class Asked:
    """Something to do, and what came of it in `future`."""

    def __init__(self, id: str, owner: str, do: Callable[[], Any], size: int):
        self.id, self.owner, self.do, self.size = id, owner, do, size
        self.future: concurrent.futures.Future[Any] = concurrent.futures.Future()
        self.future.set_running_or_notify_cancel()  # who gives up waiting for it does not cancel it
        self.since = time.monotonic()
        self.ended: float | None = None


class Line:
    """What is asked of one model, by its numbers. first: the number that is done first."""

    def __init__(self, first: int = 1, skipped: Callable[[str], None] = lambda why: None):
        self.next, self.held, self.skipped = first, {}, skipped


class Work:
    """Starts the thread, which `close` ends."""

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        self._clock = clock
        self._inbox: queue.SimpleQueue[Asked | None] = queue.SimpleQueue()
        self._lock = threading.Lock()  # of what follows, and of the lines
        self._asked: dict[str, Asked] = {}
        self._bytes: dict[str, int] = {}  # of each owner, of what is not done
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="tinker", daemon=True)
        self._thread.start()

    def submit(
        self,
        id: str,
        owner: str,
        do: Callable[[], Any],
        size: int = 0,
        line: Line | None = None,
        number: int | None = None,
    ) -> Asked:
        """Puts something in the queue, or holds it until what has lower numbers in its line has come.

        size: bytes that it holds until it is done. number: None is the next one of the line.

        Raises:
          Refused: 429, the owner has asked for too much that is not done; 400, its number has been there.
        """
        with self._lock:
            self._forget()
            if (known := self._asked.get(id)) is not None:
                return known
            if self._closed:
                raise Refused("the server is ending", status=503)
            if self._bytes.get(owner) and self._bytes[owner] + size > MOST_BYTES:
                raise Refused(
                    "too much of what you asked for is not done yet; try again once some of it is",
                    code="overloaded",
                    status=429,
                    headers={"Retry-After": "1"},
                )
            if line is not None and number is not None and number < line.next:
                raise Refused(f"seq_id {number} has been there; the next one is {line.next}", param="seq_id")
            asked = self._asked[id] = Asked(id, owner, do, size)
            asked.since = self._clock()
            self._bytes[owner] = self._bytes.get(owner, 0) + size
            if line is None:
                self._inbox.put(asked)
            else:
                line.held[line.next if number is None else number] = asked
                while line.next in line.held:
                    self._inbox.put(line.held.pop(line.next))
                    line.next += 1
            return asked

    def find(self, id: str, owner: str) -> Asked:
        """Refused (404) where there is none, it is another's or it was done long ago."""
        with self._lock:
            self._forget()
            asked = self._asked.get(id)
        if asked is None or asked.owner != owner:
            raise Refused(
                f"there is no request {id!r}; the server may have been started anew since it was made, or its result "
                "is no longer kept. Go on from a saved state",
                param="request_id",
                code="request_not_found",
                status=404,
            )
        return asked

    def open(self, id: str, owner: str) -> tuple[Asked, bool]:
        """Something that another thread does and `finish`es; and whether it is new."""
        with self._lock:
            self._forget()
            if (known := self._asked.get(id)) is not None:
                return known, False
            asked = self._asked[id] = Asked(id, owner, _nothing, 0)
            self._bytes.setdefault(owner, 0)
            return asked, True

    def drop(self, asked: Asked) -> None:
        """Something of `open` that does not begin."""
        with self._lock:
            self._asked.pop(asked.id, None)

    def finish(self, asked: Asked, result: Any = None, error: Failed | None = None) -> None:
        """Says what came of it."""
        self._end(asked, result, error)

    def skip(self, line: Line) -> None:
        """Gives up what waits in a line for something that has not come for long."""
        with self._lock:
            waiting = [line.held[number] for number in sorted(line.held)]
            if not waiting or self._clock() - min(asked.since for asked in waiting) < GAP:
                return
            missing, line.next = line.next, max(line.held) + 1
            line.held.clear()
        why = f"the request with seq_id {missing}, which is to be done before this one, never came"
        line.skipped(why)
        for asked in waiting:
            self._end(asked, error=Failed(why, by_user=True))

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    def close(self) -> None:
        """What is being done ends; all else fails."""
        with self._lock:
            self._closed = True
        self._inbox.put(None)
        self._thread.join()
        with self._lock:
            left = [asked for asked in self._asked.values() if asked.ended is None]
        for asked in left:
            self._end(asked, error=Failed("the server has ended", by_user=False))

    def _run(self) -> None:
        while (asked := self._inbox.get()) is not None and not self._closed:
            try:
                self._end(asked, asked.do())
            except (Refused, UserError) as error:
                message = error.message if isinstance(error, Refused) else str(error)
                self._end(asked, error=Failed(message, by_user=True))
            except Exception:
                log.exception("a request of Tinker's client failed", extra={"fields": {"request": asked.id}})
                why = f"the server failed; its log has more under {asked.id}"
                self._end(asked, error=Failed(why, by_user=False))

    def _end(self, asked: Asked, result: Any = None, error: Failed | None = None) -> None:
        with self._lock:
            if asked.ended is not None:
                return
            asked.ended, asked.do = self._clock(), _nothing  # lets go of what it holds
            self._bytes[asked.owner] -= asked.size
        if error is None:
            asked.future.set_result(result)
        else:
            asked.future.set_exception(error)

    def _forget(self) -> None:
        """Lets go of results that are old; they stand in the order in which they were asked for."""
        until = self._clock() - KEPT
        old = [id for id, asked in self._asked.items() if asked.ended is not None and asked.ended < until]
        for id in old:
            del self._asked[id]


def _nothing() -> None:
    pass
