"""Mamba-2's recurrence in chunks against itself token by token: float64 NumPy, and torch for gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from ftjax.models import delta
from ftjax.models.mamba import state_space

HEADS, GROUPS, WIDTH, STATE = 6, 2, 5, 4
TOKENS = ("x", "steps", "b", "c")  # of the inputs, those of each token


def inputs(length, rows=2, seed=0, strongest=2.0):
    """float32, by the names of `state_space`'s arguments; half of the steps are short."""
    rng = np.random.default_rng(seed)
    found = {
        "x": rng.standard_normal((rows, length, HEADS, WIDTH)),
        "steps": rng.random((rows, length, HEADS)) ** 3,
        "a": -strongest * (0.1 + rng.random(HEADS)),
        "b": rng.standard_normal((rows, length, GROUPS, STATE)),
        "c": rng.standard_normal((rows, length, GROUPS, STATE)),
        "skip": rng.standard_normal(HEADS),
    }
    return {name: array.astype(np.float32) for name, array in found.items()}


def start(rows=2):
    return np.random.default_rng(1).standard_normal((rows, HEADS, STATE, WIDTH)).astype(np.float32)


def recurrence(x, steps, a, b, c, skip, documents, memory):
    """Token by token, in float64: as `state_space`."""
    (rows, length, heads, _), out, last = x.shape, np.zeros(x.shape), memory.astype(np.float64)
    for row in range(rows):
        before = 0
        for token in range(length):
            if documents[row, token] != before:
                last[row], before = 0, documents[row, token]
            for head in range(heads):
                group, step = head // (heads // b.shape[2]), np.float64(steps[row, token, head])
                added = step * np.outer(b[row, token, group], x[row, token, head])
                last[row, head] = np.exp(step * a[head]) * last[row, head] + added
                out[row, token, head] = c[row, token, group] @ last[row, head] + skip[head] * x[row, token, head]
    return out, last


def check(given, documents, memory, record_figure):
    ours, after = jax.jit(state_space)(**given, documents=documents, memory=memory)
    out, last = recurrence(**given, documents=documents, memory=memory)
    difference = max(np.abs(ours - out).max(), np.abs(after - last).max())
    record_figure("largest difference", difference)
    assert difference < 1e-5 * np.abs(out).max()


@pytest.mark.parametrize("length", [1, 2, 63, 64, 65, 150])
def test_chunks_are_the_recurrence(length, record_figure):
    """Also from a memory that is there, and of lengths that chunks do not divide."""
    check(inputs(length), np.zeros((2, length), np.int32), start(), record_figure)


@pytest.mark.parametrize("strongest", [0.0, 100.0], ids=["nothing is forgotten", "all is forgotten at once"])
def test_weak_and_strong_decays(strongest, record_figure):
    check(inputs(130, strongest=strongest), np.zeros((2, 130), np.int32), start(), record_figure)


def test_a_document_begins_with_an_empty_memory(record_figure):
    """Within a chunk, at its first token, over several chunks, of one token."""
    starts = np.zeros((2, 200), np.int32)
    starts[0, [3, 64, 65, 190]] = 1
    starts[1, [0, 128]] = 1
    check(inputs(200), np.cumsum(starts, axis=1, dtype=np.int32), start(), record_figure)


def test_padding_changes_nothing():
    given, documents = inputs(100), np.zeros((2, 100), np.int32)
    padded = dict(given)
    for name in TOKENS:
        padded[name] = np.concatenate([given[name], np.full_like(given[name][:, :60], 7.0)], axis=1)
    padded["steps"][:, 100:] = 0
    out, memory = state_space(**given, documents=documents, memory=start())
    longer, after = state_space(**padded, documents=np.zeros((2, 160), np.int32), memory=start())
    np.testing.assert_allclose(longer[:, :100], out, rtol=0, atol=1e-5)
    np.testing.assert_allclose(after, memory, rtol=0, atol=1e-5)


def test_what_goes_on_from_a_memory_is_the_whole_row(record_figure):
    """Cut anywhere, the second part begins with what the first has left."""
    given, documents = inputs(90), np.zeros((2, 90), np.int32)
    whole, last = state_space(**given, documents=documents, memory=start())
    memory, parts = start(), []
    for first, end in ((0, 40), (40, 41), (41, 90)):
        part = {name: array[:, first:end] if name in TOKENS else array for name, array in given.items()}
        out, memory = state_space(**part, documents=documents[:, first:end], memory=memory)
        parts.append(out)
    difference = max(np.abs(np.concatenate(parts, axis=1) - whole).max(), np.abs(memory - last).max())
    record_figure("largest difference", difference)
    assert difference < 1e-5 * np.abs(whole).max()


def test_gradients_are_those_of_the_recurrence_in_torch(record_figure):
    given, lengths = inputs(150), [70, 1, 79]
    documents = np.broadcast_to(np.repeat(np.arange(3), lengths), (2, 150)).astype(np.int32)
    weights = np.random.default_rng(2).standard_normal((2, 150, HEADS, WIDTH)).astype(np.float32)

    def total(given, memory):
        return (weights * state_space(**given, documents=documents, memory=memory)[0]).sum()

    ours, of_memory = jax.jit(jax.grad(total, argnums=(0, 1)))(given, jnp.asarray(start()))
    theirs = {name: torch.tensor(array, dtype=torch.float64, requires_grad=True) for name, array in given.items()}
    first = torch.tensor(start(), dtype=torch.float64, requires_grad=True)
    memory, out = first, []
    b, c = (theirs[name].repeat_interleave(HEADS // GROUPS, dim=2) for name in "bc")
    for token in range(150):
        memory = torch.zeros_like(memory) if token in (70, 71) else memory
        step = theirs["steps"][:, token, :, None, None]
        written = b[:, token, :, :, None] * theirs["x"][:, token, :, None]
        memory = torch.exp(step * theirs["a"][:, None, None]) * memory + step * written
        read = (c[:, token, :, :, None] * memory).sum(dim=2)
        out.append(read + theirs["skip"][:, None] * theirs["x"][:, token])
    (torch.stack(out, dim=1) * torch.tensor(weights)).sum().backward()
    expected = {name: array.grad.numpy() for name, array in theirs.items()} | {"memory": first.grad.numpy()}
    found = ours | {"memory": of_memory}
    relative = {name: np.abs(found[name] - its).max() / np.abs(its).max() for name, its in expected.items()}
    record_figure("largest difference of gradients, relative", max(relative.values()))
    assert max(relative.values()) < 1e-5
    assert min(np.abs(its).max() for its in expected.values()) > 1


def test_chunks_of_other_sizes_say_the_same(monkeypatch):
    given, documents = inputs(100), np.zeros((2, 100), np.int32)
    out, _ = state_space(**given, documents=documents, memory=start())
    monkeypatch.setattr(delta, "CHUNK", 16)
    other, _ = state_space(**given, documents=documents, memory=start())
    np.testing.assert_allclose(other, out, rtol=0, atol=1e-5)
