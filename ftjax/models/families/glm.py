"""GLM-4 and Edge (`glm`), GLM-4-0414 and Z1 (`glm4`, norms on both sides): RoPE turns neighbors, in half of a head.

GLM-4.5 to 4.7 (`glm4_moe`) have DeepSeek V3's experts, Flash (`glm4_moe_lite`) its attention as well.
"""

from typing import Any

from ftjax.errors import UserError
from ftjax.models.families.deepseek import corrected, mixture
from ftjax.models.families.fields import decoder_fields, dense_first, flag, latent_fields, shorten
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

_MOE = {
    "num_key_value_heads": 8,
    "max_position_embeddings": 131_072,
    "rms_norm_eps": 1e-5,
    "partial_rotary_factor": 0.5,
    "moe_intermediate_size": 1408,
    "n_routed_experts": 128,
    "num_experts_per_tok": 8,
    "first_k_dense_replace": 1,
}
_LITE = {
    "max_position_embeddings": 202_752,
    "rms_norm_eps": 1e-5,
    "q_lora_rank": 768,
    "qk_nope_head_dim": 192,
    "v_head_dim": 256,
    "moe_intermediate_size": 1536,
    "n_routed_experts": 64,
    "num_experts_per_tok": 4,
    "routed_scaling_factor": 1.8,
    "first_k_dense_replace": 1,
}


def glm(config: dict[str, Any]) -> DecoderSpec:
    fields = decoder_fields(_DEFAULTS | config, partial_rotary=True) | {"o_bias": False}
    return DecoderSpec(**fields, gate="halves", rope_interleaved=True, post_norms=config["model_type"] == "glm4")


def glm4_moe(config: dict[str, Any]) -> DecoderSpec:
    config = _MOE | config
    fields = decoder_fields(config, partial_rotary=True) | {"o_bias": False}
    fields["qk_norm"] = "head" if flag(config, "use_qk_norm") else None
    return mixture(config, fields, corrected(config), dense_first(config, fields))


def glm4_moe_lite(config: dict[str, Any]) -> DecoderSpec:
    config = _LITE | config
    fields, kinds = latent_fields(config), config.get("mlp_layer_types")
    if kinds is None:
        return mixture(config, fields, corrected(config), dense_first(config, fields))
    known = isinstance(kinds, list) and all(kind in ("dense", "sparse") for kind in kinds)
    if not known or len(kinds) != fields["num_hidden_layers"]:
        raise UserError(f"config.json: mlp_layer_types={shorten(kinds)} is not dense or sparse for each layer")
    return mixture(config, fields, corrected(config), [kind == "dense" for kind in kinds])
