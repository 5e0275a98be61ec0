"""OLMo 2: norms after attention and MLP instead of before, and over the whole of queries and keys."""

from typing import Any

from ftjax.models.families.fields import decoder_fields
from ftjax.models.spec import DecoderSpec


def olmo2(config: dict[str, Any]) -> DecoderSpec:
    config = {"rms_norm_eps": 1e-5} | config
    return DecoderSpec(**decoder_fields(config), pre_norms=False, post_norms=True, qk_norm="projection")
