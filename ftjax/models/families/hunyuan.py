"""Hunyuan's dense models: norms of queries and keys after RoPE, whose base is stretched by a fixed `alpha`."""

from typing import Any

from ftjax.models.families.fields import decoder_fields, positive, refuse
from ftjax.models.rope import rope_parameters
from ftjax.models.spec import DecoderSpec

NAMES = {
    f"layers/self_attn/{ours}/scale": f"model.layers.{{}}.self_attn.{theirs}.weight"
    for ours, theirs in (("q_norm", "query_layernorm"), ("k_norm", "key_layernorm"))
}


def hunyuan(config: dict[str, Any]) -> DecoderSpec:
    refuse(config, "use_cla")  # layers that share keys and values
    config = {"rms_norm_eps": 1e-5} | config
    given = rope_parameters(config)
    if given["rope_type"] == "dynamic" and given.get("alpha"):  # what its files call dynamic is the same at all lengths
        dim = decoder_fields(config | {"rope_scaling": None, "rope_parameters": None})["head_dim"]
        theta = positive(given, "rope_theta", 10_000.0) * positive(given, "alpha", 1.0) ** (dim / max(dim - 2, 1))
        config |= {"rope_scaling": None, "rope_parameters": {"rope_theta": theta}}
    return DecoderSpec(**decoder_fields(config), qk_norm="head", qk_norm_last=True)
