"""ERNIE 4.5: a Llama that turns neighboring dimensions, with one switch for all biases; its mixtures."""

from typing import Any

from ftjax.errors import UserError
from ftjax.models.families.fields import decoder_fields, flag, refuse, shorten, size
from ftjax.models.spec import DecoderSpec, Experts, Kind

_DEFAULTS = {
    "num_key_value_heads": 2,
    "head_dim": 128,
    "max_position_embeddings": 131_072,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
}
_MOE_DEFAULTS = {
    "intermediate_size": 12_288,
    "num_key_value_heads": 4,
    "max_position_embeddings": 131_072,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
    "moe_intermediate_size": 1536,
    "moe_k": 6,
    "moe_num_experts": 64,
    "moe_num_shared_experts": 2,
    "moe_layer_start_index": 1,
    "moe_layer_end_index": -1,
    "moe_layer_interval": 1,
}
_MLP = ("gate_proj", "up_proj", "down_proj")
MOE_NAMES = {
    "layers/mlp/router/kernel": "model.layers.{}.mlp.gate.weight",
    "layers/mlp/correction": "model.layers.{}.mlp.moe_statics.e_score_correction_bias",
    **{f"layers/mlp/experts/{name}/kernel": f"model.layers.{{}}.mlp.experts.{{}}.{name}.weight" for name in _MLP},
    **{f"layers/mlp/shared_expert/{name}/{leaf}": f"model.layers.{{}}.mlp.shared_experts.{name}.{theirs}"
       for name in _MLP for leaf, theirs in (("kernel", "weight"), ("bias", "bias"))},
}  # fmt: skip
IGNORED = r"^model\.mtp_"  # of the prediction of several tokens at once


def ernie4_5(config: dict[str, Any]) -> DecoderSpec:
    bias = flag(config, "use_bias")
    fields = decoder_fields(_DEFAULTS | config, default_theta=500_000.0) | {"qkv_bias": bias, "o_bias": bias}
    return DecoderSpec(**fields, mlp_bias=bias, rope_interleaved=True)


def ernie4_5_moe(config: dict[str, Any]) -> DecoderSpec:
    config = _MOE_DEFAULTS | config
    refuse(config, "moe_norm_min", harmless=1e-12)
    bias, shared = flag(config, "use_bias"), config["moe_num_shared_experts"]
    width = size(config, "moe_intermediate_size")
    fields = decoder_fields(config, default_theta=500_000.0) | {"qkv_bias": bias, "o_bias": bias}
    if bias and fields["tie_word_embeddings"]:
        refuse(config, "use_bias")  # of a head that is the embedding
    experts = Experts(
        count=size(config, "moe_num_experts"),
        per_token=size(config, "moe_k"),
        normalize=True,
        correction=True,
        correction_row=True,
        shared=width * size(config, "moe_num_shared_experts") if shared != 0 else None,
    )
    layers, interval = range(fields["num_hidden_layers"]), size(config, "moe_layer_interval")
    first, last = config["moe_layer_start_index"], config["moe_layer_end_index"]
    for name in ("moe_layer_start_index", "moe_layer_end_index"):
        if type(config[name]) is not int:
            raise UserError(f"config.json: {name}={shorten(config[name])} is not a number of a layer")
    mixtures = layers[first : layers.stop if last == -1 else last + 1]
    spec = DecoderSpec(
        **fields | {"intermediate_size": width},
        mlp_bias=bias,
        rope_interleaved=True,
        head_bias=bias,
        experts=experts,
    )
    dense = Kind("dense", (("intermediate_size", size(config, "intermediate_size")), ("experts", None)))
    sparse = [layer in mixtures and (layer + 1) % interval == 0 for layer in layers]
    return spec.with_kinds([Kind("sparse") if its else dense for its in sparse])
