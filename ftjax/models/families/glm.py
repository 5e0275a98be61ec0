"""GLM-4 and Edge (`glm`), GLM-4-0414 and Z1 (`glm4`, norms on both sides): RoPE turns neighbors, in half of a head."""

from typing import Any

from ftjax.models.families.fields import decoder_fields
from ftjax.models.spec import DecoderSpec

GLM4_NAMES = {
    "layers/post_attention_layernorm/scale": "model.layers.{}.post_self_attn_layernorm.weight",
    "layers/pre_feedforward_layernorm/scale": "model.layers.{}.post_attention_layernorm.weight",
    "layers/post_feedforward_layernorm/scale": "model.layers.{}.post_mlp_layernorm.weight",
}
_DEFAULTS = {
    "num_key_value_heads": 2,
    "head_dim": 128,
    "max_position_embeddings": 131_072,
    "rms_norm_eps": 1.5625e-07,
    "partial_rotary_factor": 0.5,
    "attention_bias": True,
}


def glm(config: dict[str, Any]) -> DecoderSpec:
    fields = decoder_fields(_DEFAULTS | config, partial_rotary=True) | {"o_bias": False}
    return DecoderSpec(**fields, gate="halves", rope_interleaved=True, post_norms=config["model_type"] == "glm4")
