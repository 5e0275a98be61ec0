"""OLMo: LayerNorm without parameters, queries, keys and values that are cut where the config says so."""

from typing import Any

from ftjax.models.families.fields import decoder_fields, optional
from ftjax.models.spec import DecoderSpec


def olmo(config: dict[str, Any]) -> DecoderSpec:
    fields = decoder_fields(config) | {"norm_eps": 1e-5}  # not in the config
    return DecoderSpec(**fields, norm="layer_bare", qkv_clip=optional(config, "clip_qkv"))
