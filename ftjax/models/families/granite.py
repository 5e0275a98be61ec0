"""Granite 3: a Llama with four multipliers, and mixtures of it; Granite 4: with Mamba-2 in most layers."""

import dataclasses
from typing import Any

from ftjax.errors import UserError
from ftjax.models.families.fields import decoder_fields, flag, number, positive, shorten, size
from ftjax.models.families.mamba_shared import attending_layers, mamba, step_limits
from ftjax.models.spec import DecoderSpec, Experts, Kind

MOE_NAMES = {  # all experts of a layer in one tensor, [experts, out, in]
    "layers/mlp/router/kernel": "model.layers.{}.block_sparse_moe.router.layer.weight",
    "layers/mlp/experts/gate_up_proj/kernel": "model.layers.{}.block_sparse_moe.input_linear.weight",
    "layers/mlp/experts/down_proj/kernel": "model.layers.{}.block_sparse_moe.output_linear.weight",
}
HYBRID_NAMES = MOE_NAMES | {
    f"layers/mlp/{place}{ours}/kernel": f"model.layers.{{}}.shared_mlp.{theirs}.weight"
    for place in ("", "shared_expert/")
    for ours, theirs in (("gate_up_proj", "input_linear"), ("down_proj", "output_linear"))
}


def granite(config: dict[str, Any]) -> DecoderSpec:
    fields = decoder_fields(config)
    fields["attention_scales"] = (number(config, "attention_multiplier", 1.0),) * fields["num_hidden_layers"]
    return DecoderSpec(
        **fields,
        mlp_bias=flag(config, "mlp_bias"),
        embedding_scale=number(config, "embedding_multiplier", 1.0),
        residual_scale=number(config, "residual_multiplier", 1.0),
        logit_scale=1.0 / positive(config, "logits_scaling", 1.0),
    )


def granitemoe(config: dict[str, Any]) -> DecoderSpec:
    count, per_token = size(config, "num_local_experts", 8), size(config, "num_experts_per_tok", 2)
    experts = Experts(count=count, per_token=per_token, normalize=True)
    return dataclasses.replace(granite(config), mlp_bias=False, gate="halves", experts=experts)


def granitemoehybrid(config: dict[str, Any]) -> DecoderSpec:
    width, positions = size(config, "shared_intermediate_size", 1024), config.get("position_embedding_type")
    if config.get("num_local_experts") == 0:
        spec = dataclasses.replace(granite(config), mlp_bias=False, gate="halves", intermediate_size=width)
    else:
        spec = granitemoe(config)
        spec = dataclasses.replace(spec, experts=dataclasses.replace(spec.experts, shared=width))
    if positions not in (None, "nope", "rope"):
        raise UserError(f"config.json: position_embedding_type={shorten(positions)} is neither 'rope' nor 'nope'")
    if positions != "rope":
        spec = dataclasses.replace(spec, ropes=(), layer_ropes=(None,) * spec.num_hidden_layers)
    width = size(config, "mamba_expand", 2) * spec.hidden_size
    bias = flag(config, "mamba_proj_bias")
    its = mamba(config, width, bias, out_bias=bias, limits=step_limits(config))
    attends = attending_layers(config, [False] * spec.num_hidden_layers)
    return spec.with_kinds([Kind("full") if full else Kind("mamba", (("mamba", its),)) for full in attends])
