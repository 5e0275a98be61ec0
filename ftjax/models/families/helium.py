"""Helium 1: a Llama that turns neighboring dimensions."""

from typing import Any

from ftjax.models.families.fields import decoder_fields, flag
from ftjax.models.spec import DecoderSpec

_DEFAULTS = {"num_key_value_heads": 20, "head_dim": 128, "max_position_embeddings": 4096, "rms_norm_eps": 1e-8}


def helium(config: dict[str, Any]) -> DecoderSpec:
    fields = decoder_fields(_DEFAULTS | config, default_theta=100_000.0) | {"o_bias": False}
    return DecoderSpec(**fields, mlp_bias=flag(config, "mlp_bias"), rope_interleaved=True)
