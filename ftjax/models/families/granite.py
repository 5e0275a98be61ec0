"""Granite 3: a Llama with four multipliers, and mixtures of it."""

import dataclasses
from typing import Any

from ftjax.models.families.fields import decoder_fields, flag, number, positive, size
from ftjax.models.spec import DecoderSpec, Experts

MOE_NAMES = {  # all experts of a layer in one tensor, [experts, out, in]
    "layers/mlp/router/kernel": "model.layers.{}.block_sparse_moe.router.layer.weight",
    "layers/mlp/experts/gate_up_proj/kernel": "model.layers.{}.block_sparse_moe.input_linear.weight",
    "layers/mlp/experts/down_proj/kernel": "model.layers.{}.block_sparse_moe.output_linear.weight",
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
