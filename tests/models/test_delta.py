"""The gated delta rule in chunks against its recurrence: float64 NumPy, and transformers' in torch for gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers.models.qwen3_next.modeling_qwen3_next import torch_recurrent_gated_delta_rule

from ftjax.models import delta
from ftjax.models.delta import gated_delta

HEADS, KEY, VALUE = 3, 5, 4


def inputs(length, rows=2, seed=0, strongest=2.0):
    """queries, keys (of length 1), values, decays, rates: float32 [rows, length, heads, ...]."""
    rng = np.random.default_rng(seed)
    queries, keys = (rng.standard_normal((rows, length, HEADS, KEY)) for _ in range(2))
    keys /= np.linalg.norm(keys, axis=-1, keepdims=True)
    values = rng.standard_normal((rows, length, HEADS, VALUE))
    decays, rates = -strongest * rng.random((rows, length, HEADS)) ** 3, rng.random((rows, length, HEADS))
    return [x.astype(np.float32) for x in (queries, keys, values, decays, rates)]


def recurrence(queries, keys, values, decays, rates, documents, memory):
    """One head of one row, equation 10 of the paper, in float64: [T, ...] -> out [T, v], memory [k, v]."""
    memory, out, before = memory.astype(np.float64), [], 0
    for query, key, value, decay, rate, document in zip(queries, keys, values, decays, rates, documents):
        memory = np.exp(np.float64(decay)) * memory if document == before else np.zeros_like(memory)
        memory = memory + rate * np.outer(key, value - key @ memory)
        out.append(query @ memory)
        before = document
    return np.array(out), memory


def check(tokens, documents, memory, record_figure):
    ours, last = jax.jit(gated_delta)(*tokens, documents, memory)
    differences = []
    for row in range(len(documents)):
        for head in range(HEADS):
            out, after = recurrence(*(x[row, :, head] for x in tokens), documents[row], memory[row, head])
            differences += [np.abs(ours[row, :, head] - out).max(), np.abs(last[row, head] - after).max()]
    record_figure("largest difference", max(differences))
    assert max(differences) < 1e-5


@pytest.mark.parametrize("length", [1, 2, 63, 64, 65, 200])
def test_chunks_are_the_recurrence(length, record_figure):
    """Also from a memory that is there, and of lengths that chunks do not divide."""
    memory = np.random.default_rng(1).standard_normal((2, HEADS, KEY, VALUE)).astype(np.float32)
    check(inputs(length), np.zeros((2, length), np.int32), memory, record_figure)


@pytest.mark.parametrize("strongest", [0.0, 60.0], ids=["nothing is forgotten", "all is forgotten at once"])
def test_weak_and_strong_decays(strongest, record_figure):
    zeros = np.zeros((2, HEADS, KEY, VALUE), np.float32)
    check(inputs(130, strongest=strongest), np.zeros((2, 130), np.int32), zeros, record_figure)


def test_a_document_begins_with_an_empty_memory(record_figure):
    """Within a chunk, at its first token, over several chunks, of one token."""
    starts = np.zeros((2, 200), np.int32)
    starts[0, [3, 64, 65, 190]] = 1
    starts[1, [0, 128]] = 1
    memory = np.random.default_rng(1).standard_normal((2, HEADS, KEY, VALUE)).astype(np.float32)
    check(inputs(200), np.cumsum(starts, axis=1, dtype=np.int32), memory, record_figure)


def test_padding_changes_nothing():
    tokens, documents = inputs(100), np.zeros((2, 100), np.int32)
    zeros = np.zeros((2, HEADS, KEY, VALUE), np.float32)
    padded = [np.concatenate([x, np.full_like(x[:, :60], 7.0)], axis=1) for x in tokens]
    for x in padded[3:]:  # decays and rates
        x[:, 100:] = 0
    out, memory = gated_delta(*tokens, documents, zeros)
    longer, after = gated_delta(*padded, np.zeros((2, 160), np.int32), zeros)
    np.testing.assert_allclose(longer[:, :100], out, rtol=0, atol=1e-6)
    np.testing.assert_allclose(after, memory, rtol=0, atol=1e-6)


def test_gradients_are_those_of_the_recurrence_in_torch(record_figure):
    tokens, lengths = inputs(150), [70, 1, 79]
    documents = np.broadcast_to(np.repeat(np.arange(3), lengths), (2, 150)).astype(np.int32)
    weights = np.random.default_rng(2).standard_normal((2, 150, HEADS, VALUE)).astype(np.float32)
    zeros = jnp.zeros((2, HEADS, KEY, VALUE))
    ours = jax.jit(jax.grad(lambda x: (weights * gated_delta(*x, documents, zeros)[0]).sum()))(tuple(tokens))
    theirs = [torch.tensor(x, requires_grad=True) for x in tokens]
    parts = zip(*(torch.split(x, lengths, dim=1) for x in theirs))
    out = torch.cat([torch_recurrent_gated_delta_rule(*part)[0] for part in parts], dim=1)
    # Which scales the queries besides.
    (out * KEY**0.5 * torch.tensor(weights)).sum().backward()
    differences = [np.abs(one - other.grad.numpy()).max() for one, other in zip(ours, theirs)]
    record_figure("largest difference of gradients", max(differences))
    assert max(differences) < 1e-4
    assert min(np.abs(one).max() for one in ours) > 1


def test_chunks_of_other_sizes_say_the_same(monkeypatch):
    tokens, documents = inputs(100), np.zeros((2, 100), np.int32)
    zeros = np.zeros((2, HEADS, KEY, VALUE), np.float32)
    out, _ = gated_delta(*tokens, documents, zeros)
    monkeypatch.setattr(delta, "CHUNK", 16)
    np.testing.assert_allclose(gated_delta(*tokens, documents, zeros)[0], out, rtol=0, atol=1e-5)
