"""Arcee's foundation models (AFM): a Llama whose MLP has no gate and squares its ReLU."""

from typing import Any

from ftjax.models.families.fields import decoder_fields, flag
from ftjax.models.spec import DecoderSpec


def arcee(config: dict[str, Any]) -> DecoderSpec:
    config = {"rms_norm_eps": 1e-5, "max_position_embeddings": 4096, "hidden_act": "relu2"} | config
    return DecoderSpec(**decoder_fields(config), mlp_bias=flag(config, "mlp_bias"), gate=None)
