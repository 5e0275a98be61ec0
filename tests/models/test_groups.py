"""How layers are cut into scans, how their parameters are called, and that depth costs no compile time."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from support.family_configs import CONFIGS
from support.tiny import one_device, spec

from ftjax.models.cache import init_cache
from ftjax.models.decoder import Decoder
from ftjax.models.families import spec_from_config
from ftjax.models.groups import groups, nested, stack_of, stacks
from ftjax.models.params import abstract_params, shapes
from ftjax.models.spec import Kind
from ftjax.weights.hf.keys import hf_names

KINDS = {
    "S": Kind("sparse"),
    "D": Kind("dense", (("intermediate_size", 16),)),
    "F": Kind("full", (("qkv_bias", True),)),
}


def cut(kinds):
    """{path of a stack: its layers} of a decoder with a layer for each letter."""
    wanted = spec(num_hidden_layers=len(kinds)).with_kinds([KINDS[letter] for letter in kinds])
    found = {stack.path: stack.layers for stack in stacks(wanted)}
    assert sorted(layer for layers in found.values() for layer in layers) == list(range(len(kinds)))
    return found


@pytest.mark.parametrize(
    ("kinds", "expected"),
    [
        ("SSSS", {"layers": (0, 1, 2, 3)}),
        ("D", {"layers": (0,)}),
        ("DSSSS", {"layers/dense_0": (0,), "layers/sparse_1": (1, 2, 3, 4)}),
        ("DDDSS", {"layers/dense_0": (0, 1, 2), "layers/sparse_3": (3, 4)}),
        ("DSDSDS", {"layers/dense_0": (0, 2, 4), "layers/sparse_1": (1, 3, 5)}),
        ("DS", {"layers/dense_0": (0,), "layers/sparse_1": (1,)}),
        (
            "SSSFSSSF",
            {"layers/sparse_0": (0, 4), "layers/sparse_1": (1, 5), "layers/sparse_2": (2, 6), "layers/full_3": (3, 7)},
        ),
        (
            "DDSFSFSF",
            {
                "layers/dense_0": (0, 1),
                "layers/period_2/sparse_2": (2, 4, 6),
                "layers/period_2/full_3": (3, 5, 7),
            },
        ),
        (
            "SDSSSD",
            {
                "layers/sparse_0": (0,),
                "layers/dense_1": (1,),
                "layers/sparse_2": (2, 3, 4),
                "layers/dense_5": (5,),
            },
        ),
    ],
)
def test_the_cut_has_the_fewest_bodies(kinds, expected):
    assert cut(kinds) == expected


def test_as_many_bodies_however_often_a_pattern_comes():
    for rounds in (2, 7, 40):
        assert len(cut("D" + "SSSF" * rounds)) == 5
        assert len(cut("DDD" + "S" * rounds)) == 2
    assert len(cut("SSDSFD")) == 5  # and no more than there are runs


def test_a_stack_is_described_by_what_its_layers_have_alone():
    wanted = spec(num_hidden_layers=4).with_kinds([KINDS[letter] for letter in "DSSS"])
    wanted = dataclasses.replace(wanted, layer_windows=(None, 5, 6, 7))
    dense, sparse = stacks(wanted)
    assert (dense.spec.num_hidden_layers, dense.spec.intermediate_size, dense.spec.layer_windows) == (1, 16, (None,))
    assert (sparse.spec.num_hidden_layers, sparse.spec.intermediate_size) == (3, wanted.intermediate_size)
    assert sparse.spec.layer_windows == (5, 6, 7)
    assert dense.spec.layer_kinds == sparse.spec.layer_kinds == ()
    assert wanted.of_layers(range(1, 4)) == sparse.spec
    assert wanted.of_layers(range(2)).layer_kinds == wanted.layer_kinds[:2]
    assert stack_of(wanted, "layers/dense_0/mlp/up_proj/kernel") == dense
    assert stack_of(wanted, "embed_tokens/embedding") is None
    assert nested(wanted, lambda stack: stack.name) == ("dense_0", "sparse_1")
    assert nested(spec(), lambda stack: stack.path) == "layers"


def test_equal_decoders_are_equal_specs():
    plain = spec(num_hidden_layers=3)
    assert plain.with_kinds([KINDS["S"]] * 3) == plain
    assert plain.with_kinds([KINDS["D"]] * 3) == spec(num_hidden_layers=3, intermediate_size=16)
    [group] = groups(plain)
    assert [stack.spec for stack in group.stacks] == [plain]
    every = CONFIGS["qwen3_moe"] | {"mlp_only_layers": [0, 1, 2]}
    assert spec_from_config(every).experts is None
    assert spec_from_config(every).intermediate_size == every["intermediate_size"]
    assert spec_from_config(every).layer_kinds == ()


def test_heads_may_be_a_kinds_own():
    """Any field may: parameters and cache have the stack's own sizes."""
    wide = Kind("wide", (("head_dim", 16), ("num_key_value_heads", 1)))
    wanted = spec(num_hidden_layers=4).with_kinds([KINDS["S"], wide] * 2)
    model, tokens = Decoder(wanted), jnp.ones((1, 5), jnp.int32)
    params = abstract_params(model, one_device())
    found = shapes(model)
    assert found["layers/wide_1/self_attn/k_proj/kernel"] == (2, 32, 16)
    assert found["layers/sparse_0/self_attn/k_proj/kernel"] == (2, 32, 16)
    assert found["layers/wide_1/self_attn/q_proj/kernel"] == (2, 32, 64)
    assert hf_names(wanted)["layers/wide_1/self_attn/q_proj/kernel"].names() == [
        "model.layers.1.self_attn.q_proj.weight",
        "model.layers.3.self_attn.q_proj.weight",
    ]
    cache = jax.eval_shape(lambda: init_cache(wanted, 1, 8, jnp.float32))
    assert [keys.shape for keys in cache.keys] == [(2, 1, 2, 8, 8), (2, 1, 1, 8, 16)]
    apply = lambda params, cache: model.apply({"params": params}, tokens, tokens, tokens, cache)[1]  # noqa: E731
    assert jax.eval_shape(apply, params, cache) == cache


