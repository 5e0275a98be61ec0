"""The mixture of experts against a loop over tokens in float64 NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from family_configs import CONFIGS, MORE_CONFIGS
from tiny import numpy_params

from ftjax.models.decoder import Decoder
from ftjax.models.families import spec_from_config
from ftjax.models.mlp import Mixture

NAMES = ("mixtral", "qwen3_moe", "gpt_oss", "mixtral, one expert", "qwen3_moe, not normalised, window")


@pytest.fixture(scope="module", params=NAMES)
def case(request):
    """(spec, the module, its parameters in the first layer)"""
    spec = spec_from_config((CONFIGS | MORE_CONFIGS)[request.param])
    layers = numpy_params(Decoder(spec))["layers"]["mlp"]
    return spec, Mixture(spec, jnp.float32, jnp.float32), jax.tree.map(lambda leaf: leaf[0], layers)


def naive(spec, params, x):
    """x float64 [N, D]"""
    kernels = params["experts"]
    out = np.zeros_like(x)
    for n, token in enumerate(x):
        logits = token @ params["router"]["kernel"] + params["router"].get("bias", 0)
        shares = np.exp(logits - logits.max())
        shares = shares / shares.sum()
        chosen = np.argsort(-shares)[: spec.experts.per_token]
        total = shares[chosen].sum() if spec.experts.normalize else 1
        for e in chosen:
            def project(name, value, e=e):
                return value @ kernels[name]["kernel"][e] + kernels[name].get("bias", np.zeros((99, 1)))[e]

            if spec.swiglu_clamp:
                alpha, limit = spec.swiglu_clamp
                both = project("gate_up_proj", token)
                gate, up = np.minimum(both[::2], limit), np.clip(both[1::2], -limit, limit)
                inner = gate / (1 + np.exp(-alpha * gate)) * (up + 1)
            else:
                gate = project("gate_proj", token)
                inner = gate / (1 + np.exp(-gate)) * project("up_proj", token)
            out[n] += shares[e] / total * project("down_proj", inner)
    return out


def test_equals_the_loop(case, record_figure):
    spec, module, params = case
    x = np.random.default_rng(0).standard_normal((2, 11, spec.hidden_size))
    ours = np.asarray(module.apply({"params": params}, jnp.asarray(x, jnp.float32)))
    expected = naive(spec, params, x.reshape(-1, spec.hidden_size)).reshape(x.shape)
    record_figure("difference", np.abs(ours - expected).max())
    assert np.abs(expected).max() > 0.5
    np.testing.assert_allclose(ours, expected, atol=1e-5)


def test_a_token_does_not_depend_on_the_tokens_beside_it(case):
    """However many want the same expert, none is dropped."""
    spec, module, params = case
    x = np.random.default_rng(1).standard_normal((1, 1, spec.hidden_size)).astype(np.float32)
    alone = module.apply({"params": params}, x)
    crowd = module.apply({"params": params}, np.repeat(x, 40, axis=1))
    np.testing.assert_allclose(crowd, np.repeat(alone, 40, axis=1), atol=1e-6)
