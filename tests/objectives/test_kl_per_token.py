"""KL to a reference over the whole vocabulary, in pieces: against float64, and its gradients against torch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from support.tiny import batch_of, documents, logits, numpy_params, spec

from ftjax import config as configs
from ftjax.models.decoder import Decoder
from ftjax.objectives.divergence import kl_per_token
from ftjax.objectives.parts import Chunks
from ftjax.objectives.reference import REFERENCE
from ftjax.objectives.sft import make_sft

BATCH, LENGTH, WIDTH, VOCAB = 3, 13, 8, 97


def unembed(head, hidden, rng, numbers):
    return jnp.matmul(hidden, head["params/lm_head/kernel"], precision="highest")


@pytest.fixture(scope="module")
def case():
    """hidden, head, those of the reference, and which tokens are wanted: in the second row none."""
    rng = np.random.default_rng(0)
    arrays = [rng.standard_normal(shape) for shape in [(BATCH, LENGTH, WIDTH), (WIDTH, VOCAB)] * 2]
    wanted = rng.random((BATCH, LENGTH)) < 0.6
    wanted[1] = False
    return [jnp.asarray(array, jnp.float32) for array in arrays], jnp.asarray(wanted)


def log_softmax(logits):
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


# (columns of 97, tokens of 39): neither divides, either is all, one at a time
@pytest.mark.parametrize("chunk", [(5, 4), (97, 39), (40, 13), (96, 1)])
def test_values_against_float64_and_gradients_against_torch(case, chunk):
    (hidden, head, their_hidden, their_head), wanted = case
    weights = np.linspace(0.5, 2, BATCH * LENGTH).reshape(BATCH, LENGTH).astype(np.float32)

    def total(hidden, head):
        parts = [{"params/lm_head/kernel": one} for one in (head, their_head)]
        kl = kl_per_token(unembed, Chunks(*chunk), parts[0], hidden, parts[1], their_hidden, wanted, None)
        return (kl * weights).sum(), kl

    (_, kl), found = jax.jit(jax.value_and_grad(total, argnums=(0, 1), has_aux=True))(hidden, head)
    exact = [np.asarray(array, np.float64) for array in (hidden, head, their_hidden, their_head)]
    ours, theirs = log_softmax(exact[0] @ exact[1]), log_softmax(exact[2] @ exact[3])
    expected = (np.exp(theirs) * (theirs - ours)).sum(-1) * np.asarray(wanted)
    assert expected.max() > 1
    np.testing.assert_allclose(kl, expected, rtol=1e-5, atol=1e-6)

    tensors = [torch.tensor(array, requires_grad=True) for array in exact[:2]]
    witness = torch.nn.functional.kl_div(
        torch.log_softmax(tensors[0] @ tensors[1], -1), torch.tensor(theirs), reduction="none", log_target=True
    )
    (witness.sum(-1) * torch.tensor(np.asarray(wanted * weights))).sum().backward()
    for gradient, tensor in zip(found, tensors, strict=True):
        np.testing.assert_allclose(gradient, tensor.grad, rtol=0, atol=2e-5)


def test_no_gradient_and_no_divergence_where_both_are_the_same(case):
    """At logits whose exponentials are beyond float32, those of tokens that are not wanted too."""
    (hidden, head, *_), wanted = case
    parts = {"params/lm_head/kernel": head}

    def total(ours):
        high = lambda *its: unembed(*its) + 200  # noqa: E731
        return kl_per_token(high, Chunks(40, 13), parts, ours, parts, hidden, wanted, None).sum()

    value, gradient = jax.jit(jax.value_and_grad(total))(hidden)
    assert abs(value) < 1e-4
    assert np.abs(gradient).max() < 1e-6


def test_replayed_documents_count_their_kl_and_the_others_their_cross_entropy():
    """In packed rows; the reference is the initial value of what is trained, here of all."""
    model = Decoder(spec())
    policy, before = numpy_params(model), numpy_params(model, seed=1)
    docs = documents(0, [9, 4, 6, 5])
    batch = batch_of([docs[:2], docs[2:]], 14)
    batch["replay"] = np.zeros((2, 14), np.float32)
    batch["replay"][0, 9:13] = batch["replay"][1, :6] = 1
    config = configs.defaults().objective
    config.kl_coef = 0.7
    variables = {"params": policy, REFERENCE: {"params": before}}
    objective = jax.jit(lambda variables, batch: make_sft(model, config)(variables, batch, None))
    loss = objective(variables, batch)

    ours, theirs = (
        log_softmax(logits(model, {"params": params}, batch).astype(np.float64)) for params in (policy, before)
    )
    new = batch["weights"] * (1 - batch["replay"])
    old = batch["weights"] * batch["replay"]
    assert min(new.sum(), old.sum()) > 4
    nll = -(np.take_along_axis(ours, batch["targets"][..., None], -1)[..., 0] * new).sum()
    kl = ((np.exp(theirs) * (theirs - ours)).sum(-1) * old).sum()
    np.testing.assert_allclose(loss.sum, nll + 0.7 * kl, rtol=1e-5)
    assert float(loss.weight) == new.sum() + old.sum()
    np.testing.assert_allclose(loss.metrics["kl"], (kl, old.sum()), rtol=1e-5)
    np.testing.assert_allclose(loss.metrics["cross_entropy"], (nll, new.sum()), rtol=1e-5)
    # Split in two, it is the same sum: what a micro-batch has decides its part of it.
    halves = [objective(variables, {name: array[i : i + 1] for name, array in batch.items()}) for i in range(2)]
    np.testing.assert_allclose(sum(float(half.sum) for half in halves), loss.sum, rtol=1e-5)
    assert sum(float(half.weight) for half in halves) == float(loss.weight)
