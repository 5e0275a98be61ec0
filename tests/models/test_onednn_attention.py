"""Attention whose products oneDNN makes on a CPU, of bfloat16 or float32, against float64 NumPy and torch."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from support.family_configs import CONFIGS
from support.tiny import batch_of, documents, logits, numpy_params, one_device, spec

from ftjax.models import onednn
from ftjax.models.decoder import Decoder
from ftjax.models.families import spec_from_config
from ftjax.models.kernels import choose
from ftjax.models.onednn_attention import attention, first_seen

multiplies = pytest.mark.skipif(bool(onednn.lacks()), reason=onednn.lacks())
rounds = onednn.operands() == jnp.bfloat16  # or else products are those of float32


def arrays(batch, length, heads, kv_heads, width, value_width):
    """(queries, keys, values, the gradient of the result)"""
    rng = np.random.default_rng(0)
    shapes = [(heads, width), (kv_heads, width), (kv_heads, value_width), (heads, value_width)]
    return [rng.standard_normal((batch, length, *shape)).astype(np.float32) for shape in shapes]


def segments_of(batch, length, count):
    """`count` documents of any lengths in each row, and padding (0) after the last."""
    rng = np.random.default_rng(1)
    cuts = np.sort(rng.integers(1, length, (batch, count)), axis=1) if length > 1 else np.ones((batch, count))
    return np.array([np.searchsorted(row, np.arange(length), "right") + 1 for row in cuts], np.int32) % (count + 1)


def seen(segments, window):
    """bool [B, T, T]"""
    index = np.arange(segments.shape[1])
    same = (segments[:, :, None] == segments[:, None, :]) & (index[:, None] >= index)
    return same if window is None else same & (index[:, None] - index < window)


def exact(queries, keys, values, gradient, segments, scale, window):
    """The result and the three gradients, in float64, of scores that are written out."""
    queries, keys, values, gradient = (x.astype(np.float64) for x in (queries, keys, values, gradient))
    group = queries.shape[2] // keys.shape[2]
    repeated, widened = (np.repeat(x, group, axis=2) for x in (keys, values))
    scores = scale * np.einsum("bthd,bshd->bhts", queries, repeated)
    scores = np.where(seen(segments, window)[:, None], scores, -np.inf)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    d_weights = np.einsum("bthe,bshe->bhts", gradient, widened)
    d_scores = scale * weights * (d_weights - (weights * d_weights).sum(axis=-1, keepdims=True))

    def of_groups(x):
        return x.reshape(*x.shape[:2], -1, group, x.shape[-1]).sum(axis=3)

    return (
        np.einsum("bhts,bshe->bthe", weights, widened),
        np.einsum("bhts,bshd->bthd", d_scores, repeated),
        of_groups(np.einsum("bhts,bthd->bshd", d_scores, queries)),
        of_groups(np.einsum("bhts,bthe->bshe", weights, gradient)),
    )


def ours(queries, keys, values, gradient, segments, scale, window):
    run = functools.partial(attention, segments=jnp.asarray(segments), scale=scale, window=window)
    out, back = jax.vjp(run, *map(jnp.asarray, (queries, keys, values)))
    return out, *back(jnp.asarray(gradient))


def torchs(queries, keys, values, gradient, segments, scale, window):
    """All in bfloat16, as under autocast."""
    given = [torch.tensor(x).bfloat16().transpose(1, 2).requires_grad_() for x in (queries, keys, values)]
    mask = torch.tensor(seen(segments, window))[:, None]
    sdpa = torch.nn.functional.scaled_dot_product_attention
    out = sdpa(*given, attn_mask=mask, scale=scale, enable_gqa=True)
    out.backward(torch.tensor(gradient).bfloat16().transpose(1, 2))
    return [x.detach().transpose(1, 2).float().numpy() for x in (out, *(x.grad for x in given))]


def errors(found, wanted):
    """Of each array, relative to its size. Where tokens see only themselves, gradients of queries and keys are 0."""
    return [
        np.linalg.norm(np.asarray(x) - its) / max(np.linalg.norm(its), 1) for x, its in zip(found, wanted, strict=True)
    ]


# batch, length, heads, those of keys, width, that of values; window; documents of a row. Lengths and widths that divide
# well and others; one query; more heads in a group than a product has rows.
CASES = [
    ((2, 256, 9, 3, 64, 64), None, 1),
    ((3, 100, 4, 4, 16, 16), None, 3),
    ((1, 333, 4, 1, 24, 40), 50, 2),
    ((2, 65, 6, 2, 33, 17), 1, 1),
    ((1, 700, 2, 1, 8, 8), 300, 5),
    ((4, 1, 2, 1, 8, 8), None, 1),
    ((1, 40, 200, 1, 8, 8), None, 2),
]


@multiplies
@pytest.mark.parametrize(("shape", "window", "count"), CASES)
def test_result_and_gradients_are_as_near_to_float64_as_torchs_in_bfloat16(shape, window, count, record_figure):
    given = (*arrays(*shape), segments_of(*shape[:2], count), shape[4] ** -0.5, window)
    wanted = exact(*given)
    found, others = errors(ours(*given), wanted), errors(torchs(*given), wanted)
    record_figure("result and gradients", max(found))
    record_figure("torch's", max(others))
    assert max(found) < (0.01 if rounds else 2e-6)
    for name, our_error, their_error in zip(("out", "queries", "keys", "values"), found, others, strict=True):
        assert our_error <= 1.5 * their_error, name


@multiplies
def test_scale_and_window_may_differ_between_the_layers_of_a_scan():
    given = arrays(2, 90, 4, 2, 16, 16)[:3]
    segments = jnp.asarray(segments_of(2, 90, 2))
    run = jax.jit(lambda scale, window: attention(*given, segments, scale, window))
    for scale, window in ((0.25, 7), (0.5, 1000)):
        found = run(jnp.float32(scale), jnp.int32(window))
        np.testing.assert_array_equal(found, attention(*given, segments, scale, window))


def test_the_first_token_that_is_seen_begins_a_document_or_the_window():
    segments = jnp.array([[1, 1, 1, 2, 2, 2, 2, 0, 0]])
    assert first_seen(segments, None).tolist() == [[0, 0, 0, 3, 3, 3, 3, 7, 7]]
    assert first_seen(segments, 2).tolist() == [[0, 0, 1, 3, 3, 4, 5, 7, 7]]


@multiplies
@pytest.mark.parametrize("shape", [(1, 1000, 2, 1, 32, 32), (5, 130, 6, 3, 16, 16)])
def test_the_same_comes_out_whatever_thread_was_first(shape):
    queries, keys, values, gradient = arrays(*shape)
    given = (queries, keys, values, gradient, segments_of(*shape[:2], 1), 0.2, None)
    first = ours(*given)
    for _ in range(10):
        for found, its in zip(ours(*given), first, strict=True):
            np.testing.assert_array_equal(found, its)


@multiplies
def test_many_at_once_do_not_disturb_each_other():
    """XLA runs what does not depend on each other on several threads."""
    cases = [(*arrays(1 + i % 3, 40 + 13 * i, 4, 2, 16, 16), segments_of(1 + i % 3, 40 + 13 * i, 1)) for i in range(12)]
    wanted = [ours(*case, 0.25, None) for case in cases]
    found = jax.jit(lambda cases: [ours(*case, 0.25, None) for case in cases])(cases)
    jax.tree.map(np.testing.assert_array_equal, found, wanted)


@multiplies
def test_what_is_no_number_shows_where_it_is_seen():
    queries, keys, values, _ = arrays(1, 80, 4, 2, 16, 16)
    segments = np.repeat([[1, 2]], 40, axis=1)
    queries[0, 3, 1], keys[0, 50, 0, 2], values[0, 70, 1, 5] = np.nan, np.nan, np.nan
    out = np.asarray(attention(*map(jnp.asarray, (queries, keys, values, segments)), 0.25, None))
    lost = np.isnan(out).any(axis=-1)[0]  # [token, head]
    assert lost[3].tolist() == [False, True, False, False]
    assert lost[50:, :2].all()
    assert lost[70:, 2:].all()
    assert lost[:50].sum() == 1


@multiplies
@pytest.mark.parametrize("bits", [0x7FC00000, 0x7FFFFFFF, 0xFFFFFFFF, 0x7F800001])
def test_no_kind_of_nan_is_rounded_to_a_number(bits):
    queries, keys, values, _ = arrays(1, 20, 2, 1, 16, 16)
    values[0, 3, 0, 5] = np.array(bits, np.uint32).view(np.float32)
    out = attention(*map(jnp.asarray, (queries, keys, values)), jnp.ones((1, 20), jnp.int32), 0.25, None)
    assert np.isnan(out[0, 3:, :, 5]).all()


@multiplies
def test_rows_of_a_batch_are_what_each_is_alone():
    queries, keys, values, _ = arrays(3, 50, 4, 2, 16, 16)
    segments = segments_of(3, 50, 2)
    each = jax.vmap(lambda *row: attention(*(x[None] for x in row), 0.25, None)[0])(queries, keys, values, segments)
    np.testing.assert_array_equal(each, attention(queries, keys, values, jnp.asarray(segments), 0.25, None))
    assert attention(queries[:0], keys[:0], values[:0], jnp.asarray(segments[:0]), 0.25, None).shape == (0, 50, 4, 16)


def test_it_is_chosen_where_onednn_multiplies():
    plain = spec()

    def choice(spec=plain, wanted="auto", matmul="onednn"):
        return choose(wanted, spec, jnp.float32, 64, one_device(), matmul)

    assert choice() == choice(wanted="onednn") == ("onednn", "")
    assert choice(wanted="xla") == choice(matmul="xla") == ("xla", "")
    assert choice(dataclasses.replace(plain, attention_softcap=50.0)) == ("xla", "onednn cannot serve soft caps")
    assert choice(dataclasses.replace(plain, attention_sinks=True)) == ("xla", "onednn cannot serve sinks")
    assert choice(wanted="onednn", matmul="xla") == ("xla", "onednn is for config.model.matmul='onednn'")


# Windows by layer, chunks, values narrower than keys, keys of another layer, soft caps and sinks, which are XLA's.
@multiplies
@pytest.mark.parametrize("name", ["gemma3", "gemma3n", "llama4", "deepseek_v3", "qwen3_next", "gemma2", "gpt_oss"])
def test_models_see_the_same_by_either(name, record_figure):
    """Packed rows; how far apart, beside how far all other products in bfloat16 are from float32."""
    model = Decoder(spec_from_config(CONFIGS[name]), matmul="onednn")
    variables = {"params": numpy_params(model)}
    batch = batch_of([documents(2, [17, 30, 9])], 60)
    kernel, xla = (logits(model.clone(attention=its), variables, batch)[:, :56] for its in ("auto", "xla"))
    wanted = logits(model.clone(matmul="xla"), variables, batch)[:, :56]
    between, others = (np.linalg.norm(its - xla) / np.linalg.norm(xla) for its in (kernel, wanted))
    record_figure("by this attention", between)
    record_figure("by the other products", others)
    assert (between == 0) == (name in ("gemma2", "gpt_oss"))
    assert others < (0.1 if rounds else 1e-5)
    assert between < (1.5 * others if rounds else 1e-5)
