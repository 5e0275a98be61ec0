"""Qwen2 and Qwen2.5 (biases on queries, keys and values), Qwen3 (norms of queries and keys), and mixtures of both."""

from typing import Any

from ftjax.errors import UserError
from ftjax.models.families.fields import decoder_fields, flag, layer_types, shorten, size, windows
from ftjax.models.spec import DecoderSpec, Experts, Kind

MOE_NAMES = {
    "layers/mlp/router/kernel": "model.layers.{}.mlp.gate.weight",
    **{
        f"layers/mlp/experts/{name}/kernel": f"model.layers.{{}}.mlp.experts.{{}}.{name}.weight"
        for name in ("gate_proj", "up_proj", "down_proj")
    },
}


def qwen2(config: dict[str, Any]) -> DecoderSpec:
    config = {"max_position_embeddings": 32_768} | config
    fields = _with_windows(config, decoder_fields(config), config.get("max_window_layers", 28))
    return DecoderSpec(**fields | {"qkv_bias": True, "o_bias": False})


def qwen3(config: dict[str, Any]) -> DecoderSpec:
    config = {"max_position_embeddings": 32_768, "head_dim": 128} | config
    fields = _with_windows(config, decoder_fields(config), config.get("max_window_layers", 28))
    return DecoderSpec(**fields, qk_norm="head")


def qwen2_moe(config: dict[str, Any]) -> DecoderSpec:
    config = {"max_position_embeddings": 32_768, "num_key_value_heads": 16} | config
    fields = decoder_fields(config | {"intermediate_size": size(config, "moe_intermediate_size", 1408)})
    experts = Experts(
        count=size(config, "num_experts", 60),
        per_token=size(config, "num_experts_per_tok", 4),
        normalize=flag(config, "norm_topk_prob"),
        shared=size(config, "shared_expert_intermediate_size", 5632),
        shared_gate=True,
    )
    slides = flag(config, "use_sliding_window")
    first = size(config, "max_window_layers", 28)
    sliding = [slides and layer % 2 == 0 and layer < first for layer in range(fields["num_hidden_layers"])]
    sliding = layer_types(config, sliding) if slides else sliding
    fields["layer_windows"] = windows({"sliding_window": 4096} | config, sliding)
    fields |= {"qkv_bias": flag(config, "qkv_bias", True), "o_bias": False}
    return _with_dense_layers(config, DecoderSpec(**fields, experts=experts), 5632)


def qwen3_moe(config: dict[str, Any]) -> DecoderSpec:
    config = {"max_position_embeddings": 32_768, "num_key_value_heads": 4} | config
    fields = decoder_fields(config | {"intermediate_size": size(config, "moe_intermediate_size", 768)})
    experts = Experts(
        count=size(config, "num_experts", size(config, "num_local_experts", 128)),
        per_token=size(config, "num_experts_per_tok", 8),
        normalize=flag(config, "norm_topk_prob"),
    )
    spec = DecoderSpec(**_with_windows(config, fields, 0), qk_norm="head", experts=experts)
    return _with_dense_layers(config, spec, 6144)


def sparse_layers(config: dict[str, Any], layers: int) -> list[bool]:
    """Which layers the config leaves in the mixture."""
    step, named = size(config, "decoder_sparse_step", 1), config.get("mlp_only_layers") or []
    if not isinstance(named, list) or not all(type(layer) is int for layer in named):
        raise UserError(f"config.json: mlp_only_layers={shorten(named)} is not a list of numbers of layers")
    only_mlp = set(named)
    return [layer not in only_mlp and (layer + 1) % step == 0 for layer in range(layers)]


def _with_dense_layers(config: dict[str, Any], spec: DecoderSpec, width: int) -> DecoderSpec:
    """`spec` with the layers that the config takes out of the mixture; width: of their MLP, where it does not say."""
    dense = Kind("dense", (("intermediate_size", size(config, "intermediate_size", width)), ("experts", None)))
    sparse = Kind("sparse")
    return spec.with_kinds([sparse if of else dense for of in sparse_layers(config, spec.num_hidden_layers)])


def _with_windows(config: dict[str, Any], fields: dict[str, Any], first: Any) -> dict[str, Any]:
    """`fields` with sliding windows, where they are switched on, from layer `first` on."""
    slides = flag(config, "use_sliding_window") and config.get("sliding_window", 4096) is not None
    if slides and (type(first) is not int or first < 0):
        raise UserError(f"config.json: max_window_layers={shorten(first)} is not a number of layers")
    sliding = [slides and layer >= first for layer in range(fields["num_hidden_layers"])]
    sliding = layer_types(config, sliding) if slides else sliding
    return fields | {"layer_windows": windows({"sliding_window": 4096} | config, sliding)}
