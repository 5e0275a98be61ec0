"""The thread that does what Tinker's client asks for: order, repetitions, bounds and what is lost."""

import threading

import pytest

from ftjax.errors import UserError
from ftjax.hosted.refusals import Refused
from ftjax.hosted.tinker.work import GAP, KEPT, MOST_BYTES, Failed, Line, Work


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def work(clock):
    work = Work(clock)
    yield work
    work.close()


def failing(error):
    def do():
        raise error

    return do


def test_numbers_say_the_order_and_what_comes_twice_is_done_once(work):
    line, done = Line(), []
    asked = {n: work.submit(f"m:{n}", "anna", lambda n=n: done.append(n), 0, line, n) for n in (3, 2)}
    assert done == []
    asked[1] = work.submit("m:1", "anna", lambda: done.append(1), 0, line, 1)
    for one in asked.values():
        one.future.result(10)
    assert work.submit("m:2", "anna", lambda: done.append("again"), 0, line, 2) is asked[2]
    work.submit("m:next", "anna", lambda: done.append("next"), 0, line).future.result(10)
    assert done == [1, 2, 3, "next"]
    with pytest.raises(Refused, match="seq_id 2 has been there; the next one is 5"):
        work.submit("m:other", "anna", lambda: None, 0, line, 2)


def test_what_waits_for_something_that_never_comes_is_given_up(work, clock):
    skipped = []
    line = Line(skipped=skipped.append)
    waiting = work.submit("m:2", "anna", lambda: None, 0, line, 2)
    work.skip(line)
    assert not waiting.future.done()
    clock.now += GAP
    work.skip(line)
    with pytest.raises(Failed, match="seq_id 1, which is to be done before this one, never came"):
        waiting.future.result(10)
    assert len(skipped) == 1
    assert work.submit("m:3", "anna", lambda: "goes on", 0, line, 3).future.result(10) == "goes on"


@pytest.mark.parametrize(
    ("error", "message", "by_user"),
    [
        (Refused("not so"), "not so", True),
        (UserError("a file: not so"), "a file: not so", True),
        (ZeroDivisionError("secret"), "the server failed; its log has more under a", False),
    ],
)
def test_failures_are_told_and_the_thread_goes_on(work, error, message, by_user):
    with pytest.raises(Failed) as told:
        work.submit("a", "anna", failing(error)).future.result(10)
    assert (told.value.message, told.value.by_user) == (message, by_user)
    assert work.submit("b", "anna", lambda: 1).future.result(10) == 1


def test_who_gives_up_waiting_does_not_end_the_thread(work):
    began, go_on = threading.Event(), threading.Event()

    def do():
        began.set()
        go_on.wait(10)
        raise UserError("not so")

    asked = work.submit("a", "anna", do)
    began.wait(10)
    assert not asked.future.cancel()  # as a cancelled `asyncio.wrap_future` of it does
    go_on.set()
    with pytest.raises(Failed, match="not so"):
        asked.future.result(10)
    assert work.submit("b", "anna", lambda: 1).future.result(10) == 1


def test_results_are_their_owners_and_not_kept_for_ever(work, clock):
    work.submit("a", "anna", lambda: 1).future.result(10)
    assert work.find("a", "anna").future.result() == 1
    with pytest.raises(Refused, match="there is no request 'a'"):
        work.find("a", "bertha")
    clock.now += KEPT + 1
    with pytest.raises(Refused, match="its result is no longer kept"):
        work.find("a", "anna")


def test_a_key_cannot_fill_the_memory(work):
    go, begun = threading.Event(), threading.Event()

    def wait():
        begun.set()
        go.wait(10)

    first = work.submit("a", "anna", wait, MOST_BYTES)
    begun.wait(10)
    with pytest.raises(Refused) as refused:
        work.submit("b", "anna", lambda: None, 1)
    assert refused.value.status == 429
    work.submit("c", "bertha", lambda: None, 1)  # another's
    go.set()
    first.future.result(10)
    work.submit("b", "anna", lambda: None, 1).future.result(10)


def test_what_is_left_at_the_end_fails(clock):
    work, go, begun = Work(clock), threading.Event(), threading.Event()

    def wait():
        begun.set()
        return go.wait(10)

    running = work.submit("a", "anna", wait)
    waiting = work.submit("b", "anna", lambda: None)
    assert begun.wait(10)  # what has not begun when the server ends is left too
    threading.Timer(0.1, go.set).start()
    assert work.alive
    work.close()
    assert not work.alive
    assert running.future.result() is True
    with pytest.raises(Failed, match="the server has ended"):
        waiting.future.result()
    with pytest.raises(Refused, match="the server is ending"):
        work.submit("c", "anna", lambda: None)
