"""Batches, epochs and row lengths that are chosen for the data: enough updates, nothing refused for being small."""

import math

import numpy as np
import pytest

from ftjax.data.batch.sizes import FEW_UPDATES, Limits, Sizes, choose, rows_of

OPEN = Sizes(0, 0, 0.0)
TICKETS = np.random.default_rng(0).integers(88, 120, 800)  # tokens of 800 examples


def limits(length=1024, packing=True, parts=1, accumulate=1, multiple=64, epochs=(3.0, 15.0)):
    return Limits(length, packing, parts * accumulate, parts, multiple, epochs)


def updates(chosen, lengths, packing=True):
    return math.ceil(rows_of(lengths, chosen.row_length, packing) * chosen.epochs / chosen.batch_size)


def examples(chosen, lengths, packing=True):
    """Of an update."""
    return chosen.batch_size * len(lengths) / rows_of(lengths, chosen.row_length, packing)


def test_hundreds_of_short_examples_get_small_batches_and_many_updates():
    """With 16 rows of 1,024 tokens, as it once was, these 800 got 11 updates in two epochs."""
    chosen = choose(OPEN, TICKETS, 800, limits())
    assert chosen.epochs == 3
    assert 8 <= examples(chosen, TICKETS) <= 16
    assert updates(chosen, TICKETS) >= 150
    assert chosen.row_length % 64 == 0
    assert TICKETS.sum() / (rows_of(TICKETS, chosen.row_length, True) * chosen.row_length) > 0.9


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("count", [14, 20, 30, 60, 100, 300])
def test_few_rows_get_enough_updates(count, packing):
    lengths = TICKETS[:count]
    chosen = choose(OPEN, lengths, count, limits(packing=packing))
    assert updates(chosen, lengths, packing) >= FEW_UPDATES - 1  # rows come in whole numbers
    assert examples(chosen, lengths, packing) >= 2.5


@pytest.mark.parametrize("count", [1, 2, 9])
def test_no_number_of_rows_is_too_small(count):
    chosen = choose(OPEN, TICKETS[:count], count, limits())
    assert chosen.epochs == 15
    assert 1 <= chosen.batch_size <= count
    assert updates(chosen, TICKETS[:count]) >= 15


@pytest.mark.parametrize(
    ("count", "epochs", "batch"), [(52_000, 3.0, 128), (1_000, 15.0, 32), (9_846, 3.0, 16), (61_000, 1.0, 64)]
)
def test_batches_of_large_sets_are_of_the_size_that_papers_use(count, epochs, batch):
    """Alpaca, LIMA, QLoRA on OASST1, Zephyr's DPO: within a factor of three."""
    lengths = np.full(5000, 100)
    chosen = choose(OPEN._replace(epochs=epochs), lengths, count, limits())
    assert batch / 3 < examples(chosen, lengths) < batch * 3


def test_a_batch_of_long_rows_has_sixteen_at_most():
    long = np.full(100_000, 1024)
    assert choose(OPEN, long, 1e6, limits()) == Sizes(16, 1024, 3.0)
    assert choose(OPEN, long, 1e6, limits(parts=64)).batch_size == 64  # a row for each device is the least there is


@pytest.mark.parametrize(("parts", "accumulate"), [(8, 1), (8, 2), (3, 4)])
def test_the_devices_and_micro_batches_divide_a_batch(parts, accumulate):
    for count in (1, 30, 800):
        chosen = choose(OPEN, TICKETS[:count], count, limits(parts=parts, accumulate=accumulate))
        assert chosen.batch_size % (parts * accumulate) == 0
    # Eight devices: shorter rows instead of eight times the examples.
    assert examples(choose(OPEN, TICKETS, 800, limits(parts=8)), TICKETS) <= 16


def test_a_row_holds_the_longest_example_and_no_more_than_it_may():
    for longest, length in ((1, 64), (64, 64), (65, 128), (1000, 1024), (1024, 1024)):
        assert choose(OPEN, np.array([longest]), 1, limits()).row_length == length
    assert choose(OPEN, np.array([90]), 1, limits(length=96)).row_length == 96
    # Two examples of 40 tokens fill 96, and one leaves a third of 64.
    assert choose(OPEN, np.full(120, 40), 120, limits(length=96)).row_length == 96
    assert choose(OPEN, np.array([90, 300]), 2, limits(packing=False)).row_length == 320
    # A context of two splits rows in parts of a multiple of 128.
    assert choose(OPEN, np.array([300]), 1, limits(multiple=256)).row_length == 512


def test_what_is_given_stays():
    assert choose(Sizes(16, 0, 2.0), TICKETS, 800, limits()) == Sizes(16, 1024, 2.0)
    assert choose(Sizes(7, 192, 0.0), TICKETS, 800, limits()) == Sizes(7, 192, 3.0)
    assert choose(Sizes(0, 256, 1.0), TICKETS, 800, limits()).row_length == 256
