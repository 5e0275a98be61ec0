"""Seed-OSS: a Llama with biases on queries, keys and values, and a switch of its own for that of their output."""

from typing import Any

from ftjax.models.families.fields import decoder_fields, flag
from ftjax.models.spec import DecoderSpec


def seed_oss(config: dict[str, Any]) -> DecoderSpec:
    config = {"max_position_embeddings": 524_288, "head_dim": 128, "attention_bias": True} | config
    fields = decoder_fields({"num_key_value_heads": 8} | config) | {"o_bias": flag(config, "attention_out_bias")}
    return DecoderSpec(**fields, mlp_bias=flag(config, "mlp_bias"))
