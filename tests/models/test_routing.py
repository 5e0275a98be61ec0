"""Routers against a loop over tokens in float64 NumPy, and against DeepSeek V3's and Phi-3.5-MoE's in transformers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import AutoConfig
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter
from transformers.models.phimoe.modeling_phimoe import sparsemixer

from ftjax.models.routing import route
from ftjax.models.spec import Experts

EXPERTS = {
    "softmax": Experts(12, 3, False),
    "softmax, normalized": Experts(12, 3, True, scale=2.5),
    "softmax, corrected": Experts(12, 3, True, correction=True),
    "softmax, groups by their best": Experts(12, 3, False, groups=(4, 2), group_score="max", scale=16.0),
    "sigmoid": Experts(12, 3, False, score="sigmoid"),
    "sigmoid, corrected": Experts(12, 3, True, score="sigmoid", correction=True, scale=1.8),
    "sigmoid, corrected, groups": Experts(12, 3, True, score="sigmoid", correction=True, groups=(3, 2), scale=2.5),
}


def naive(logits, experts, correction):
    """float64 weights [N, experts], 0 for those that are not chosen."""
    out = np.zeros_like(logits)
    for n, row in enumerate(logits):
        scores = 1 / (1 + np.exp(-row)) if experts.score == "sigmoid" else np.exp(row) / np.exp(row).sum()
        liked = scores + correction if experts.correction else scores
        allowed = np.arange(experts.count)
        if experts.groups:
            groups, used = experts.groups
            members = np.split(allowed, groups)
            worth = [np.sort(liked[its])[-2 if experts.group_score == "top2" else -1 :].sum() for its in members]
            allowed = np.concatenate([members[group] for group in np.argsort(worth)[-used:]])
        chosen = sorted(allowed, key=lambda one: -liked[one])[: experts.per_token]
        total = scores[chosen].sum() if experts.normalize else 1.0
        out[n, chosen] = scores[chosen] / total * experts.scale
    return out


def spread(weights, chosen, count):
    """[N, per_token] and their experts -> [N, experts]"""
    return jnp.einsum("nk,nke->ne", weights, jax.nn.one_hot(chosen, count))


@pytest.mark.parametrize("experts", EXPERTS.values(), ids=EXPERTS.keys())
def test_equals_the_loop(experts, record_figure):
    rng = np.random.default_rng(0)
    logits, correction = rng.standard_normal((50, experts.count)), rng.standard_normal(experts.count) * 0.2
    given = jnp.asarray(correction, jnp.float32) if experts.correction else None
    weights, chosen = route(jnp.asarray(logits, jnp.float32), experts, given)
    expected = naive(logits, experts, correction)
    difference = np.abs(spread(weights, chosen, experts.count) - expected).max()
    record_figure("difference", difference)
    assert difference < 1e-5
    if experts.correction:
        plain = naive(logits, experts, np.zeros_like(correction))
        assert ((plain > 0) != (expected > 0)).any(), "the correction changes who is chosen"


@pytest.mark.parametrize("normalize", [True, False], ids=["normalized", "not normalized"])
def test_equals_transformers_with_its_gradients(normalize, record_figure):
    names = {"n_routed_experts": 12, "num_experts_per_tok": 3, "n_group": 3, "topk_group": 2}
    sizes = {"hidden_size": 12, "routed_scaling_factor": 2.5, "norm_topk_prob": normalize}
    router = DeepseekV3TopkRouter(AutoConfig.for_model("deepseek_v3", **names, **sizes)).double()
    rng = np.random.default_rng(1)
    correction, logits = rng.standard_normal(12) * 0.2, rng.standard_normal((40, 12))
    factors = rng.standard_normal((40, 12))
    with torch.no_grad():
        router.weight.copy_(torch.eye(12))
        router.e_score_correction_bias.copy_(torch.from_numpy(correction))
    theirs = torch.tensor(logits, requires_grad=True)
    _, weights, chosen = router(theirs)
    expected = torch.zeros(40, 12, dtype=torch.float64).scatter(1, chosen, weights.double())
    (expected * torch.from_numpy(factors)).sum().backward()

    experts = Experts(12, 3, normalize, score="sigmoid", correction=True, groups=(3, 2), scale=2.5)

    def total(logits, correction):
        ours = spread(*route(logits, experts, correction), 12)
        return (ours * factors).sum(), ours

    given = jnp.asarray(logits, jnp.float32), jnp.asarray(correction, jnp.float32)
    (gradient, of_correction), ours = jax.grad(total, argnums=(0, 1), has_aux=True)(*given)
    difference = np.abs(ours - expected.detach().numpy()).max()
    record_figure("weights", difference)
    record_figure("gradients", np.abs(gradient - theirs.grad.numpy()).max())
    assert difference < 1e-5
    np.testing.assert_allclose(gradient, theirs.grad.numpy(), atol=1e-5)
    assert not of_correction.any()


@pytest.mark.parametrize("slack", [0.01, 0.3], ids=["few near", "many near"])
def test_sparsemixer_equals_transformers_with_its_gradients(slack, record_figure):
    rng = np.random.default_rng(2)
    logits, factors = rng.standard_normal((60, 8)) + 1, rng.standard_normal((60, 8))
    logits[:10] -= 5  # all below zero, where what is far is measured by the logit's own size
    theirs = torch.tensor(logits, requires_grad=True)
    weights, chosen = sparsemixer(theirs, slack, training=False)
    expected = torch.zeros(60, 8, dtype=torch.float64).scatter(1, chosen, weights)
    (expected * torch.from_numpy(factors)).sum().backward()

    experts = Experts(8, 2, False, score="sparsemixer", slack=slack)

    def total(logits):
        ours = spread(*route(logits, experts), 8)
        return (ours * factors).sum(), ours

    gradient, ours = jax.grad(total, has_aux=True)(jnp.asarray(logits, jnp.float32))
    record_figure("weights", np.abs(ours - expected.detach().numpy()).max())
    record_figure("gradients", np.abs(gradient - theirs.grad.numpy()).max())
    np.testing.assert_allclose(ours, expected.detach().numpy(), atol=1e-5)
    np.testing.assert_allclose(gradient, theirs.grad.numpy(), atol=1e-5)
    near = np.sum(expected.detach().numpy() * (expected.detach().numpy() < 1), axis=1) > 0
    assert near.any(), "some experts share with others"
