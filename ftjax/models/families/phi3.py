"""Phi-3, Phi-3.5 and Phi-4(-mini): one kernel for queries, keys and values, one for gate and up, LongRoPE."""

from typing import Any

from ftjax.errors import UserError
from ftjax.models.families.fields import mistral_fields
from ftjax.models.rope import rope_parameters
from ftjax.models.spec import DecoderSpec


def phi3(config: dict[str, Any]) -> DecoderSpec:
    config = {"max_position_embeddings": 4096, "rms_norm_eps": 1e-5} | config
    fields = mistral_fields(config, partial_rotary=True)
    if rope_parameters(config)["rope_type"] == "yarn":  # by which its first files mean LongRoPE
        raise UserError("config.json: rope_type 'yarn' of a 'phi3' model needs 'short_factor' beside it")
    return DecoderSpec(**fields, fused_qkv=True, gate="halves")
