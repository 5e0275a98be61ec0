"""SIGTERM, as schedulers send it before they take a machine away: finish what is safe, save, leave."""

import itertools
import signal
from types import FrameType

from jax.experimental import multihost_utils

from ftjax import distributed


class Preempted(Exception):
    """Raised at a safe point after SIGTERM."""


class Preemption:
    """While active, the first SIGTERM is noted and `check` raises Preempted; a second one ends the process at once.

    With several processes, a SIGTERM to any of them is told to all by JAX's coordination service (within a second or
    two), and they agree on the call of `check` at which all raise. So all must call it equally often. JAX takes the
    signal itself, from the start of the run, and a second one does nothing: the scheduler's SIGKILL follows.
    """

    def __enter__(self) -> "Preemption":
        self.requested = False
        self._checks = itertools.count()
        self._before = None if distributed.count() > 1 else signal.signal(signal.SIGTERM, self._note)
        return self

    def __exit__(self, *_) -> None:
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)

    def check(self) -> None:
        if distributed.count() > 1:
            self.requested = multihost_utils.reached_preemption_sync_point(next(self._checks))
        if self.requested:
            raise Preempted

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
