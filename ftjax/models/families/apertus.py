"""Apertus: no gate, xIELU with learned scalars in each layer, norms of queries and keys."""

from typing import Any

from ftjax.models.families.fields import decoder_fields
from ftjax.models.spec import DecoderSpec

NAMES = {
    "layers/input_layernorm/scale": "model.layers.{}.attention_layernorm.weight",
    "layers/post_attention_layernorm/scale": "model.layers.{}.feedforward_layernorm.weight",
}
_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 12_000_000.0,
    "factor": 8.0,
    "original_max_position_embeddings": 8192,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
}


def apertus(config: dict[str, Any]) -> DecoderSpec:
    config = {"rms_norm_eps": 1e-5, "max_position_embeddings": 65_536, "hidden_act": "xielu"} | config
    if config.get("rope_parameters") is None:
        config["rope_parameters"] = _ROPE
    return DecoderSpec(**decoder_fields(config, default_theta=12_000_000.0), qk_norm="head", gate=None)
