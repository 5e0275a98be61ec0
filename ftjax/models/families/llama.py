"""Llama 2, 3 and 3.1-3.3 (TinyLlama, SmolLM2), and SmolLM3, which leaves positions out of some layers."""

from typing import Any

from ftjax.errors import UserError
from ftjax.models.families.fields import decoder_fields, flag, layer_types, refuse, size, windows
from ftjax.models.spec import DecoderSpec


def llama(config: dict[str, Any]) -> DecoderSpec:
    refuse(config, "pretraining_tp", harmless=1)
    refuse(config, "layer_types", harmless=None)
    return DecoderSpec(**decoder_fields(config), mlp_bias=flag(config, "mlp_bias"))


def smollm3(config: dict[str, Any]) -> DecoderSpec:
    config = {"tie_word_embeddings": True, "max_position_embeddings": 32_768, "num_key_value_heads": 4} | config
    fields = decoder_fields(config, default_theta=2_000_000.0)
    layers = range(fields["num_hidden_layers"])
    interval = size(config, "no_rope_layer_interval", 4)
    has_rope = config.get("no_rope_layers")  # despite its name: 1 where a layer has RoPE
    if has_rope is None:
        has_rope = [(layer + 1) % interval != 0 for layer in layers]
    if not isinstance(has_rope, list) or len(has_rope) != len(layers) or not all(one in (0, 1) for one in has_rope):
        raise UserError(f"config.json: no_rope_layers has to have 0 or 1 for each of {len(layers)} layers")
    slides = flag(config, "use_sliding_window") and config.get("sliding_window") is not None
    sliding = layer_types(config, [slides and not has_rope[layer] for layer in layers])
    fields["layer_ropes"] = tuple(0 if has_rope[layer] else None for layer in layers)
    fields["layer_windows"] = windows(config, sliding)
    return DecoderSpec(**fields, mlp_bias=flag(config, "mlp_bias"))
