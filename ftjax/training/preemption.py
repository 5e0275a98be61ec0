"""Asked to stop before the end, by SIGTERM, Ctrl-C or the clock: go on to a safe point, save, exit."""

import itertools
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Callable
from types import FrameType

from jax.experimental import multihost_utils

from ftjax import distributed

SIGTERM, CTRL_C = "SIGTERM", "Ctrl-C"  # what a `Preempted` says
_NAMES = {signal.SIGTERM: SIGTERM, signal.SIGINT: CTRL_C}
# Seconds within which signals are one: `timeout`, a terminal or a scheduler may send one to the process and its group.
AT_ONCE = 0.5


class Preempted(Exception):
    """Raised at a safe point. Its text says what asked for the end."""


class Preemption:
    """While active, `check` raises Preempted after SIGTERM, after Ctrl-C, and when the time is nearly over.

    Until `defer_interrupts` is called there is nothing to save, and Ctrl-C is a KeyboardInterrupt as anywhere. A second
    signal of either kind ends the process at once. A thread reads the signals, because Python's own handlers wait for
    the main thread, which may be compiling or loading for minutes.

    With several processes, JAX's coordination service reports a SIGTERM of any of them to all (within a second or two),
    and they agree on the call of `check` at which all raise. So all must call it equally often. JAX handles SIGTERM
    itself, from the start of the run, and a second one does nothing: the scheduler's SIGKILL follows. Ctrl-C and the
    clock of any process are passed on as its SIGTERM.

    max_hours: from now on; 0: no limit. The time that a save takes (`reserve`) and that of a step are kept free.
    """

    def __init__(self, max_hours: float = 0.0):
        self.reserve: Callable[[], float] = lambda: 0.0  # seconds that are needed to save
        self._hours = max_hours
        self._deadline = time.monotonic() + 3600 * max_hours if max_hours else None
        self._reason: str | None = None
        self._deferred = False
        self._signaled: float | None = None  # when, by time.monotonic
        self._checks = itertools.count()
        self._checked: deque[float] = deque(maxlen=8)  # when, by the clock of the deadline

    def __enter__(self) -> "Preemption":
        numbers = [signal.SIGINT] if distributed.count() > 1 else [signal.SIGINT, signal.SIGTERM]
        reader, self._writer = os.pipe()
        os.set_blocking(self._writer, False)
        self._wakeup = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        self._before = {number: signal.signal(number, self._in_main_thread) for number in numbers}
        threading.Thread(target=self._read, args=(reader,), name="signals", daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._wakeup)
        os.close(self._writer)  # which ends the thread

    def defer_interrupts(self) -> None:
        """From now on Ctrl-C waits for `check`."""
        self._deferred = True

    def check(self, within: bool = False) -> None:
        """Raises Preempted if the run is to end.

        within: this is in the middle of a step, the rest of which may be given up: the clock leaves time for the save.
        """
        if self._reason is None and self._deadline is not None and self._time_is_over(within):
            self._request(f"config.max_hours={self._hours:g}")
        if distributed.count() > 1:
            if multihost_utils.reached_preemption_sync_point(next(self._checks)):
                raise Preempted(self._reason or SIGTERM)
        elif self._reason is not None:
            raise Preempted(self._reason)

    def _time_is_over(self, within: bool) -> bool:
        """Whether a save would end too late if it began at the next call, or within a step, now."""
        if within:
            return time.monotonic() + self.reserve() > self._deadline
        self._checked.append(now := time.monotonic())
        slowest = max((after - before for before, after in itertools.pairwise(self._checked)), default=0.0)
        return now + slowest + self.reserve() > self._deadline

    def _request(self, reason: str) -> None:
        self._reason = reason
        if distributed.count() > 1 and reason != SIGTERM:
            os.kill(os.getpid(), signal.SIGTERM)

    def _read(self, reader: int) -> None:
        """A byte for each signal, as soon as it comes."""
        with open(reader, "rb", buffering=0) as pipe:
            while byte := pipe.read(1):
                if (number := byte[0]) in _NAMES:
                    self._note(number)

    def _note(self, number: int) -> None:
        name = _NAMES[number]
        if self._signaled is not None:
            if time.monotonic() - self._signaled < AT_ONCE:
                return
            distributed.end_now(128 + number, f"{name}: ended at once; the same command goes on from the last save")
        self._signaled = time.monotonic()
        if self._deferred or number != signal.SIGINT:  # else the main thread raises KeyboardInterrupt
            self._request(name)
            if number == signal.SIGINT:
                distributed.say("Ctrl-C: finishing the step and saving; Ctrl-C again ends at once, without saving")

    def _in_main_thread(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and not self._deferred:
            raise KeyboardInterrupt
