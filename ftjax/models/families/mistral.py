"""Mistral (a sliding window in every layer) and Mixtral (Jiang et al. 2024: experts in the place of the MLP)."""

from typing import Any

from ftjax.models.families.fields import mistral_fields, refuse, size
from ftjax.models.spec import DecoderSpec, Experts

MIXTRAL_NAMES = {
    "layers/mlp/router/kernel": "model.layers.{}.block_sparse_moe.gate.weight",
    "layers/mlp/experts/gate_proj/kernel": "model.layers.{}.block_sparse_moe.experts.{}.w1.weight",
    "layers/mlp/experts/up_proj/kernel": "model.layers.{}.block_sparse_moe.experts.{}.w3.weight",
    "layers/mlp/experts/down_proj/kernel": "model.layers.{}.block_sparse_moe.experts.{}.w2.weight",
}


def mistral(config: dict[str, Any]) -> DecoderSpec:
    refuse(config, "layer_types", harmless=None)
    # Mistral's own default for a config that does not say; null means none.
    config = {"sliding_window": 4096, "num_key_value_heads": 8, "max_position_embeddings": 131_072} | config
    return DecoderSpec(**mistral_fields(config))


def mixtral(config: dict[str, Any]) -> DecoderSpec:
    config = {"num_key_value_heads": 8, "max_position_embeddings": 131_072, "rms_norm_eps": 1e-5} | config
    fields = mistral_fields(config, default_theta=1_000_000.0)
    experts = Experts(
        count=size(config, "num_local_experts", 8),
        per_token=size(config, "num_experts_per_tok", 2),
        normalize=True,
    )
    return DecoderSpec(**fields, experts=experts)
