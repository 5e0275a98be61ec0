"""StableLM: LayerNorm, RoPE on a quarter of each head; in the 12B attention beside the MLP, and norms of each head."""

from typing import Any

from ftjax.models.families.fields import decoder_fields, flag, positive
from ftjax.models.spec import DecoderSpec

NAMES = {
    f"layers/self_attn/{name}_norm/scale": f"model.layers.{{}}.self_attn.{name}_layernorm.norms.{{}}.weight"
    for name in "qk"
}


def stablelm(config: dict[str, Any]) -> DecoderSpec:
    config = {"num_key_value_heads": 32, "max_position_embeddings": 4096, "partial_rotary_factor": 0.25} | config
    fields = decoder_fields(config | {"head_dim": None}, partial_rotary=True)
    changes = {"norm_eps": positive(config, "layer_norm_eps", 1e-5), "o_bias": False}
    changes["qkv_bias"] = flag(config, "use_qkv_bias")
    return DecoderSpec(
        **fields | changes,
        norm="layer",
        qk_norm="heads" if flag(config, "qk_layernorm") else None,
        parallel=flag(config, "use_parallel_residual"),
    )
