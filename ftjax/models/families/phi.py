"""Phi-1, Phi-1.5 and Phi-2: attention beside the MLP, biases everywhere, LayerNorm, RoPE on a part of each head."""

from typing import Any

from ftjax.models.families.fields import decoder_fields, flag, positive
from ftjax.models.spec import DecoderSpec

_MODULES = {
    "layers/self_attn/o_proj": "layers.{}.self_attn.dense",
    "layers/self_attn/q_norm": "layers.{}.self_attn.q_layernorm",
    "layers/self_attn/k_norm": "layers.{}.self_attn.k_layernorm",
    "layers/mlp/up_proj": "layers.{}.mlp.fc1",
    "layers/mlp/down_proj": "layers.{}.mlp.fc2",
    "norm": "final_layernorm",
}
_LEAVES = {"kernel": "weight", "scale": "weight", "bias": "bias"}
NAMES = {f"{ours}/{leaf}": f"model.{theirs}.{name}" for ours, theirs in _MODULES.items()
         for leaf, name in _LEAVES.items()}  # fmt: skip


def phi(config: dict[str, Any]) -> DecoderSpec:
    config = {"partial_rotary_factor": 0.5, "hidden_act": "gelu_new"} | config
    changes = {"norm_eps": positive(config, "layer_norm_eps", 1e-5), "qkv_bias": True, "o_bias": True}
    fields = decoder_fields(config, partial_rotary=True) | changes
    return DecoderSpec(
        **fields,
        qk_norm="head" if flag(config, "qk_layernorm") else None,
        mlp_bias=True,
        gate=None,
        norm="layer",
        parallel=True,
        head_bias=not fields["tie_word_embeddings"],  # an embedding has none
    )
