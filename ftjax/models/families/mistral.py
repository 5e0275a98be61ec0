"""Mistral (a sliding window in every layer), Ministral (in some), Ministral 3 (YaRN), Mixtral (Jiang et al. 2024)."""

from typing import Any

from ftjax.models.families.fields import layer_types, mistral_fields, optional, refuse, size, windows
from ftjax.models.rope import rope_parameters
from ftjax.models.spec import DecoderSpec, Experts

MIXTRAL_NAMES = {
    "layers/mlp/router/kernel": "model.layers.{}.block_sparse_moe.gate.weight",
    "layers/mlp/experts/gate_proj/kernel": "model.layers.{}.block_sparse_moe.experts.{}.w1.weight",
    "layers/mlp/experts/up_proj/kernel": "model.layers.{}.block_sparse_moe.experts.{}.w3.weight",
    "layers/mlp/experts/down_proj/kernel": "model.layers.{}.block_sparse_moe.experts.{}.w2.weight",
}
_MINISTRAL3_ROPE = {
    "rope_type": "yarn",
    "rope_theta": 1_000_000.0,
    "factor": 16.0,
    "original_max_position_embeddings": 16_384,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale_all_dim": 1.0,
    "mscale": 1.0,
    "llama_4_scaling_beta": 0.1,
}


def mistral(config: dict[str, Any]) -> DecoderSpec:
    refuse(config, "layer_types", harmless=None)
    # Mistral's own default for a config that does not say; null means none.
    config = {"sliding_window": 4096, "num_key_value_heads": 8, "max_position_embeddings": 131_072} | config
    return DecoderSpec(**mistral_fields(config))


def ministral(config: dict[str, Any]) -> DecoderSpec:
    config = {"sliding_window": 4096, "num_key_value_heads": 8, "max_position_embeddings": 131_072} | config
    fields = mistral_fields(config)
    sliding = layer_types(config, [window is not None for window in fields["layer_windows"]])
    return DecoderSpec(**fields | {"layer_windows": windows(config, sliding)})


def ministral3(config: dict[str, Any]) -> DecoderSpec:
    refuse(config, "layer_types", harmless=None)
    defaults = {"num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 262_144, "rms_norm_eps": 1e-5}
    config = defaults | config
    if config.get("rope_parameters") is None:
        config["rope_parameters"] = _MINISTRAL3_ROPE
    given = rope_parameters(config)
    beta = optional(given, "llama_4_scaling_beta")
    scale = (beta, size(given, "original_max_position_embeddings"), 0) if beta else None
    return DecoderSpec(**mistral_fields(config), position_scale=scale)


def mixtral(config: dict[str, Any]) -> DecoderSpec:
    config = {"num_key_value_heads": 8, "max_position_embeddings": 131_072, "rms_norm_eps": 1e-5} | config
    fields = mistral_fields(config, default_theta=1_000_000.0)
    experts = Experts(
        count=size(config, "num_local_experts", 8),
        per_token=size(config, "num_experts_per_tok", 2),
        normalize=True,
    )
    return DecoderSpec(**fields, experts=experts)
