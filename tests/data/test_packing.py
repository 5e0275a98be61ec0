"""Packing keeps documents whole, apart and near their place in the order, and wastes little."""

import numpy as np
import pytest

from ftjax.data import packing
from ftjax.data.example import Example


def log_normal_lengths(rng, n, capacity, sigma):
    """Mean about capacity / 8, cut at capacity."""
    return np.clip(rng.lognormal(np.log(capacity / 8) - sigma**2 / 2, sigma, n).astype(int), 1, capacity)


@pytest.mark.parametrize("sigma", [0.5, 1.0, 1.5])
def test_rows_are_at_least_97_percent_full_and_every_example_is_in_one(sigma, record_figure):
    rng = np.random.default_rng(0)
    lengths = log_normal_lengths(rng, 4000, 2048, sigma)
    order = rng.permutation(4000)
    rows = packing.pack(lengths, 2048, order)
    used = np.array([lengths[row].sum() for row in rows])
    assert used.max() <= 2048
    assert sorted(np.concatenate(rows).tolist()) == list(range(4000))
    efficiency = used.sum() / (len(rows) * 2048)
    record_figure("packing_efficiency", efficiency)
    assert efficiency >= 0.97


def test_the_order_is_kept_within_the_window():
    rng = np.random.default_rng(1)
    lengths = log_normal_lengths(rng, 4000, 512, 1.0)
    order = rng.permutation(4000)
    place = np.empty(4000, int)
    place[order] = np.arange(4000)
    waiting = set(range(4000))
    for row in packing.pack(lengths, 512, order):
        assert place[row[0]] == min(waiting)  # the one that has waited longest starts each row
        for p in place[row]:
            packed = 4000 - len(waiting)
            assert p < packed + packing.WINDOW
            waiting.remove(p)
    assert not waiting


def test_edges():
    assert packing.pack(np.array([4, 4, 4]), 4, np.array([2, 0, 1]))[0].tolist() == [2]
    assert [row.tolist() for row in packing.pack(np.array([1, 3, 2, 2]), 4, np.arange(4))] == [[0, 1], [2, 3]]
    assert packing.pack(np.array([4]), 4, np.arange(0)) == []
    # Of two as long the earlier comes first; a part of the examples may be packed.
    assert [row.tolist() for row in packing.pack(np.array([2, 2, 9, 2]), 4, np.array([3, 1, 0]))] == [[3, 1], [0]]
    for lengths in ([5], [0]):
        with pytest.raises(ValueError, match="do not fit rows of 4"):
            packing.pack(np.array(lengths), 4, np.arange(1))


def test_fill_restarts_positions_and_never_predicts_across_documents():
    a = Example(np.array([11, 12, 13], np.int32), np.array([False, True, True]), "a")
    b = Example(np.array([21, 22], np.int32), np.array([True, True]), "b")
    batch = packing.fill([a, b], [np.array([1, 0]), np.array([0]), np.array([], int)], 6)
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
        packing.fill([a, b], [np.array([1, 0])], 4)
