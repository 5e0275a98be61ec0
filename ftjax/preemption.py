"""SIGTERM, as schedulers send it before they take a machine away: finish what is safe, save, leave."""

import signal
from types import FrameType


class Preempted(Exception):
    """Raised at a safe point after SIGTERM."""


class Preemption:
    """While active, the first SIGTERM is noted and `check` raises Preempted; a second one ends the process at once."""

    def __enter__(self) -> "Preemption":
        self.requested = False
        self._before = signal.signal(signal.SIGTERM, self._note)
        return self

    def __exit__(self, *_) -> None:
        signal.signal(signal.SIGTERM, self._before)

    def check(self) -> None:
        if self.requested:
            raise Preempted

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
