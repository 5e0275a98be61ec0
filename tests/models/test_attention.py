"""Attention against a loop over tokens in float64 NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ftjax.models.attention import attention, attention_of_rows, chunk_segments, cut

B, T, H, K, D, E = 2, 9, 6, 3, 4, 5
SCALE = 0.7


def naive(queries, keys, values, positions, segments, window=None, softcap=None, sinks=None):
    out = np.zeros((B, T, H, E))
    for b, t, h in np.ndindex(B, T, H):
        seen = [
            s
            for s in range(T)
            if segments[b, s] == segments[b, t]
            and positions[b, s] <= positions[b, t]
            and (window is None or positions[b, t] - positions[b, s] < window)
        ]
        scores = np.array([queries[b, t, h] @ keys[b, s, h * K // H] * SCALE for s in seen])
        if softcap is not None:
            scores = softcap * np.tanh(scores / softcap)
        weights = np.exp(scores)
        total = weights.sum() + (np.exp(sinks[h]) if sinks is not None else 0)
        out[b, t, h] = sum(w * values[b, s, h * K // H] for w, s in zip(weights / total, seen))
    return out


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"window": 3},
        {"softcap": 0.5},
        {"sinks": np.linspace(-1, 2, H)},
        {"window": 2, "softcap": 1.0, "sinks": np.ones(H)},
    ],
    ids=["plain", "window", "softcap", "sinks", "all"],
)
def test_equals_the_loop(options, record_figure):
    rng = np.random.default_rng(0)
    queries = rng.standard_normal((B, T, H, D))
    keys, values = rng.standard_normal((B, T, K, D)), rng.standard_normal((B, T, K, E))
    segments = np.array([[1] * 5 + [2] * 4, [0] * 2 + [1] * 7])
    positions = np.array([[*range(5), *range(4)], [0, 0, *range(7)]])
    expected = naive(queries, keys, values, positions, segments, **options)
    narrow = [array.astype(np.float32) for array in (queries, keys, values)]
    options = {name: np.float32(value) if name == "sinks" else value for name, value in options.items()}
    ours = np.asarray(attention(*narrow, positions, positions, segments, segments, SCALE, **options))
    real = segments > 0
    record_figure("difference", np.abs(ours - expected)[real].max())
    np.testing.assert_allclose(ours[real], expected[real], atol=2e-6)
    assert np.isfinite(ours).all()


def test_chunks_of_a_segment_are_segments_of_their_own():
    segments = np.array([[1] * 5 + [2] * 4, [0] * 2 + [7] * 7])
    positions = np.array([[*range(5), *range(4)], [0, 0, *range(7)]])
    found = chunk_segments(jnp.asarray(positions), jnp.asarray(segments), 3)
    for row, one, other in np.ndindex(B, T, T):
        same = segments[row, one] == segments[row, other] and positions[row, one] // 3 == positions[row, other] // 3
        assert (found[row, one] == found[row, other]) == same
    assert (np.asarray(found)[1, :2] == 0).all()


def test_scores_of_any_size_do_not_overflow():
    rng = np.random.default_rng(1)
    queries = rng.standard_normal((1, 3, 2, 4)).astype(np.float32) * 1e4
    keys, values = rng.standard_normal((2, 1, 3, 1, 4)).astype(np.float32)
    ones = np.ones((1, 3), np.int32)
    places = np.arange(3)[None]
    for sinks in (None, np.float32([1e4, -1e4])):
        out = attention(queries, keys, values, places, places, ones, ones, 1.0, sinks=sinks)
        assert np.isfinite(np.asarray(out)).all()


@pytest.mark.parametrize("length", [64, 65, 200, 511])
@pytest.mark.parametrize("window", [None, 70, "of the layer"])
def test_rows_in_blocks_equal_rows_at_once_forward_and_backward(length, window, record_figure):
    rng = np.random.default_rng(2)
    queries = rng.standard_normal((2, length, 4, 8)).astype(np.float32)
    keys, values = (rng.standard_normal((2, length, 2, width)).astype(np.float32) for width in (8, 6))
    sinks = np.float32([0.5, -1, 0, 2])
    ends = length // 3, length // 2  # of documents; the second row begins with padding
    segments = np.stack(
        [np.repeat([1, 2], [ends[0], length - ends[0]]), np.repeat([0, 1], [ends[1], length - ends[1]])]
    )
    positions = np.stack([np.r_[: ends[0], : length - ends[0]], np.r_[: ends[1], : length - ends[1]]])
    real = (segments > 0)[..., None, None]

    def loss(of, *arrays):
        return jnp.sum(jnp.where(real, jnp.sin(of(*arrays)), 0))

    given = jnp.int32(70) if window == "of the layer" else window  # known only while it runs
    places = (positions, positions, segments, segments)

    def at_once(q, k, v, sinks):
        return attention(q, k, v, *places, SCALE, given, 5.0, sinks)

    def in_blocks(q, k, v, sinks):
        return attention_of_rows(q, k, v, positions, segments, SCALE, given, 5.0, sinks)

    arrays = (queries, keys, values, sinks)
    (expected, wanted), (ours, found) = (
        jax.jit(jax.value_and_grad(lambda *x, of=of: loss(of, *x), argnums=(0, 1, 2, 3)))(*arrays)
        for of in (at_once, in_blocks)
    )
    record_figure("difference", max(float(jnp.abs(a - b).max()) for a, b in zip(wanted, found)))
    np.testing.assert_allclose(ours, expected, rtol=1e-6)
    for a, b in zip(wanted, found):
        np.testing.assert_allclose(b, a, rtol=2e-6, atol=2e-6)


def test_blocks_cover_every_row():
    for length in range(1, 3000):
        parts, blocks, block = cut(length)
        assert parts * blocks * block >= length > (parts - 1) * blocks * block
        assert block <= 64
