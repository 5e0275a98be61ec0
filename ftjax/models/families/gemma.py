"""Gemma 2 (soft caps, alternating windows, norms on both sides) and Gemma 3 text (q/k norms, two rope bases)."""

from typing import Any

from ftjax.errors import UserError
from ftjax.models.families.fields import (
    activation,
    decoder_fields,
    layer_types,
    optional,
    positive,
    refuse,
    rope,
    size,
    windows,
)
from ftjax.models.spec import DecoderSpec

_DEFAULTS = {
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "sliding_window": 4096,
    "tie_word_embeddings": True,
}


def gemma2(config: dict[str, Any]) -> DecoderSpec:
    config = _DEFAULTS | {"max_position_embeddings": 8192} | config
    fields = _fields(config, period=2)
    return DecoderSpec(
        **fields,
        attention_softcap=optional(config, "attn_logit_softcapping", 50.0),
        logit_softcap=optional(config, "final_logit_softcapping", 30.0),
    )


def gemma3(config: dict[str, Any]) -> DecoderSpec:
    config = _DEFAULTS | {"max_position_embeddings": 131_072, "vocab_size": 262_208} | config
    ropes = two_ropes(config)
    config = config | {"rope_parameters": None, "rope_scaling": None}
    fields = _fields(config, size(config, "sliding_window_pattern", size(config, "_sliding_window_pattern", 6)))
    refuse(config, "attn_logit_softcapping", harmless=None)  # transformers ignores it in Gemma 3
    head_dim, positions = fields["head_dim"], fields["max_position_embeddings"]
    fields["ropes"] = tuple(rope(config | {"rope_parameters": given}, head_dim, positions) for given in ropes)
    fields["layer_ropes"] = tuple(int(window is not None) for window in fields["layer_windows"])
    return DecoderSpec(**fields, qk_norm="head", logit_softcap=optional(config, "final_logit_softcapping"))


def two_ropes(config: dict[str, Any]) -> list[dict[str, Any]]:
    """The parameters of the layers that see all, and of those with a window."""
    given, scaling = config.get("rope_parameters") or {}, config.get("rope_scaling") or {}
    if not isinstance(given, dict) or not isinstance(scaling, dict):
        raise UserError("config.json: rope_parameters and rope_scaling of a Gemma 3 are objects")
    nested = any(kind in given for kind in ("full_attention", "sliding_attention"))
    everywhere = (given.get("full_attention") or {}) if nested else given
    local = (given.get("sliding_attention") or {}) if nested else {}
    thetas = positive(config, "rope_theta", 1e6), positive(config, "rope_local_base_freq", 10_000.0)
    return [{"rope_theta": thetas[0]} | everywhere | scaling, {"rope_theta": thetas[1]} | local]


def _fields(config: dict[str, Any], period: int) -> dict[str, Any]:
    """What both have; every `period`-th layer sees all, the others a window."""
    refuse(config, "use_bidirectional_attention")
    fields = decoder_fields(config)
    layers = fields["num_hidden_layers"]
    sliding = layer_types(config, [(layer + 1) % period != 0 for layer in range(layers)])
    return fields | {
        "layer_windows": windows(config, sliding),
        "attention_scales": (positive(config, "query_pre_attn_scalar", 256) ** -0.5,) * layers,
        "hidden_act": activation(config, "hidden_activation", default="gelu_pytorch_tanh"),
        "norm": "rms_plus_one",
        "post_norms": True,
        "embedding_scale": fields["hidden_size"] ** 0.5,
    }
