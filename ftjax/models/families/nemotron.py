"""Nemotron 3, 4 and Minitron: LayerNorm with a scale around 1, RoPE on half of each head, a squared ReLU, no gate."""

from typing import Any

from ftjax.models.families.fields import decoder_fields, flag, positive
from ftjax.models.spec import DecoderSpec


def nemotron(config: dict[str, Any]) -> DecoderSpec:
    config = {"max_position_embeddings": 4096, "partial_rotary_factor": 0.5, "hidden_act": "relu2"} | config
    fields = decoder_fields(config, partial_rotary=True) | {"norm_eps": positive(config, "norm_eps", 1e-5)}
    return DecoderSpec(**fields, mlp_bias=flag(config, "mlp_bias"), gate=None, norm="layer_plus_one")
