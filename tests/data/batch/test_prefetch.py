"""Batches made ahead are the batches, and the one who asks for them does not wait."""

import threading
import time

import numpy as np
import pytest
from support.tokenized import examples_of, make_examples

from ftjax.data.batch.loader import Loader
from ftjax.data.batch.prefetch import Prefetched


def timed(function, *arguments):
    began = time.perf_counter()
    return function(*arguments), time.perf_counter() - began


def test_whatever_is_asked_for_in_whatever_order_is_what_the_function_gives():
    loader = Loader(examples_of(make_examples(50)), 4, 32, True, 0)
    with Prefetched(loader.batch, depth=3) as batch_at:
        for index in [0, 1, 2, 3, 10, 11, 5, 4, 4, 30, 31, 0]:
            batch = batch_at(index)
            assert all(np.array_equal(batch[name], array) for name, array in loader.batch(index).items())


def test_the_next_ones_are_made_while_the_caller_is_busy_and_never_more_than_depth():
    made = []

    def batch_at(index):
        time.sleep(0.2)
        made.append(index)
        return index

    with Prefetched(batch_at, depth=2) as ahead:
        batch, waited = timed(ahead, 5)
        assert batch == 5
        assert waited >= 0.2
        time.sleep(0.8)
        assert made == [5, 6, 7]
        batch, waited = timed(ahead, 6)
        assert batch == 6
        assert waited < 0.1
        time.sleep(0.5)
        assert made == [5, 6, 7, 8]


def test_none_is_made_at_or_beyond_the_stop_and_the_thread_ends():
    made = []
    with Prefetched(lambda index: made.append(index) or index, depth=4, stop=3) as ahead:
        assert [ahead(index) for index in range(3)] == [0, 1, 2]
    assert made == [0, 1, 2]
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("prefetch")]


def test_an_error_comes_when_its_index_is_asked_for_and_again_when_asked_again():
    def batch_at(index):
        if index == 2:
            raise OSError("the disk is gone")
        return index

    with Prefetched(batch_at) as ahead:
        assert [ahead(0), ahead(1)] == [0, 1]
        for _ in range(2):
            with pytest.raises(OSError, match="the disk is gone"):
                ahead(2)
        assert ahead(3) == 3


def test_leaving_waits_for_no_more_than_the_batch_in_the_making():
    def batch_at(index):
        time.sleep(0.1)
        return index

    began = time.perf_counter()
    with Prefetched(batch_at, depth=50) as ahead:
        ahead(0)
    assert time.perf_counter() - began < 2


def share_of_steps_waited(seconds, steps):
    """Rows of 2048 tokens, 16 to a batch, while the one who asks is busy for `seconds` between two batches."""
    loader = Loader(examples_of(make_examples(4000, 300)), 16, 2048, True, 0)
    waited = 0.0
    with Prefetched(loader.batch) as batch_at:
        batch_at(0)
        for index in range(1, 1 + steps):
            time.sleep(seconds)
            waited += timed(batch_at, index)[1]
    return waited / (steps * seconds)


def test_the_step_waits_under_one_percent(record_figure):
    """Steps of 50 ms are faster than any model here takes them. The least of five counts, since what else keeps the
    machine busy only adds to a wait; a batch that is not made ahead is waited for in each of the five."""
    share = min(share_of_steps_waited(0.05, 20) for _ in range(5))
    record_figure("share_of_a_step_spent_waiting", share)
    assert share < 0.01
