"""Threads that compute on the same devices, one at a time."""

import threading


class Turns:
    """A lock as a context: who waits comes before who has just had it.

    Programs over several devices meet in their collectives. Two threads that begin theirs at the same time might do so
    in one order on one device and in the other on the next, and each would wait for the other for ever.
    """

    def __init__(self):
        self._next, self._turn = threading.Lock(), threading.Lock()

    def __enter__(self) -> None:
        with self._next:
            self._turn.acquire()

    def __exit__(self, *error: object) -> None:
        self._turn.release()
