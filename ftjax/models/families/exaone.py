"""EXAONE 4: norms after attention and MLP, and of each head; between windows with RoPE layers that see all without."""

from typing import Any

from ftjax.errors import UserError
from ftjax.models.families.fields import decoder_fields, layer_types, shorten, size, windows
from ftjax.models.spec import DecoderSpec


def exaone4(config: dict[str, Any]) -> DecoderSpec:
    config = {"rms_norm_eps": 1e-5, "sliding_window": 4096, "num_key_value_heads": 32} | config
    fields = decoder_fields(config) | {"qkv_bias": False, "o_bias": False}
    hybrid = config["sliding_window"] is not None
    sliding = layer_types(config, _pattern(config, fields["num_hidden_layers"]) if hybrid else fields["layer_windows"])
    fields["layer_windows"] = windows(config, sliding)
    fields["layer_ropes"] = tuple(0 if slides or not hybrid else None for slides in sliding)
    return DecoderSpec(**fields, pre_norms=False, post_norms=True, qk_norm="head")


def _pattern(config: dict[str, Any], layers: int) -> list[bool]:
    """Which layers slide, by a period or by letters for it ("LLLG": local and global)."""
    given = config.get("sliding_window_pattern")
    if not isinstance(given, str):
        period = size(config, "sliding_window_pattern", 4)
        return [(layer + 1) % period != 0 for layer in range(layers)]
    if not given or set(given) - {"L", "G"}:
        raise UserError(f"config.json: sliding_window_pattern={shorten(given)} is neither a number nor letters L and G")
    return [given[layer % len(given)] == "L" for layer in range(layers)]
