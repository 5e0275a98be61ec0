"""SIGTERM, which schedulers send before they take a machine away: go on to a safe point, save, exit."""

import itertools
import signal
from types import FrameType

from jax.experimental import multihost_utils

from ftjax import distributed


class Preempted(Exception):
    """Raised at a safe point after SIGTERM."""


class Preemption:
    """While active, `check` raises Preempted after the first SIGTERM; a second one ends the process at once.

    With several processes, JAX's coordination service reports a SIGTERM of any of them to all (within a second or two),
    and they agree on the call of `check` at which all raise. So all must call it equally often. JAX handles the signal
    itself, from the start of the run, and a second one does nothing: the scheduler's SIGKILL follows.
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
        """Raises Preempted after a SIGTERM."""
        if distributed.count() > 1:
            self.requested = multihost_utils.reached_preemption_sync_point(next(self._checks))
        if self.requested:
            raise Preempted

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
