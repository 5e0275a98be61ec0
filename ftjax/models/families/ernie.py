"""ERNIE 4.5: a Llama that turns neighboring dimensions, with one switch for all biases."""

from typing import Any

from ftjax.models.families.fields import decoder_fields, flag
from ftjax.models.spec import DecoderSpec

_DEFAULTS = {
    "num_key_value_heads": 2,
    "head_dim": 128,
    "max_position_embeddings": 131_072,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
}


def ernie4_5(config: dict[str, Any]) -> DecoderSpec:
    bias = flag(config, "use_bias")
    fields = decoder_fields(_DEFAULTS | config, default_theta=500_000.0) | {"qkv_bias": bias, "o_bias": bias}
    return DecoderSpec(**fields, mlp_bias=bias, rope_interleaved=True)
