"""Commands that a command line starts, one after another."""

import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from types import FrameType
from typing import Self

from ftjax.cli import EXIT_INTERRUPTED, EXIT_PREEMPTED


class Relay:
    """To be used as a context: SIGTERM and Ctrl-C go to the command that runs, which saves.

    Attributes:
      stopped: the status to end with, once a command was stopped, and no other is to be started; else 0.
    """

    def __init__(self, start: Callable[..., subprocess.Popen] = subprocess.Popen):
        self.stopped = 0
        self._start, self._current, self._asked = start, None, None

    def __enter__(self) -> Self:
        self._before = {number: signal.signal(number, self._forward) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def run(self, arguments: Sequence[str]) -> int:
        """The exit status of `python arguments`."""
        # In a process group of its own, so that Ctrl-C reaches it once: a second one would end it at once.
        self._current = self._start([sys.executable, *arguments], process_group=0)
        if self._asked is not None:
            self._current.send_signal(self._asked)
        status = self._current.wait()
        self._current = None
        if status in (EXIT_PREEMPTED, EXIT_INTERRUPTED):
            self.stopped = status
        elif self._asked is not None:
            self.stopped = EXIT_INTERRUPTED if self._asked == signal.SIGINT else EXIT_PREEMPTED
        return status

    def _forward(self, number: int, _: FrameType | None) -> None:
        self._asked = number
        if self._current is not None:
            self._current.send_signal(number)
