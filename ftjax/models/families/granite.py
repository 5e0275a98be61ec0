"""Granite 3: a Llama with four multipliers."""

import dataclasses
from typing import Any

from ftjax.models.families.fields import decoder_fields, flag, number, positive
from ftjax.models.spec import DecoderSpec


def granite(config: dict[str, Any]) -> DecoderSpec:
    spec = DecoderSpec(**decoder_fields(config), mlp_bias=flag(config, "mlp_bias"))
    return dataclasses.replace(
        spec,
        embedding_scale=number(config, "embedding_multiplier", 1.0),
        attention_scales=(number(config, "attention_multiplier", 1.0),) * spec.num_hidden_layers,
        residual_scale=number(config, "residual_multiplier", 1.0),
        logit_scale=1.0 / positive(config, "logits_scaling", 1.0),
    )
