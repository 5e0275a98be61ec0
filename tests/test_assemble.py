"""From config to variables: what is trained, in which dtype, and where an adapter goes."""

import jax
import jax.numpy as jnp
import pytest
from support.tiny import one_device, spec

from ftjax import config as configs
from ftjax import tree
from ftjax.assemble import abstract_variables
from ftjax.models.decoder import Decoder


def variables(**changes):
    config = configs.defaults()
    config.update_from_flattened_dict(changes)
    model = Decoder(spec(), jnp.bfloat16, jnp.bfloat16)
    abstract, is_trained = abstract_variables(config, model, one_device())
    trained, frozen = tree.partition(abstract, is_trained)
    return tree.flatten(trained), tree.flatten(frozen)


def dtypes(leaves):
    return {str(leaf.dtype) for leaf in leaves.values()}


def test_lora_trains_float32_adapters_beside_a_bfloat16_base():
    trained, frozen = variables(**{"adapter.rank": 4})
    assert {path.rsplit("/", 1)[1] for path in trained} == {"lora_a", "lora_b"}
    assert dtypes(trained) == {"float32"}
    assert dtypes({path: leaf for path, leaf in frozen.items() if path.startswith("params/")}) == {"bfloat16"}


def test_without_an_adapter_what_is_chosen_becomes_float32_and_the_rest_stays():
    trained, frozen = variables(**{"adapter.kind": "none", "adapter.trainable": "layers/mlp"})
    assert set(trained) == {f"params/layers/mlp/{name}_proj/kernel" for name in ("gate", "up", "down")}
    assert dtypes(trained) == {"float32"}
    assert dtypes(frozen) == {"bfloat16"}


@pytest.mark.parametrize("targets", ["q_proj,v_proj", "self_attn/[qv]_proj"])
def test_targets_by_name_and_by_pattern(targets):
    trained, _ = variables(**{"adapter.rank": 4, "adapter.targets": targets})
    assert {path.split("/")[3] for path in trained} == {"q_proj", "v_proj"}
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in trained.values())
