"""The mixture of experts against a loop over tokens in float64 NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.family_configs import CONFIGS
from support.more_configs import MORE_CONFIGS
from support.tiny import numpy_params

from ftjax import lora
from ftjax.models.decoder import Decoder
from ftjax.models.families import spec_from_config
from ftjax.models.mlp import Mixture

NAMES = ("mixtral", "qwen3_moe", "gpt_oss", "mixtral, one expert", "qwen3_moe, not normalized, window")


@pytest.fixture(scope="module", params=NAMES)
def case(request):
    """(spec, (variables, x) -> what the module computes, its parameters in the first layer)"""
    spec = spec_from_config((CONFIGS | MORE_CONFIGS)[request.param])
    layers = numpy_params(Decoder(spec))["layers"]["mlp"]
    module = Mixture(spec, jnp.float32, jnp.float32)
    apply = jax.jit(lambda variables, x: module.apply(variables, x, jnp.ones(x.shape[:2], jnp.int32)))
    return spec, apply, jax.tree.map(lambda leaf: leaf[0], layers)


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
    spec, apply, params = case
    x = np.random.default_rng(0).standard_normal((2, 11, spec.hidden_size))
    ours = np.asarray(apply({"params": params}, jnp.asarray(x, jnp.float32)))
    expected = naive(spec, params, x.reshape(-1, spec.hidden_size)).reshape(x.shape)
    record_figure("difference", np.abs(ours - expected).max())
    assert np.abs(expected).max() > 0.5
    np.testing.assert_allclose(ours, expected, atol=1e-5)


def test_a_token_does_not_depend_on_the_tokens_beside_it(case):
    """However many want the same expert, none is dropped."""
    spec, apply, params = case
    x = np.random.default_rng(1).standard_normal((1, 1, spec.hidden_size)).astype(np.float32)
    alone = apply({"params": params}, x)
    crowd = apply({"params": params}, np.repeat(x, 40, axis=1))
    np.testing.assert_allclose(crowd, np.repeat(alone, 40, axis=1), atol=1e-6)


@pytest.fixture(scope="module")
def adapters(case):
    """Of every expert's every layer: A, B and scales, float32 NumPy."""
    _, _, params = case
    rng = np.random.default_rng(2)
    out = {}
    for name, stack in params["experts"].items():
        count, rows, columns = stack["kernel"].shape
        out[name] = {
            "lora_a": rng.standard_normal((count, rows, 3)) * rows**-0.5,
            "lora_b": rng.standard_normal((count, 3, columns)),
            "lora_scale": rng.uniform(0.3, 0.9, count),
        }
    return {"experts": jax.tree.map(np.float32, out)}


def adapted_in_float64(params, adapters):
    """Each expert's kernel plus its own scale A B."""
    experts = {}
    for name, stack in params["experts"].items():
        parts = adapters["experts"][name]
        a, b, scales = (np.float64(parts[part]) for part in ("lora_a", "lora_b", "lora_scale"))
        kernels = np.float64(stack["kernel"])
        whole = [kernel + scale * a[e] @ b[e] for e, (kernel, scale) in enumerate(zip(kernels, scales))]
        experts[name] = stack | {"kernel": np.stack(whole)}
    return params | {"experts": experts}


def test_every_expert_has_its_own_adapter(case, adapters, record_figure):
    spec, apply, params = case
    x = np.random.default_rng(3).standard_normal((2, 11, spec.hidden_size))
    ours = np.asarray(apply({"params": params, "lora": adapters}, jnp.asarray(x, jnp.float32)))
    flat = x.reshape(-1, spec.hidden_size)
    expected = naive(spec, adapted_in_float64(params, adapters), flat).reshape(x.shape)
    assert np.abs(expected - naive(spec, params, flat).reshape(x.shape)).max() > 0.5, "the adapters do something"
    record_figure("difference, relative to the largest value", np.abs(ours - expected).max() / np.abs(expected).max())
    np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def test_adapters_of_experts_merge_into_their_kernels(case, adapters, record_figure):
    spec, apply, params = case
    merged = lora.merge(params, adapters)
    for name, stack in adapted_in_float64(params, adapters)["experts"].items():
        np.testing.assert_allclose(merged["experts"][name]["kernel"], stack["kernel"], rtol=0, atol=1e-5)
    x = np.random.default_rng(3).standard_normal((2, 11, spec.hidden_size)).astype(np.float32)
    adapted = apply({"params": params, "lora": adapters}, x)
    difference = np.abs(apply({"params": merged}, x) - adapted).max() / np.abs(adapted).max()
    record_figure("difference, relative to the largest value", difference)
    assert difference < 1e-5


def test_the_gradients_of_an_experts_adapter_are_those_of_its_kernel(case, adapters, record_figure):
    """dL/dA = scale dL/dW B^T and dL/dB = scale A^T dL/dW, with the dL/dW of merged kernels; 0 for unused experts."""
    spec, apply, params = case
    x = jnp.asarray(np.random.default_rng(4).standard_normal((1, 2, spec.hidden_size)), jnp.float32)

    def total(variables):
        return jnp.sum(jnp.sin(apply(variables, x)))

    gradient = jax.jit(jax.grad(total))
    of_kernels = gradient({"params": lora.merge(params, adapters)})["params"]["experts"]
    found = gradient({"params": params, "lora": adapters})["lora"]["experts"]
    worst = 0.0
    for name, adapter in adapters["experts"].items():
        kernel = np.float64(of_kernels[name]["kernel"]) * adapter["lora_scale"][:, None, None]
        expected = {
            "lora_a": kernel @ np.swapaxes(adapter["lora_b"], 1, 2),
            "lora_b": np.swapaxes(adapter["lora_a"], 1, 2) @ kernel,
        }
        for part, value in expected.items():
            worst = max(worst, np.abs(found[name][part] - value).max() / np.abs(value).max())
    record_figure("gradients, relative to the largest", worst)
    assert worst < 1e-5
