"""Attention of next tokens to a cache, on CPUs with oneDNN's products: against float64 NumPy, and in models."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.family_configs import CONFIGS
from support.tiny import numpy_params, spec

from ftjax.models import onednn
from ftjax.models.cache import init_cache
from ftjax.models.decoder import Decoder
from ftjax.models.families import spec_from_config
from ftjax.models.onednn_attention import of_next_token

multiplies = pytest.mark.skipif(bool(onednn.lacks()), reason=onednn.lacks())


def arrays(layers, batch, heads, kv_heads, slots, width, value_width):
    """(queries, keys, values, cached keys, cached values)"""
    rng = np.random.default_rng(0)
    shapes = [(batch, 1, heads, width), (batch, kv_heads, 1, width), (batch, kv_heads, 1, value_width)]
    shapes += [(layers, batch, kv_heads, slots, width), (layers, batch, kv_heads, slots, value_width)]
    return [rng.standard_normal(shape).astype(np.float32) for shape in shapes]


def exact(queries, keys, values, cached_keys, cached_values, layer, positions, scale, window):
    """In float64, a row and a head at a time."""
    batch, _, heads, _ = queries.shape
    out, windows = np.zeros((batch, 1, heads, values.shape[-1])), np.broadcast_to(np.ravel(window or 10**6), batch)
    for row in range(batch):
        position = positions[row, 0]
        seen = slice(max(0, position - windows[row] + 1), position)
        for head in range(heads):
            shared = head // (heads // keys.shape[1])
            its = [
                np.concatenate([cached[layer, row, shared, seen], own[row, shared]]).astype(np.float64)
                for cached, own in ((cached_keys, keys), (cached_values, values))
            ]
            scores = scale * its[0] @ queries[row, 0, head]
            weights = np.exp(scores - scores.max())
            out[row, 0, head] = weights @ its[1] / weights.sum()
    return out


# layers, batch, heads, those of keys, slots, width, that of values; positions; window. Widths that vectors divide and
# others, empty and full caches, one row, more work than one thread is given.
CASES = [
    ((3, 2, 4, 2, 16, 8, 8), [5, 0], None),
    ((2, 3, 9, 3, 64, 64, 64), [64, 1, 33], None),
    ((1, 2, 6, 1, 40, 13, 21), [39, 7], 5),
    ((2, 1, 2, 2, 8, 3, 1), [8], 1),
    ((1, 16, 8, 4, 600, 32, 16), list(range(30, 606, 36)), 400),
]


@multiplies
@pytest.mark.parametrize(("shape", "positions", "window"), CASES)
def test_it_is_float64s_up_to_float32(shape, positions, window, record_figure):
    given, layer, positions = arrays(*shape), shape[0] - 1, np.array(positions, np.int32)[:, None]
    wanted = exact(*given, layer, positions, shape[5] ** -0.5, window)
    found = of_next_token(*map(jnp.asarray, given), jnp.int32(layer), jnp.asarray(positions), shape[5] ** -0.5, window)
    error = np.linalg.norm(found - wanted) / np.linalg.norm(wanted)
    record_figure("apart from float64", error)
    assert error < 5e-6


@multiplies
def test_layer_scale_and_the_windows_of_rows_may_be_data():
    given, positions = arrays(3, 2, 4, 2, 20, 8, 8), jnp.array([[11], [19]], jnp.int32)
    run = jax.jit(lambda layer, scale, window: of_next_token(*given, layer, positions, scale, window))
    for layer, scale, window in ((0, 0.25, [[[3]], [[12]]]), (2, 0.5, [[[1]], [[40]]])):
        wanted = exact(*given, layer, np.asarray(positions), scale, window)
        np.testing.assert_allclose(run(jnp.int32(layer), scale, jnp.array(window)), wanted, atol=3e-6)


@multiplies
def test_nothing_is_read_that_is_not_seen():
    """Other layers, what was never written, and what lies before the window."""
    queries, keys, values, *cached = arrays(3, 2, 4, 2, 20, 8, 8)
    positions = np.array([[11], [20]], np.int32)
    wanted = exact(queries, keys, values, *cached, 1, positions, 0.3, 6)
    for its in cached:
        its[[0, 2]] = np.nan
        for row, position in enumerate(positions[:, 0]):
            its[1, row, :, : position - 5], its[1, row, :, position:] = np.nan, np.nan
    found = of_next_token(queries, keys, values, *cached, jnp.int32(1), jnp.asarray(positions), 0.3, 6)
    np.testing.assert_allclose(found, wanted, atol=3e-6)
    cached[1][1, 1, 1, 17, 3] = np.nan
    found = of_next_token(queries, keys, values, *cached, jnp.int32(1), jnp.asarray(positions), 0.3, 6)
    assert np.argwhere(np.isnan(found)).tolist() == [[1, 0, 2, 3], [1, 0, 3, 3]]


@multiplies
def test_what_would_be_read_beyond_its_end_is_refused():
    queries, keys, values, *cached = map(jnp.asarray, arrays(3, 2, 4, 2, 20, 8, 8))
    rest = jnp.int32(0), jnp.ones((2, 1), jnp.int32), 1.0, None
    with pytest.raises(ValueError, match="cached keys are bfloat16"):
        of_next_token(queries, keys, values, cached[0].astype(jnp.bfloat16), cached[1], *rest)
    with pytest.raises(
        ValueError, match=r"values are float32 \(2, 2, 1, 4\), and would have to be float32 \(2, 2, 1, 8\)"
    ):
        of_next_token(queries, keys, values[..., :4], *cached, *rest)
    with pytest.raises(ValueError, match="3 heads do not share 2 heads of keys evenly"):
        of_next_token(queries[:, :, :3], keys, values, *cached, *rest)


@multiplies
def test_no_rows_are_no_rows():
    given, positions = arrays(1, 0, 4, 2, 8, 8, 8), jnp.zeros((0, 1), jnp.int32)
    assert of_next_token(*given, jnp.int32(0), positions, 1.0, None).shape == (0, 1, 4, 8)


def decoded(model, variables, tokens, lengths, steps):
    """The hidden states of `steps` tokens, one at a time, after `lengths` of each row; [B, steps, D]."""
    places = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    cache = init_cache(model.spec, len(tokens), tokens.shape[1], jnp.float32)
    read = (places < lengths[:, None]).astype(jnp.int32)
    _, cache = model.clone(attention="xla").apply(variables, tokens, places, read, cache)
    run, out = jax.jit(model.apply), []
    for step in range(steps):
        at = (lengths + step)[:, None]
        hidden, cache = run(variables, jnp.take_along_axis(tokens, at, 1), at, jnp.ones_like(at), cache)
        out.append(hidden)
    return jnp.concatenate(out, axis=1)


# Windows by layer, chunks, values narrower than keys, keys of another layer, layers of several kinds, one that attends
# beside what it carries, soft caps and sinks; the last three are XLA's.
@multiplies
@pytest.mark.parametrize(
    "name",
    ["gemma3", "llama4", "deepseek_v3", "qwen3_next", "lfm2", "falcon_h1", "gemma3n", "gemma2", "gpt_oss"],
)
def test_models_go_on_as_by_xlas(name, record_figure):
    model = Decoder(spec_from_config(CONFIGS[name]), matmul="onednn")
    variables = {"params": numpy_params(model)}
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, model.spec.vocab_size, (3, 24)), jnp.int32)
    run = functools.partial(decoded, variables=variables, tokens=tokens, lengths=jnp.array([1, 9, 20]), steps=4)
    found, wanted = (run(model.clone(attention=attention)) for attention in ("auto", "xla"))
    apart = np.linalg.norm(found - wanted) / np.linalg.norm(wanted)
    record_figure("apart", apart)
    cache = init_cache(model.spec, 3, 24, jnp.float32)
    traced = str(jax.make_jaxpr(model.apply)(variables, *3 * (jnp.ones((3, 1), jnp.int32),), cache))
    assert (onednn.OF_NEXT_TOKEN in traced) == (name not in ("gemma3n", "gemma2", "gpt_oss"))
    # Where products round, a value near the middle of two bfloat16 may become the other one.
    assert apart < (0.02 if onednn.operands() == jnp.bfloat16 else 1e-5)


@multiplies
def test_no_layer_of_a_cache_is_copied():
    """What is held beside the cache does not grow with its slots."""
    model = Decoder(spec(max_position_embeddings=8192), matmul="onednn")
    variables, one = {"params": numpy_params(model)}, jnp.ones((2, 1), jnp.int32)

    def held(slots):
        cache = init_cache(model.spec, 2, slots, jnp.float32)
        run = jax.jit(lambda cache: model.apply(variables, one, one, one, cache), donate_argnums=0)
        return run.lower(cache).compile().memory_analysis().temp_size_in_bytes

    assert held(8192) == held(64)


# Without biases, with those of queries, keys and values, with all, and layers that carry a state.
@multiplies
@pytest.mark.parametrize("name", ["gemma3", "qwen2", "gpt2", "qwen3_next"])
def test_padding_and_rows_that_have_ended_change_nothing_and_cost_no_product(name):
    """Their hidden states are zeros where a layer begins, which product_with_layer leaves out; their caches, here of
    NaN, are not read.
    """
    model = Decoder(spec_from_config(CONFIGS[name]), matmul="onednn")
    variables = {"params": numpy_params(model)}
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, model.spec.vocab_size, (3, 12)), jnp.int32)
    places = jnp.broadcast_to(jnp.arange(12), tokens.shape)
    there = (places < jnp.array([[12], [5], [0]])).astype(jnp.int32)
    reach = jnp.full(3, 12, jnp.int32)
    hidden, _ = model.apply(variables, tokens, places, there, reach, method="prefill")
    for row, length in ((0, 12), (1, 5)):
        given = (its[row : row + 1, :length] for its in (tokens, places, there))
        alone, _ = model.apply(variables, *given, reach[:1], method="prefill")
        np.testing.assert_allclose(hidden[row, :length], alone[0], rtol=0, atol=0.02 * float(jnp.abs(alone).max()))

    cache = init_cache(model.spec, 3, 12, jnp.float32)
    spoilt = jax.tree.map(lambda its: its.at[:, 2].set(jnp.nan) if its.ndim == 5 else its, cache)
    at, active = jnp.array([[3], [0], [9]], jnp.int32), jnp.array([[1], [1], [0]], jnp.int32)
    (found, _), (wanted, _) = (model.apply(variables, tokens[:, :1], at, active, its) for its in (spoilt, cache))
    np.testing.assert_array_equal(found[:2], wanted[:2])
    assert np.isfinite(found).all()
    if name in ("gemma3", "qwen2"):
        np.testing.assert_array_equal(found[2], 0)
        np.testing.assert_array_equal(hidden[there == 0], 0)
