"""Packing keeps documents whole and apart, wastes little, and takes its time from the lengths and not their number."""

import time

import numpy as np
import pytest
from support.tokenized import examples_of

from ftjax.data.batch import packing
from ftjax.data.format.example import Example


def log_normal_lengths(rng, n, capacity, sigma):
    """Mean about capacity / 8, cut at capacity."""
    return np.clip(rng.lognormal(np.log(capacity / 8) - sigma**2 / 2, sigma, n).astype(int), 1, capacity)


def pack(lengths, capacity, order, row_order=None):
    """The rows as arrays, and that no row is overfull and every example where it belongs is checked."""
    patterns = packing.patterns(np.bincount(lengths[order]), capacity)
    plan = packing.assign(patterns, lengths, order, row_order)
    rows = [plan[row] for row in range(len(plan))]
    assert len(rows) == packing.count_rows(patterns)
    assert sorted(plan.order.tolist()) == sorted(order.tolist())
    assert all(0 < lengths[row].sum() <= capacity for row in rows)
    return rows


@pytest.mark.parametrize("capacity", [512, 2048, 8192])
@pytest.mark.parametrize("sigma", [0.5, 1.0, 1.5])
def test_rows_are_at_least_97_percent_full_and_every_example_is_in_one(sigma, capacity, record_figure):
    rng = np.random.default_rng(0)
    lengths = log_normal_lengths(rng, 4000, capacity, sigma)
    rows = pack(lengths, capacity, rng.permutation(4000))
    efficiency = lengths.sum() / (len(rows) * capacity)
    record_figure("packing_efficiency", efficiency)
    assert efficiency >= 0.97


@pytest.mark.parametrize("seed", range(20))
def test_any_lengths_are_packed_with_few_more_rows_than_tokens_and_halves_demand(seed):
    """Two bounds that no packing can pass: the tokens, and the documents longer than half a row. 11/9 is best fit
    decreasing's own bound (Johnson et al. 1974)."""
    rng = np.random.default_rng(seed)
    capacity = int(rng.integers(3, 60))
    lengths = rng.integers(1, capacity + 1, rng.integers(1, 300))
    rows = pack(lengths, capacity, np.arange(len(lengths)))
    least = max(-(-lengths.sum() // capacity), (lengths > capacity / 2).sum())
    assert len(rows) <= 11 / 9 * least + 1


def test_a_million_lengths_in_seconds(record_figure):
    rng = np.random.default_rng(0)
    lengths = log_normal_lengths(rng, 10**6, 2048, 1.0)
    order = rng.permutation(10**6)
    began = time.perf_counter()
    patterns = packing.patterns(np.bincount(lengths), 2048)
    plan = packing.assign(patterns, lengths, order, rng.permutation(packing.count_rows(patterns)))
    seconds = time.perf_counter() - began
    record_figure("seconds_to_pack_a_million", seconds)
    assert seconds < 10  # 0.1 on an idle core
    assert np.add.reduceat(lengths[plan.order], plan.starts[:-1]).max() <= 2048


def test_who_goes_with_whom_changes_with_the_order():
    rng = np.random.default_rng(1)
    lengths = log_normal_lengths(rng, 20_000, 512, 1.0)
    first, second = (
        {frozenset(row.tolist()) for row in pack(lengths, 512, rng.permutation(20_000)) if len(row) > 1}
        for _ in range(2)
    )
    assert len(first & second) < 0.03 * len(first)  # of lengths that few documents have


def test_the_rows_come_in_the_order_that_is_asked_for_and_documents_of_one_length_in_theirs():
    lengths = np.array([2, 1, 2, 1, 2, 1])
    rows = pack(lengths, 3, np.array([5, 4, 3, 2, 1, 0]), np.array([2, 0, 1]))
    assert [row.tolist() for row in rows] == [[4, 5], [2, 3], [0, 1]]
    # Without an order of the rows: by the earliest document in each.
    rows = pack(np.array([2, 3, 1, 3, 2]), 4, np.array([1, 0, 3, 2, 4]))
    assert [row.tolist() for row in rows] == [[1, 2], [0, 4], [3]]


def test_edges():
    assert pack(np.array([4, 4, 4]), 4, np.array([2, 0, 1]))[0].tolist() == [2]
    assert [row.tolist() for row in pack(np.array([1, 3, 2, 2]), 4, np.arange(4))] == [[1, 0], [2, 3]]
    assert pack(np.array([4]), 4, np.arange(0)) == []
    # A document may be there twice, and a part of them may be packed.
    assert [row.tolist() for row in pack(np.array([2, 2, 9, 2]), 4, np.array([3, 3, 0]), np.arange(2))] == [[3, 3], [0]]
    for lengths in ([5], [0]):
        with pytest.raises(ValueError, match="do not fit rows of 4"):
            packing.patterns(np.bincount(lengths), 4)


def test_fill_restarts_positions_and_never_predicts_across_documents():
    a = Example(np.array([11, 12, 13], np.int32), np.array([False, True, True]), "a")
    b = Example(np.array([21, 22], np.int32), np.array([False, True]), "b")
    examples = examples_of([a, b])
    batch = packing.fill(examples, [np.array([1, 0]), np.array([0]), np.array([], int)], 6)
    want = {
        "tokens": [[21, 22, 11, 12, 13, 0], [11, 12, 13, 0, 0, 0], [0] * 6],
        "targets": [[22, 0, 12, 13, 0, 0], [12, 13, 0, 0, 0, 0], [0] * 6],
        "weights": [[1, 0, 1, 1, 0, 0], [1, 1, 0, 0, 0, 0], [0] * 6],
        "positions": [[0, 1, 0, 1, 2, 0], [0, 1, 2, 0, 0, 0], [0] * 6],
        "segment_ids": [[1, 1, 2, 2, 2, 0], [1, 1, 1, 0, 0, 0], [0] * 6],
    }
    assert {name: array.tolist() for name, array in batch.items()} == want
    for name, array in batch.items():
        assert array.dtype == (np.float32 if name == "weights" else np.int32)
    with pytest.raises(ValueError, match="row 0 has 5 or more tokens"):
        packing.fill(examples, [np.array([1, 0])], 4)
