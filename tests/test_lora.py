"""Adapter trees: what is adapted, how it starts, how it merges. Against peft: test_adapter_methods.py."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.family_configs import CONFIGS
from support.model_dirs import with_scale
from support.tiny import batch_of, documents, logits, numpy_params, one_device, spec

from ftjax import lora, tree
from ftjax.errors import UserError
from ftjax.models.decoder import Decoder
from ftjax.models.families import spec_from_config
from ftjax.models.params import abstract_params, logical_axes

MODEL = Decoder(spec(tie_word_embeddings=False))
AXES = logical_axes(MODEL)
KERNELS = [path for path in AXES if path.endswith("/kernel")]
RANK, ALPHA = 4, 12
DOCS = documents(8, [9, 6, 12])
BATCH = batch_of([[doc] for doc in DOCS], 12)


@pytest.fixture(scope="module")
def base():
    return numpy_params(MODEL)


def adapters_for(targets="all-linear", rank=RANK, rslora=False, seed=3):
    paths = lora.find_targets(targets, KERNELS)
    abstract = lora.abstract_adapters(abstract_params(MODEL, one_device()), AXES, paths, rank, one_device())
    return lora.init_adapters(abstract, seed, lora.scale(rank, ALPHA, rslora))


def with_random_b(adapters):
    """As after training: B of the size of the kernels."""
    rng = np.random.default_rng(9)
    leaves = tree.flatten(adapters)
    for path in [path for path in leaves if path.endswith("lora_b")]:
        leaves[path] = jnp.asarray(0.3 * rng.standard_normal(leaves[path].shape), jnp.float32)
    return tree.unflatten(leaves)


def is_scale(path):
    return path.endswith("lora_scale")


def test_fresh_adapters_leave_the_logits_alone(base):
    """B is zero, so adapted and base model are bit-identical; and without the collection there is no adapter at all."""
    adapters = adapters_for()
    plain = logits(MODEL, {"params": base}, BATCH)
    np.testing.assert_array_equal(logits(MODEL, {"params": base, "lora": adapters}, BATCH), plain)
    a = {path: leaf for path, leaf in tree.flatten(adapters).items() if path.endswith("lora_a")}
    assert len(a) == 7
    for path, leaf in a.items():
        assert np.std(leaf) == pytest.approx((3 * leaf.shape[-2]) ** -0.5, rel=0.2), path


def test_fresh_values_depend_on_seed_and_path_only():
    both, alone, other = (
        tree.flatten(tree_)
        for tree_ in (adapters_for(["q_proj", "k_proj"]), adapters_for(["q_proj"]), adapters_for(["q_proj"], seed=4))
    )
    path = "layers/self_attn/q_proj/lora_a"
    np.testing.assert_array_equal(both[path], alone[path])
    assert not np.array_equal(both[path], other[path])
    assert not np.array_equal(both[path], both["layers/self_attn/k_proj/lora_a"])
    assert not np.array_equal(both[path][0], both[path][1]), "layers differ"


def test_with_scale_completes_an_adapter_from_disk():
    adapters = with_random_b(adapters_for(["q_proj", "lm_head"]))
    _, matrices = tree.partition(adapters, is_scale)
    complete = with_scale(matrices, lora.scale(RANK, ALPHA, False))
    assert tree.flatten(complete).keys() == tree.flatten(adapters).keys()
    assert jax.tree.all(jax.tree.map(np.array_equal, complete, adapters))


def test_merge_keeps_the_dtype_and_every_other_leaf(base):
    half = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.bfloat16), base)
    adapters = with_random_b(adapters_for(["q_proj"]))
    merged = tree.flatten(lora.merge(half, adapters))
    for path, leaf in tree.flatten(half).items():
        assert merged[path].dtype == jnp.bfloat16
        assert np.array_equal(merged[path], leaf) == (path != "layers/self_attn/q_proj/kernel"), path


def test_scale():
    assert lora.scale(16, 32, rslora=False) == 2
    assert lora.scale(16, 32, rslora=True) == 8


LAYER_KERNELS = {path for path in KERNELS if path.startswith("layers/")}


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        ("all-linear", LAYER_KERNELS),
        (["q_proj", "v_proj"], {"layers/self_attn/q_proj/kernel", "layers/self_attn/v_proj/kernel"}),
        (("lm_head",), {"lm_head/kernel"}),
        ("mlp/(up|down)", {"layers/mlp/up_proj/kernel", "layers/mlp/down_proj/kernel"}),
        ("proj/kernel$", LAYER_KERNELS),
    ],
)
def test_targets(targets, expected):
    assert len(LAYER_KERNELS) == 7
    assert lora.find_targets(targets, KERNELS) == sorted(expected)


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (
            ["q_proj", "c_attn"],
            r"no linear layer named \['c_attn'\]; there are down_proj, gate_proj.*, q_proj, up_proj",
        ),
        ([], "adapter.targets is empty"),
        ("experts", r"adapter.targets='experts' matches no parameter.*layers/mlp/down_proj/kernel"),
        ("(", "adapter.targets='\\(' is not a regular expression"),
    ],
)
def test_targets_that_match_nothing_are_refused(targets, message):
    with pytest.raises(UserError, match=message):
        lora.find_targets(targets, KERNELS)


@pytest.mark.parametrize("rank", [0, -1])
def test_a_rank_that_is_none_is_refused(rank):
    with pytest.raises(UserError, match=rf"adapter.rank={rank} does not fit layers/.*/kernel.*; use 1 to \d+"):
        adapters_for(rank=rank)


def test_a_rank_above_the_width_of_a_layer_is_made_as_peft_makes_it():
    leaves = tree.flatten(adapters_for(["k_proj"], rank=17))  # of a kernel [32, 16]
    assert leaves["layers/self_attn/k_proj/lora_a"].shape[1:] == (32, 17)
    assert leaves["layers/self_attn/k_proj/lora_b"].shape[1:] == (17, 16)


def test_what_comes_out_of_mamba_is_adapted_only_where_it_is_named():
    adaptable = lora.adaptable(logical_axes(Decoder(spec_from_config(CONFIGS["granitemoehybrid"]))))
    every = lora.find_targets("all-linear", adaptable)
    assert {path for path in adaptable if "/mamba/in_proj/" in path} <= set(every)
    assert not any("/mamba/out_proj/" in path for path in every)
    assert len(lora.find_targets(["out_proj"], adaptable)) == 2


def test_targets_and_patterns_in_unlike_layers():
    """A name means every stack's; a pattern may mean one."""
    paths = list(logical_axes(Decoder(spec_from_config(CONFIGS["qwen3_moe, a dense layer first"]))))
    adaptable = lora.adaptable(paths)
    every = lora.find_targets("all-linear", adaptable)
    assert [path for path in every if "q_proj" in path] == [
        "layers/dense_0/self_attn/q_proj/kernel",
        "layers/sparse_1/self_attn/q_proj/kernel",
    ]
    assert [path for path in every if "/mlp/" in path] == [
        f"layers/dense_0/mlp/{name}_proj/kernel" for name in ("down", "gate", "up")
    ]
    assert lora.find_targets(["up_proj"], adaptable) == [
        "layers/dense_0/mlp/up_proj/kernel",
        "layers/sparse_1/mlp/experts/up_proj/kernel",
    ]
    assert lora.find_targets("dense_.*up_proj", adaptable) == ["layers/dense_0/mlp/up_proj/kernel"]
    ranks = lora.by_pattern(8, [("self_attn", 4), ("sparse_1/", 2)], every, "adapter.rank_pattern")
    assert ranks["layers/dense_0/self_attn/o_proj/kernel"] == 4
    assert ranks["layers/sparse_1/self_attn/o_proj/kernel"] == 2
    assert ranks["layers/dense_0/mlp/up_proj/kernel"] == 8
