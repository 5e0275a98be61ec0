"""Qwen3-Next and Qwen3.5: three layers of the gated delta rule to one of attention, whose output has a gate."""

from typing import Any

from ftjax.errors import UserError
from ftjax.models.families.fields import attending, decoder_fields, flag, size
from ftjax.models.families.qwen import sparse_layers
from ftjax.models.spec import DecoderSpec, Delta, Experts, Kind

IGNORED = r"^mtp\.|^model\.visual\."  # the head that guesses further tokens, and the eyes of the multimodal model


def qwen3_next(config: dict[str, Any]) -> DecoderSpec:
    config = {"num_key_value_heads": 2, "norm_topk_prob": True} | config
    fields = _fields(config | {"intermediate_size": size(config, "moe_intermediate_size", 512)})
    experts = _experts(config, 512, 10, flag(config, "norm_topk_prob", True))
    dense = {"intermediate_size": size(config, "intermediate_size", 5632), "experts": None}
    sparse = sparse_layers(config, fields["num_hidden_layers"])
    return _with_kinds(config, DecoderSpec(**fields, experts=experts), True, [{} if of else dense for of in sparse])


def qwen3_5(config: dict[str, Any]) -> DecoderSpec:
    spec = DecoderSpec(**_fields({"num_key_value_heads": 4} | config))
    return _with_kinds(config, spec, False, [{}] * spec.num_hidden_layers)


def qwen3_5_moe(config: dict[str, Any]) -> DecoderSpec:
    config = {"num_key_value_heads": 2} | config
    fields = _fields(config | {"intermediate_size": size(config, "moe_intermediate_size", 512)})
    spec = DecoderSpec(**fields, experts=_experts(config, 256, 8, True))
    return _with_kinds(config, spec, False, [{}] * spec.num_hidden_layers)


def _fields(config: dict[str, Any]) -> dict[str, Any]:
    defaults = {"head_dim": 256, "max_position_embeddings": 32_768, "partial_rotary_factor": 0.25}
    fields = decoder_fields(defaults | config, partial_rotary=True)
    if fields["hidden_act"] == "xielu":
        raise UserError("config.json: hidden_act='xielu' has scalars that are learned, which the delta rule has not")
    return fields | {"norm": "rms_plus_one", "qk_norm": "head", "attention_gate": True}


def _experts(config: dict[str, Any], count: int, per_token: int, normalize: bool) -> Experts:
    return Experts(
        count=size(config, "num_experts", count),
        per_token=size(config, "num_experts_per_tok", per_token),
        normalize=normalize,
        shared=size(config, "shared_expert_intermediate_size", 512),
        shared_gate=True,
    )


def _with_kinds(config: dict[str, Any], spec: DecoderSpec, fused: bool, changes: list[dict[str, Any]]) -> DecoderSpec:
    """`spec` with the layers of each kind that the config names. changes: what is other in each layer besides."""
    delta = Delta(
        key_heads=size(config, "linear_num_key_heads", 16),
        value_heads=size(config, "linear_num_value_heads", 32),
        key_dim=size(config, "linear_key_head_dim", 128),
        value_dim=size(config, "linear_value_head_dim", 128),
        taps=size(config, "linear_conv_kernel_dim", 4),
        fused=fused,
    )
    if delta.value_heads % delta.key_heads or delta.taps < 2:
        raise UserError(
            f"config.json: linear_num_value_heads={delta.value_heads} has to be a multiple of "
            f"linear_num_key_heads={delta.key_heads}, and linear_conv_kernel_dim={delta.taps} at least 2"
        )
    interval, kinds = size(config, "full_attention_interval", 4), []
    attends = attending(config, "linear_attention", [(layer + 1) % interval == 0 for layer in range(len(changes))])
    for full, change in zip(attends, changes, strict=True):
        own = change if full else change | {"delta": delta}
        kinds.append(Kind(("full" if full else "linear") + ("_dense" if change else ""), tuple(own.items())))
    return spec.with_kinds(kinds)
