"""The chunked cross-entropy against float64 NumPy and against the same loss over full logits."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from ftjax.objectives.cross_entropy import PLAIN, Chunks, Further, cross_entropy, per_token

BATCH, LENGTH, WIDTH, VOCAB = 3, 13, 8, 97


@pytest.fixture(scope="module")
def case():
    rng = np.random.default_rng(0)
    hidden = rng.standard_normal((BATCH, LENGTH, WIDTH)).astype(np.float32)
    head = rng.standard_normal((WIDTH, VOCAB)).astype(np.float32)
    targets = rng.integers(0, VOCAB, (BATCH, LENGTH)).astype(np.int32)
    weights = (rng.random((BATCH, LENGTH)) < 0.6).astype(np.float32)
    weights[1] = 0  # a row without a trained position
    weights[2] = np.arange(LENGTH) >= 9  # and one with a long prompt
    # Some predictions must be right, or `correct` would compare zero with zero.
    best = (hidden @ head).argmax(-1)
    targets = np.where(rng.random((BATCH, LENGTH)) < 0.5, best, targets).astype(np.int32)
    return hidden, head, targets, weights


def chunked(hidden, head, targets, weights, chunk, further=PLAIN):
    columns, tokens = (chunk, chunk) if isinstance(chunk, int) else chunk
    parts = {"params/lm_head/kernel": head}
    return cross_entropy(unembed, parts, hidden, targets, weights, None, Chunks(columns, tokens), further)


def unembed(head, hidden, rng, numbers):
    return jnp.matmul(hidden, head["params/lm_head/kernel"], precision="highest")


def naive(hidden, head, targets, weights):
    log_probs = jax.nn.log_softmax(hidden @ head)
    return -jnp.sum(jnp.take_along_axis(log_probs, targets[..., None], axis=-1)[..., 0] * weights)


# (columns of 97, tokens of 39): neither divides, either is all, one at a time
CUTS = [(5, 4), (97, 39), (40, 13), (1, 39), (1000, 1000), (96, 1)]


@pytest.mark.parametrize("chunk", CUTS)
def test_sums_against_float64(case, chunk):
    hidden, head, targets, weights = case
    logits = hidden.astype(np.float64) @ head.astype(np.float64)
    log_probs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    entropies = -(np.exp(log_probs) * log_probs).sum(-1)
    expected = {
        "loss": -(np.take_along_axis(log_probs, targets[..., None], -1)[..., 0] * weights).sum(),
        "correct": ((logits.argmax(-1) == targets) * weights).sum(),
        "entropy": (entropies * weights).sum(),
    }
    expected["nll"] = expected["loss"]
    assert 1 < expected["correct"] < weights.sum() - 1
    totals = jax.jit(chunked, static_argnums=4)(*case, chunk)
    assert {name: total.dtype.name for name, total in totals.items()} == dict.fromkeys(expected, "float32")
    for name in expected:
        np.testing.assert_allclose(totals[name], expected[name], rtol=1e-6, err_msg=name)


@pytest.mark.parametrize("chunk", CUTS)
def test_gradients_against_full_logits(case, chunk):
    hidden, head, targets, weights = case
    expected = jax.jit(jax.grad(naive, argnums=(0, 1)))(*case)

    def loss(hidden, head):
        return chunked(hidden, head, targets, weights, chunk)["loss"]

    for ours, theirs in zip(jax.jit(jax.grad(loss, argnums=(0, 1)))(hidden, head), expected):
        assert np.abs(theirs).max() > 0.5
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5)


@pytest.mark.parametrize("further", [PLAIN, Further(0.1, 1e-2)])
@pytest.mark.parametrize("chunk", [(97, 39), (1000, 13), (40, 13)])
def test_a_frozen_head_costs_two_products_and_no_gradient_is_another(case, chunk, further):
    """Hidden's gradient is made with the loss, where all columns of a token are there: its logits are made once."""
    hidden, head, targets, weights = map(jnp.asarray, case)
    weights = weights * jnp.linspace(-1, 2, LENGTH)  # a factor of each token, of either sign

    def loss(hidden, head):
        return chunked(jnp.tanh(hidden), head, targets, weights, chunk, further)["loss"] ** 2

    def of_hidden(hidden):
        return jax.grad(loss)(hidden, head)

    def of_both(hidden):
        return jax.grad(loss, argnums=(0, 1))(hidden, head)[0]

    alone, beside = jax.jit(of_hidden)(hidden), jax.jit(of_both)(hidden)
    assert np.abs(alone).max() > 1
    np.testing.assert_allclose(alone, beside, rtol=0, atol=2e-5 * np.abs(beside).max())
    # A program has one body for all blocks, and of it as many products as there are in a token's loss.
    products = str(jax.make_jaxpr(of_hidden)(hidden)).count("dot_general")
    assert products == (2 if chunk[0] >= VOCAB else 4)
    assert str(jax.make_jaxpr(of_both)(hidden)).count("dot_general") == 4


