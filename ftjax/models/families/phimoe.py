"""Phi-3.5-MoE: a Mixtral with LayerNorm, biases, LongRoPE with a scale of its own, and sparsemixer's routing."""

from typing import Any

from ftjax.errors import UserError
from ftjax.models.families.fields import decoder_fields, flag, positive, refuse, size, windows
from ftjax.models.rope import rope_parameters
from ftjax.models.spec import DecoderSpec, Experts


def phimoe(config: dict[str, Any]) -> DecoderSpec:
    config = {"num_key_value_heads": 8, "max_position_embeddings": 131_072, "rms_norm_eps": 1e-5} | config
    refuse(config, "num_experts_per_tok", harmless=2)
    tied, head_bias = flag(config, "tie_word_embeddings"), flag(config, "lm_head_bias")
    if tied and head_bias:
        refuse(config, "lm_head_bias")
    fields = decoder_fields(config | {"rope_scaling": _scaling(config)}, default_theta=1_000_000.0)
    sliding = [config.get("sliding_window") is not None] * fields["num_hidden_layers"]
    return DecoderSpec(
        **fields | {"layer_windows": windows(config, sliding)},
        norm="layer",
        head_bias=head_bias,
        experts=Experts(
            count=size(config, "num_local_experts", 16),
            per_token=2,
            normalize=False,
            score="sparsemixer",
            slack=positive(config, "router_jitter_noise", 0.01),
        ),
    )


def _scaling(config: dict[str, Any]) -> dict[str, Any] | None:
    """Its RoPE's parameters, with the scale of cosines and sines where other models with LongRoPE have it."""
    given = rope_parameters(config, 1_000_000.0)
    if given["rope_type"] == "default":
        return config.get("rope_scaling")
    short, long = positive(given, "short_mscale", 1.0), positive(given, "long_mscale", 1.0)
    if given["rope_type"] != "longrope" or short != long:
        raise UserError(
            f"config.json: a 'phimoe' model has rope_type 'longrope' with equal short_mscale and long_mscale here, not "
            f"{given['rope_type']!r} with {short} and {long}"
        )
    return given | {"attention_factor": short}
