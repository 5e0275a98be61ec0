"""What asks a run to stop: a signal, at once seen though it is acted on later, or the clock, in time for a save."""

import hashlib
import os
import signal
import threading
import time

import pytest

from ftjax import distributed
from ftjax.training import preemption
from ftjax.training.preemption import Preempted, Preemption


@pytest.fixture
def ended(monkeypatch):
    """The statuses that the process would have ended with at once."""
    statuses = []
    monkeypatch.setattr(distributed, "end_now", lambda status, text: statuses.append((status, text)))
    return statuses


def send(number):
    """A signal to this process, and time for the thread that reads it."""
    os.kill(os.getpid(), number)
    time.sleep(0.2)


@pytest.mark.parametrize(("number", "why"), [(signal.SIGTERM, "SIGTERM"), (signal.SIGINT, "Ctrl-C")])
def test_a_signal_is_seen_at_the_next_safe_point(ended, capfd, number, why):
    before = signal.getsignal(number)
    with Preemption() as active:
        active.defer_interrupts()
        active.check()
        send(number)
        with pytest.raises(Preempted, match=why):
            active.check()
    assert not ended
    assert signal.getsignal(number) is before
    assert ("Ctrl-C again ends at once" in capfd.readouterr().err) == (number == signal.SIGINT)


def test_before_there_is_anything_to_save_ctrl_c_is_what_it_is_elsewhere(ended):
    with Preemption(), pytest.raises(KeyboardInterrupt):
        send(signal.SIGINT)
    assert not ended


def test_a_signal_that_comes_twice_at_once_is_one(ended):
    """As `timeout` sends it: to the process, and to its group."""
    with Preemption() as active:
        active.defer_interrupts()
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.05)
        send(signal.SIGTERM)
        with pytest.raises(Preempted, match="SIGTERM"):
            active.check()
    assert not ended


def test_a_second_signal_ends_at_once_though_the_main_thread_is_busy(ended, monkeypatch):
    """As in a compilation: python's own handlers would run after it."""
    monkeypatch.setattr(preemption, "AT_ONCE", 0.1)

    def twice():
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGINT):
            send(number)

    with Preemption() as active:
        active.defer_interrupts()
        thread = threading.Thread(target=twice)
        thread.start()
        hashlib.pbkdf2_hmac("sha256", b"", b"", 1_000_000)  # one call into C, without the interpreter's lock
        seen = list(ended)
        thread.join()
    assert seen[0] == (143, "SIGTERM: ended at once; the same command goes on from the last save")
    assert [status for status, _ in ended] == [143, 130]


def test_the_clock_leaves_time_for_a_step_and_a_save(monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(preemption.time, "monotonic", lambda: now[0])
    active = Preemption(max_hours=1.0)
    active.reserve = lambda: 100.0
    with active:
        for _ in range(35):  # steps of 100 s each: the next one and a save may be over at 3600 s
            active.check()
            now[0] += 100.0
        with pytest.raises(Preempted, match=r"config\.max_hours=1"):
            active.check()
    with Preemption(max_hours=1.0) as within:
        within.reserve = lambda: 100.0
        within.check()
        for _ in range(34):  # in the middle of a step the rest of it need not fit, and says nothing of how long one is
            now[0] += 100.0
            within.check(within=True)
        now[0] += 101.0
        with pytest.raises(Preempted, match=r"config\.max_hours=1"):
            within.check(within=True)
    with Preemption() as unlimited:
        now[0] += 1e9
        unlimited.check()
