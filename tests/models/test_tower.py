"""Attention among the patches of an image against float64 NumPy, whatever blocks it is computed in."""

import jax
import numpy as np
import pytest
from support.vision import CONFIGS

from ftjax.models import tower
from ftjax.models.families import spec_from_config
from ftjax.models.tower import in_windows, within


def expected(queries, keys, values, segments):
    queries, keys, values = (np.float64(x) for x in (queries, keys, values))
    scores = np.einsum("bqhd,bkhd->bhqk", queries, keys) * queries.shape[-1] ** -0.5
    scores = np.where((segments[:, :, None] == segments[:, None, :])[:, None], scores, -np.inf)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return np.einsum("bhqk,bkhd->bqhd", weights / weights.sum(axis=-1, keepdims=True), values)


def of_sizes(sizes, count):
    """int32 [rows, count]: segments of these sizes, the rest padding."""
    rows = [np.repeat(np.arange(1, len(row) + 1), row) for row in sizes]
    return np.stack([np.pad(row, (0, count - len(row))) for row in rows]).astype(np.int32)


@pytest.mark.parametrize("most", [None, 16, 9], ids=["any", "of 16", "of 9"])
@pytest.mark.parametrize("block", [256, 7, 4])
@pytest.mark.parametrize("scores", [1, 2**22], ids=["one by one", "together"])
def test_every_patch_sees_all_of_its_image_and_no_other(most, block, scores, monkeypatch, record_figure):
    monkeypatch.setattr(tower, "BLOCK", block)
    monkeypatch.setattr(tower, "SCORES", scores)
    # Padding is as long as any image may be.
    segments = of_sizes([[9, 3, 9, 1, 9], [2] * 15 + [1], [9, 9, 9, 4]], 31)
    rng = np.random.default_rng(0)
    queries, keys, values = rng.standard_normal((3, 3, 31, 2, 4)).astype(np.float32)
    found = jax.jit(within, static_argnums=4)(queries, keys, values, segments, most)
    difference = np.abs(found - expected(queries, keys, values, segments)).max()
    record_figure("difference", difference)
    assert difference < 1e-5


def test_tokens_of_a_window_lie_together():
    """An image of 4 x 6 tokens and one of 2 x 2, in windows of 2 x 2 tokens, behind them padding."""
    vision = spec_from_config(CONFIGS["qwen2_5_vl"], vision=True).vision
    assert (vision.window, vision.merge) == (4, 2)
    tokens = [(1, row, column) for row in range(4) for column in range(6)]
    tokens += [(2, row, column) for row in range(2) for column in range(2)] + [(0, 0, 0)] * 4
    image, row, column = np.repeat(np.array(tokens, np.int32), 4, axis=0).T  # four patches of each
    places = 2 * np.stack([row, column], axis=-1) + np.tile([[0, 0], [0, 1], [1, 0], [1, 1]], (len(tokens), 1))
    order, windows = in_windows(vision, places[None].astype(np.int32), image[None])
    wanted = {
        (1, 0, 0): [0, 1, 6, 7],
        (1, 0, 1): [2, 3, 8, 9],
        (1, 0, 2): [4, 5, 10, 11],
        (1, 1, 0): [12, 13, 18, 19],
        (1, 1, 1): [14, 15, 20, 21],
        (1, 1, 2): [16, 17, 22, 23],
        (2, 0, 0): [24, 25, 26, 27],
    }
    assert order[0].tolist() == [token for each in wanted.values() for token in each] + [28, 29, 30, 31]
    assert windows[0].tolist() == np.repeat([1, 2, 3, 4, 5, 6, 7, 0], 16).tolist()
