"""MiniMax M2: sigmoid routing with a correction, norms of whole queries and keys, RoPE on a part of each head."""

from typing import Any

from ftjax.models.families.fields import decoder_fields, refuse, size
from ftjax.models.families.mistral import MIXTRAL_NAMES
from ftjax.models.spec import DecoderSpec, Experts

_DEFAULTS = {"num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 196_608, "intermediate_size": 1536}
NAMES = MIXTRAL_NAMES | {"layers/mlp/correction": "model.layers.{}.block_sparse_moe.e_score_correction_bias"}


def minimax_m2(config: dict[str, Any]) -> DecoderSpec:
    config = _DEFAULTS | config
    harmless = {"use_qk_norm": True, "qk_norm_type": "per_layer", "use_routing_bias": True, "scoring_func": "sigmoid"}
    for name, value in (harmless | {"shared_intermediate_size": 0}).items():
        refuse(config, name, value)
    if config.get("rotary_dim") is not None:
        config = {"partial_rotary_factor": size(config, "rotary_dim") / size(config, "head_dim")} | config
    experts = Experts(
        count=size(config, "num_local_experts", 256),
        per_token=size(config, "num_experts_per_tok", 8),
        normalize=True,
        score="sigmoid",
        correction=True,
    )
    fields = decoder_fields(config, default_theta=5_000_000.0, partial_rotary=True)
    return DecoderSpec(**fields | {"qkv_bias": False, "o_bias": False}, qk_norm="projection", experts=experts)
