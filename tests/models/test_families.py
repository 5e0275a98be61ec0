"""From `config.json` to a DecoderSpec, and what is refused on the way."""

import pytest
from tiny import spec

from ftjax.errors import UserError
from ftjax.models.families import spec_from_config

CONFIG = {
    "model_type": "llama",
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
    "max_position_embeddings": 64,
}


def test_defaults_of_what_a_config_leaves_out():
    assert spec_from_config(CONFIG) == spec()
    without = {name: value for name, value in CONFIG.items() if name != "num_key_value_heads"}
    assert spec_from_config(without).num_key_value_heads == 4


@pytest.mark.parametrize(
    "rope", [{"rope_theta": 5e5}, {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}]
)
def test_theta_of_old_and_new_configs(rope):
    assert spec_from_config(CONFIG | rope).rope_theta == 5e5


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"model_type": "mamba"}, "'mamba'; there are: llama"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "rope_type='llama3'"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_type='linear'"),
        ({"attention_bias": True}, "attention_bias"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ({"num_key_value_heads": 3}, "not a multiple"),
        ({"vocab_size": 0}, "vocab_size"),
        ({"hidden_size": "32", "head_dim": 8}, "hidden_size"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(change, named):
    with pytest.raises(UserError) as error:
        spec_from_config(CONFIG | change)
    assert named in str(error.value)


@pytest.mark.parametrize("name", ["vocab_size", "num_attention_heads", "hidden_size"])
def test_a_missing_size_is_named(name):
    with pytest.raises(UserError, match=f"lacks '{name}'"):
        spec_from_config({key: value for key, value in CONFIG.items() if key != name})