@pytest.mark.parametrize("further", [Further(0.1, 0.0), Further(0.0, 1e-2), Further(0.2, 1e-3)])
@pytest.mark.parametrize("chunk", [(40, 13), (97, 39)])
def test_label_smoothing_and_z_loss_are_torchs(case, chunk, further):
    """Loss and gradients in float64, smoothing by torch.nn.functional; the cross-entropy alone stays what it is."""
    hidden, head, targets, weights = case
    theirs = [torch.tensor(array, dtype=torch.float64, requires_grad=True) for array in (hidden, head)]
    logits = (theirs[0] @ theirs[1]).reshape(-1, VOCAB)
    smoothing = {"reduction": "none", "label_smoothing": further.label_smoothing}
    losses = torch.nn.functional.cross_entropy(logits, torch.tensor(targets.reshape(-1)).long(), **smoothing)
    losses = losses + further.z_loss * logits.logsumexp(-1) ** 2
    expected = (losses * torch.tensor(weights.reshape(-1))).sum()
    expected.backward()

    def loss(hidden, head):
        totals = chunked(hidden, head, targets, weights, chunk, further)
        return totals["loss"], totals

    gradients, totals = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))(hidden, head)
    np.testing.assert_allclose(totals["loss"], expected.item(), rtol=1e-6)
    np.testing.assert_allclose(totals["nll"], naive(*case), rtol=1e-6)
    for ours, parameter in zip(gradients, theirs):
        np.testing.assert_allclose(ours, parameter.grad, rtol=0, atol=1e-5)


def test_the_sum_of_squared_probabilities_against_float64(case):
    """Where it is asked for; at logits whose exponentials are beyond float32. The loss is as without."""
    hidden, head, targets, weights = case
    logits = hidden.astype(np.float64) @ head.astype(np.float64)
    log_probs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    expected = np.log(np.exp(2 * log_probs).sum(-1)) * (weights != 0)

    def found(hidden, further):
        high = lambda *its: unembed(*its) + 200  # noqa: E731
        parts = {"params/lm_head/kernel": head}
        return per_token(high, Chunks(40, 13), further, parts, hidden, *map(jnp.asarray, (targets, weights != 0)), None)

    def of_squares(hidden):
        ours = found(hidden, Further(squares=True))
        return ours.log_squares.sum(), (ours, found(hidden, PLAIN))

    gradient, (ours, plain) = jax.jit(jax.grad(of_squares, has_aux=True))(hidden)
    np.testing.assert_allclose(ours.log_squares, expected, rtol=1e-5, atol=2e-5)
    assert np.abs(expected).max() > 0.5
    assert plain.log_squares is None
    np.testing.assert_array_equal(ours.loss, plain.loss)
    assert not np.any(gradient)


def test_fractional_weights(case):
    hidden, head, targets, weights = case
    weights = weights * np.linspace(0.1, 2, LENGTH, dtype=np.float32)
    ours = jax.jit(chunked, static_argnums=4)(hidden, head, targets, weights, 5)["loss"]
    np.testing.assert_allclose(ours, naive(hidden, head, targets, weights), rtol=1e-6)


def test_nothing_trained(case):
    hidden, head, targets, _ = case
    weights = np.zeros((BATCH, LENGTH), np.float32)

    def loss(hidden, head):
        totals = chunked(hidden, head, targets, weights, 5)
        return totals["loss"], totals

    gradients, totals = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))(hidden, head)
    assert {name: float(total) for name, total in totals.items()} == {"loss": 0, "correct": 0, "entropy": 0, "nll": 0}
    assert not any(np.any(leaf) for leaf in gradients)


def test_correct_and_entropy_have_no_gradient(case):
    hidden, head, targets, weights = case
    for name in ("correct", "entropy", "nll"):
        gradient = jax.jit(jax.grad(lambda hidden: chunked(hidden, head, targets, weights, 5)[name]))  # noqa: B023
        assert not np.any(gradient(hidden))


def test_no_array_holds_the_logits_of_all_positions(case):
    """The largest array of the whole program, backward pass included, is one chunk's logits."""
    hidden, head, targets, weights = case

    def sizes(loss):
        text = str(jax.make_jaxpr(jax.value_and_grad(loss, argnums=(0, 1)))(hidden, head))
        shapes = {tuple(map(int, shape.split(","))) for shape in re.findall(r"\[(\d+(?:,\d+)*)\]", text)}
        return {int(np.prod(shape)) for shape in shapes}

    full = BATCH * LENGTH * VOCAB
    assert full in sizes(lambda hidden, head: naive(hidden, head, targets, weights)), "this test can see them"
    chunk = sizes(lambda hidden, head: chunked(hidden, head, targets, weights, (32, 13))["loss"])
    assert 32 * 13 in chunk
    assert max(chunk) == head.size < full / 4, "nothing is larger than the head itself"
