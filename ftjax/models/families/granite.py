"""Granite 3: a Llama with four multipliers."""

from typing import Any

from ftjax.models.families.fields import decoder_fields, flag, number, positive
from ftjax.models.spec import DecoderSpec


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
