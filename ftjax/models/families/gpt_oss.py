"""GPT-OSS: sinks in the softmax, alternating windows, experts with biases and a clamped gate, YaRN."""

from typing import Any

from ftjax.models.families.fields import decoder_fields, layer_types, number, size, windows
from ftjax.models.spec import DecoderSpec, Experts

_YARN = {
    "rope_type": "yarn",
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
}
_DEFAULTS = {
    "num_key_value_heads": 8,
    "head_dim": 64,
    "max_position_embeddings": 131_072,
    "rms_norm_eps": 1e-5,
    "attention_bias": True,
    "sliding_window": 128,
}
_EXPERTS = ("gate_up_proj", "down_proj")  # all experts of a layer in one tensor, [experts, in, out]
NAMES = {
    "layers/self_attn/sinks": "model.layers.{}.self_attn.sinks",
    **{f"layers/mlp/experts/{name}/kernel": f"model.layers.{{}}.mlp.experts.{name}" for name in _EXPERTS},
    **{f"layers/mlp/experts/{name}/bias": f"model.layers.{{}}.mlp.experts.{name}_bias" for name in _EXPERTS},
}
AS_STORED = tuple(f"layers/mlp/experts/{name}/kernel" for name in _EXPERTS)


def gpt_oss(config: dict[str, Any]) -> DecoderSpec:
    config = _DEFAULTS | config
    if not config.get("rope_parameters") and not config.get("rope_scaling"):
        config["rope_parameters"] = _YARN
    experts = Experts(
        count=size(config, "num_local_experts", size(config, "num_experts", 128)),
        per_token=size(config, "num_experts_per_tok", 4),
        normalize=True,
        bias=True,
    )
    fields = decoder_fields(config, default_theta=150_000.0)
    sliding = layer_types(config, [layer % 2 == 0 for layer in range(fields["num_hidden_layers"])])
    return DecoderSpec(
        **fields | {"layer_windows": windows(config, sliding)},
        attention_sinks=True,
        gate="interleaved",
        swiglu_clamp=(number(config, "swiglu_alpha", 1.702), number(config, "swiglu_limit", 7.0)),
        experts=experts,
    )
