"""StarCoder 2: LayerNorm, one switch for all biases, no gate, a window in every layer where the config has one."""

from typing import Any

from ftjax.models.families.fields import flag, mistral_fields, positive
from ftjax.models.spec import DecoderSpec

NAMES = {
    f"layers/mlp/{ours}/{leaf}": f"model.layers.{{}}.mlp.{theirs}.{name}"
    for ours, theirs in (("up_proj", "c_fc"), ("down_proj", "c_proj"))
    for leaf, name in (("kernel", "weight"), ("bias", "bias"))
}
_DEFAULTS = {
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "sliding_window": None,
    "tie_word_embeddings": True,
    "hidden_act": "gelu_pytorch_tanh",
}


def starcoder2(config: dict[str, Any]) -> DecoderSpec:
    config = _DEFAULTS | config
    bias = flag(config, "use_bias", True)
    changes = {"norm_eps": positive(config, "norm_epsilon", 1e-5), "qkv_bias": bias, "o_bias": bias}
    return DecoderSpec(**mistral_fields(config) | changes, mlp_bias=bias, gate=None, norm="layer")