@pytest.mark.parametrize("kinds", ["DSS", "DSDS", "DSFSF"], ids=["prefix", "period", "period after a layer"])
def test_the_program_does_not_grow_with_depth(kinds):
    """As many StableHLO operations in the gradient, and in a step of decoding, of many layers as of few."""
    sparse = spec_from_config(CONFIGS["qwen3_moe"])

    def operations(letters):
        own = {"D": Kind("dense", (("experts", None),)), "S": Kind("sparse"), "F": Kind("full", (("qkv_bias", True),))}
        model = dataclasses.replace(sparse.of_layers([0]), num_hidden_layers=len(letters))
        repeated = {
            name: getattr(model, name) * len(letters) for name in ("layer_ropes", "layer_windows", "attention_scales")
        }
        model = dataclasses.replace(model, **repeated).with_kinds([own[letter] for letter in letters])
        model, tokens = Decoder(model, remat="full"), jnp.zeros((2, 8), jnp.int32)
        params = abstract_params(model, one_device())

        def total(params):
            return model.apply({"params": params}, tokens, tokens, tokens)[0].sum()

        def decode(params, cache):
            return model.apply({"params": params}, tokens[:, :1], tokens[:, :1], tokens[:, :1], cache)

        cache = jax.eval_shape(lambda: init_cache(model.spec, 2, 16, jnp.float32))
        texts = jax.jit(jax.grad(total)).lower(params), jax.jit(decode).lower(params, cache)
        return [text.as_text().count(" = ") for text in texts]

    shallow = operations(kinds)
    assert min(shallow) > 100
    assert operations(kinds + kinds[-2:] * 6) == shallow
