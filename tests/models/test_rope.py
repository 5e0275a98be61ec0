"""Rotary frequencies of every kind against those that transformers computes for the same config."""

import copy

import jax.numpy as jnp
import numpy as np
import pytest
from support.family_configs import CONFIGS
from support.more_configs import MORE_CONFIGS
from transformers import AutoConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from ftjax.models.families import spec_from_config
from ftjax.models.published import configs
from ftjax.models.rope import rotary_tables, rotate, sequence_lengths
from ftjax.models.spec import Rope

# Families with several ropes, or a kind of their own, which transformers has no function for.
OTHERS = ("gemma3_text", "gemma3n_text", "gemma4_text", "olmo3", "hunyuan_v1_dense", "hunyuan_v1_moe", "qwen2_5_vl")


def is_scaled(config):
    given = config.get("rope_scaling") or config.get("rope_parameters") or {"rope_type": "default"}
    return given.get("rope_type") != "default" and config["model_type"] not in OTHERS


SCALED = {name: config for name, config in (CONFIGS | MORE_CONFIGS | configs()).items() if is_scaled(config)}


def test_proportional_frequencies_are_those_of_transformers():
    config = CONFIGS["gemma4"]
    fields = copy.deepcopy({name: value for name, value in config.items() if name != "model_type"})
    theirs = AutoConfig.for_model(config["model_type"], **fields)
    expected, _ = ROPE_INIT_FUNCTIONS["proportional"](theirs, "cpu", layer_type="full_attention")
    ours = spec_from_config(config).ropes[0].frequencies
    np.testing.assert_allclose(ours, expected.numpy(), rtol=5e-7, atol=0)
    assert [frequency > 0 for frequency in ours] == [True] * 3 + [False] * 3


@pytest.mark.parametrize("config", SCALED.values(), ids=SCALED.keys())
def test_scaled_frequencies_are_those_of_transformers(config, record_figure):
    (rope,) = spec_from_config(config).ropes
    # A copy: transformers writes into the dicts that it is given.
    fields = copy.deepcopy({name: value for name, value in config.items() if name != "model_type"})
    theirs = AutoConfig.for_model(config["model_type"], **fields)
    compute = ROPE_INIT_FUNCTIONS[theirs.rope_parameters["rope_type"]]
    expected, scale = compute(theirs, "cpu")
    scale = theirs.rope_parameters.get("short_mscale", scale)  # Phi-3.5-MoE has one of its own
    assert rope.scale == pytest.approx(scale, rel=1e-7)
    pairs = [(rope.frequencies, expected)]
    if rope.long_frequencies is not None:
        pairs.append((rope.long_frequencies, compute(theirs, "cpu", seq_len=rope.long_after + 1)[0]))
    for ours, torch_frequencies in pairs:
        error = np.abs(np.asarray(ours) / torch_frequencies.double().numpy() - 1).max()
        record_figure("relative difference", error)
        assert error < 5e-7  # float32 has 1.2e-7


def test_lengths_are_those_of_each_token_s_own_document():
    segments = np.array([[1, 1, 1, 2, 2, 0], [0, 0, 3, 3, 3, 3]], np.int32)
    positions = np.array([[0, 1, 2, 0, 1, 0], [0, 0, 0, 1, 2, 3]], np.int32)
    lengths = np.asarray(sequence_lengths(jnp.asarray(positions), jnp.asarray(segments)))
    assert lengths[0, :5].tolist() == [3, 3, 3, 2, 2]
    assert lengths[1, 2:].tolist() == [4, 4, 4, 4]


def test_long_frequencies_are_used_by_long_documents_alone():
    rope = Rope((1.0,), scale=2.0, long_frequencies=(0.25,), long_after=3)
    positions = jnp.asarray([[0, 1, 2, 3], [0, 1, 2, 0]])
    reach = jnp.asarray([[4, 4, 4, 4], [3, 3, 3, 1]])
    cos, sin = rotary_tables((rope,), positions, reach)
    np.testing.assert_allclose(sin[0, 0, :, 0], 2 * np.sin([0, 0.25, 0.5, 0.75]), rtol=1e-6)
    np.testing.assert_allclose(cos[0, 1, :, 0], 2 * np.cos([0, 1, 2, 0]), rtol=1e-6)


def test_only_the_first_dimensions_of_a_head_are_turned():
    x = np.random.default_rng(0).standard_normal((1, 3, 2, 10)).astype(np.float32)
    cos, sin = rotary_tables((Rope((1.0, 0.5, 0.1)),), jnp.arange(3)[None], None)
    turned = np.asarray(rotate(jnp.asarray(x), cos[0], sin[0]))
    np.testing.assert_array_equal(turned[..., 6:], x[..., 6:])
    np.testing.assert_array_equal(turned[:, 0], x[:, 0])
    pairs, before = turned[..., :3] + 1j * turned[..., 3:6], x[..., :3] + 1j * x[..., 3:6]
    angles = np.arange(3)[:, None, None] * np.array([1.0, 0.5, 0.1])
    np.testing.assert_allclose(pairs, before * np.exp(1j * angles), atol=1e-6)
