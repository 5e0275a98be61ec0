"""Llama 4's text: chunks of attention with RoPE, every fourth layer whole and without, a shared expert in mixtures."""

from typing import Any

from ftjax.errors import UserError
from ftjax.models.families.fields import decoder_fields, flag, layer_types, number, shorten, size
from ftjax.models.spec import DecoderSpec, Experts, Kind

_DEFAULTS = {
    "hidden_size": 5120,
    "intermediate_size": 8192,
    "head_dim": 128,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131_072,
    "rms_norm_eps": 1e-5,
}
_EXPERTS = ("gate_up_proj", "down_proj")  # all experts of a layer in one tensor, [experts, in, out]
_MLP = ("gate_proj", "up_proj", "down_proj")
NAMES = {
    "layers/mlp/router/kernel": "model.layers.{}.feed_forward.router.weight",
    **{f"layers/mlp/experts/{name}/kernel": f"model.layers.{{}}.feed_forward.experts.{name}" for name in _EXPERTS},
    **{
        f"layers/mlp/{place}{name}/kernel": f"model.layers.{{}}.feed_forward.{place.replace('/', '.')}{name}.weight"
        for place in ("", "shared_expert/")
        for name in _MLP
    },
}
AS_STORED = tuple(f"layers/mlp/experts/{name}/kernel" for name in _EXPERTS)


def llama4(config: dict[str, Any]) -> DecoderSpec:
    config = _DEFAULTS | config
    fields = decoder_fields(config, default_theta=500_000.0)
    layers = range(fields["num_hidden_layers"])
    interval = size(config, "no_rope_layer_interval", 4)
    # Despite its name: 1 where a layer has RoPE.
    has_rope = config.get("no_rope_layers") or [int((layer + 1) % interval != 0) for layer in layers]
    if not isinstance(has_rope, list) or len(has_rope) < len(layers) or not all(one in (0, 1) for one in has_rope):
        raise UserError(f"config.json: no_rope_layers has to have 0 or 1 for each of {len(layers)} layers")
    has_rope = [bool(one) for one in has_rope[: len(layers)]]
    has_chunks = config.get("attention_chunk_size", 8192) is not None
    chunked = layer_types(config, [has_chunks and turned for turned in has_rope], "chunked_attention")
    chunk = size({"attention_chunk_size": 8192} | config, "attention_chunk_size") if any(chunked) else None
    scale = (number(config, "attn_scale", 0.1), size(config, "floor_scale", 8192), 1)
    experts = Experts(
        count=size(config, "num_local_experts", 16),
        per_token=size(config, "num_experts_per_tok", 1),
        normalize=False,
        score="sigmoid",
        weigh_input=True,
        shared=fields["intermediate_size"],
        gate="halves",
    )
    spec = DecoderSpec(
        **fields | {"layer_ropes": tuple(0 if turned else None for turned in has_rope)},
        rope_interleaved=True,
        layer_chunks=tuple(chunk if its else None for its in chunked) if any(chunked) else (),
        qk_norm="bare" if flag(config, "use_qk_norm", True) else None,
        qk_norm_last=flag(config, "use_qk_norm", True),
        position_scale=scale if config.get("attn_temperature_tuning", True) else None,
        norm_or_scale=True,
        experts=experts,
    )
    dense = Kind("dense", (("intermediate_size", size(config, "intermediate_size_mlp", 16_384)), ("experts", None)))
    return spec.with_kinds([Kind("sparse") if layer in _mixtures(config, layers) else dense for layer in layers])


def _mixtures(config: dict[str, Any], layers: range) -> set[int]:
    """The layers that are mixtures, from a list or a step."""
    named = config.get("moe_layers")
    if named is None:
        step = size(config, "interleave_moe_layer_step", 1)
        return set(layers[step - 1 :: step])
    if not isinstance(named, list) or not all(type(layer) is int for layer in named):
        raise UserError(f"config.json: moe_layers={shorten(named)} is not a list of numbers of layers")
    return set(named)
