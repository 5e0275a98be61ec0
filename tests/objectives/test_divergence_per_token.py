"""The divergence that distillation minimizes, of two models of different widths: against float64 and torch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from ftjax.objectives.divergence import Between, divergence_per_token
from ftjax.objectives.parts import Chunks

BATCH, LENGTH, WIDTH, THEIR_WIDTH, VOCAB = 2, 11, 8, 12, 53


def unembed(head, hidden, rng, numbers):
    return jnp.matmul(hidden, head["params/lm_head/kernel"], precision="highest")


@pytest.fixture(scope="module")
def case():
    """hidden, head, those of the other model, and which tokens are wanted."""
    rng = np.random.default_rng(1)
    shapes = [(BATCH, LENGTH, WIDTH), (WIDTH, VOCAB), (BATCH, LENGTH, THEIR_WIDTH), (THEIR_WIDTH, VOCAB)]
    arrays = [np.asarray(rng.standard_normal(shape) * 0.7, np.float32) for shape in shapes]
    return arrays, rng.random((BATCH, LENGTH)) < 0.6


def found(arrays, wanted, beta, weights, chunk=(20, 5)):
    """(divergence, entropy, the gradients of the weighted sum with respect to hidden and head)"""
    hidden, head, their_hidden, their_head = map(jnp.asarray, arrays)

    def total(hidden, head):
        parts = [{"params/lm_head/kernel": one} for one in (head, their_head)]
        how = Between(unembed, unembed, beta)
        value, entropy = divergence_per_token(
            how, Chunks(*chunk), parts[0], hidden, parts[1], their_hidden, wanted, None
        )
        return (value * weights).sum(), (value, entropy)

    wanted = jnp.asarray(wanted)
    (_, both), slopes = jax.jit(jax.value_and_grad(total, argnums=(0, 1), has_aux=True))(hidden, head)
    return *both, slopes


def log_probabilities(arrays):
    """float64 log q and log p"""
    exact = [np.asarray(array, np.float64) for array in arrays]
    logits = exact[0] @ exact[1], exact[2] @ exact[3]
    return [one - np.log(np.exp(one).sum(-1, keepdims=True)) for one in logits]


def kl(log_p, log_q):
    return (np.exp(log_p) * (log_p - log_q)).sum(-1)


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_values_against_float64_and_gradients_against_torch(case, beta):
    arrays, wanted = case
    weights = np.linspace(0.5, 2, BATCH * LENGTH).reshape(BATCH, LENGTH).astype(np.float32)
    value, entropy, slopes = found(arrays, wanted, beta, weights)
    ours, theirs = log_probabilities(arrays)
    mixed = np.log(beta * np.exp(theirs) + (1 - beta) * np.exp(ours))
    expected = beta * kl(theirs, mixed) + (1 - beta) * kl(ours, mixed)
    expected = {0.0: kl(theirs, ours), 1.0: kl(ours, theirs)}.get(beta, expected)
    np.testing.assert_allclose(value, expected * wanted, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(entropy, -(np.exp(ours) * ours).sum(-1) * wanted, rtol=1e-5, atol=1e-6)

    hidden, head = (torch.tensor(np.asarray(array, np.float64), requires_grad=True) for array in arrays[:2])
    log_q, log_p = torch.log_softmax(hidden @ head, -1), torch.tensor(theirs)
    log_m = torch.log(beta * log_p.exp() + (1 - beta) * log_q.exp())
    parts = beta * log_p.exp() * (log_p - log_m) + (1 - beta) * log_q.exp() * (log_q - log_m)
    parts = {0.0: log_p.exp() * (log_p - log_q), 1.0: log_q.exp() * (log_q - log_p)}.get(beta, parts)
    (parts.sum(-1) * torch.tensor(wanted * weights)).sum().backward()
    for gradient, tensor in zip(slopes, (hidden, head), strict=True):
        np.testing.assert_allclose(gradient, tensor.grad, rtol=1e-5, atol=1e-5 * float(tensor.grad.abs().max()))


def test_towards_its_ends_it_is_the_two_divergences(case):
    """It vanishes there, as beta KL(p || q) and (1 - beta) KL(q || p)."""
    (hidden, head, their_hidden, their_head), wanted = case
    # Near each other, so that no p / q is as large as 1 / beta.
    arrays = [0.4 * hidden, head, 0.4 * their_hidden, their_head]
    ones = np.ones((BATCH, LENGTH), np.float32)
    for end, near, share in ((0.0, 2e-4, 2e-4), (1.0, 1 - 2e-4, 2e-4)):
        value, _, slopes = found(arrays, wanted, end, ones)
        beside, _, their_slopes = found(arrays, wanted, near, ones)
        assert np.asarray(value)[wanted].min() > 0.02
        np.testing.assert_allclose(np.asarray(beside)[wanted] / share, np.asarray(value)[wanted], rtol=0.02)
        for one, other in zip(their_slopes, slopes, strict=True):
            assert np.abs(one / share - other).max() < 0.03 * np.abs(other).max()


@pytest.mark.slow
@pytest.mark.parametrize("beta", [0.0, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_trl_has_the_same(case, beta, temperature, monkeypatch):
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    from trl.experimental.gkd import GKDTrainer

    arrays, wanted = case
    count = wanted.sum()
    scaled = [arrays[0] / temperature, arrays[1], arrays[2] / temperature, arrays[3]]
    value, _, slopes = found(scaled, wanted, beta, np.full((BATCH, LENGTH), 1 / count, np.float32))
    hidden, head = (torch.tensor(array, requires_grad=True) for array in arrays[:2])
    labels = torch.tensor(np.where(wanted, 1, -100))
    theirs = torch.tensor(arrays[2]) @ torch.tensor(arrays[3])
    loss = GKDTrainer.generalized_jsd_loss(hidden @ head, theirs, labels, beta=beta, temperature=temperature)
    loss.backward()
    np.testing.assert_allclose(np.asarray(value).sum() / count, loss.item(), rtol=1e-5)
    np.testing.assert_allclose(np.asarray(slopes[0]) / temperature, hidden.grad, rtol=1e-5, atol=1e-6)
