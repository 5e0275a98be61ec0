"""Cohere 2 (Command R7B, Command A, Aya): attention beside the MLP, LayerNorm without bias, RoPE where windows are."""

from typing import Any

from ftjax.models.families.fields import decoder_fields, layer_types, number, positive, refuse, size, windows
from ftjax.models.spec import DecoderSpec

_DEFAULTS = {"max_position_embeddings": 8192, "sliding_window": 4096, "tie_word_embeddings": True}


def cohere2(config: dict[str, Any]) -> DecoderSpec:
    refuse(config, "use_qk_norm")
    config = _DEFAULTS | config | {"head_dim": None}  # which transformers takes from the sizes whatever stands here
    fields = decoder_fields(config) | {"norm_eps": positive(config, "layer_norm_eps", 1e-5)}
    period, layers = size(config, "sliding_window_pattern", 4), range(fields["num_hidden_layers"])
    sliding = layer_types(config, [(layer + 1) % period != 0 for layer in layers])
    fields["layer_windows"] = windows(config, sliding)
    fields["layer_ropes"] = tuple(0 if slides else None for slides in sliding)
    return DecoderSpec(
        **fields,
        norm="layer_scale",
        parallel=True,
        rope_interleaved=True,
        logit_scale=number(config, "logit_scale", 0.0625),
    )
