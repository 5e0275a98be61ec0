"""Gemma 3n text: several residual streams (AltUp), LAuReL, sparse gates, per-layer embeddings, shared keys and values.

`altup_coef_clip` bounds weights while transformers trains; here they are as the optimizer has them.
"""

import statistics
from typing import Any

from ftjax.errors import UserError
from ftjax.models.families.fields import flag, layer_count, optional, rope, shorten, size
from ftjax.models.families.gemma import two_ropes
from ftjax.models.families.gemma_shared import PER_LAYER_NAMES, first_shared, gemma_fields, lender
from ftjax.models.spec import AltUp, DecoderSpec, Kind

_DEFAULTS = {
    "vocab_size": 262_400,
    "hidden_size": 2048,
    "intermediate_size": 16_384,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 256,
    "max_position_embeddings": 32_768,
    "sliding_window": 512,
    "tie_word_embeddings": True,
    "hidden_size_per_layer_input": 256,
    "num_kv_shared_layers": 15,
}
_STREAMS = 16  # at most
NAMES = PER_LAYER_NAMES | {
    f"altup/{name}_{number}/kernel": f"model.{name}.{number}.weight"
    for name in ("altup_projections", "altup_unembed_projections")
    for number in range(_STREAMS)
}


def gemma3n(config: dict[str, Any]) -> DecoderSpec:
    config = _DEFAULTS | config
    layers = layer_count(config)
    sizes = _of_layers(config, "intermediate_size", config["intermediate_size"])
    usual = [0.95 if layers > 10 > layer else 0.0 for layer in range(layers)]
    sparse = _of_layers(config, "activation_sparsity_pattern", usual)
    plain = config | {"intermediate_size": sizes[0]}
    fields, sliding = gemma_fields(plain, period=5)
    if fields["per_layer"] is None:
        raise UserError("config.json: a Gemma 3n without hidden_size_per_layer_input is not supported")
    plain |= {"rope_parameters": None, "rope_scaling": None}
    shape = fields["head_dim"], fields["max_position_embeddings"]
    fields |= {
        "ropes": tuple(rope(plain | {"rope_parameters": its}, *shape) for its in two_ropes(config)),
        "logit_softcap": optional(config, "final_logit_softcapping", 30.0),
        "altup": _streams(config),
        "laurel_rank": size(config, "laurel_rank", 64),
    }
    own, kinds = first_shared(config, sliding), []
    for layer, slides in enumerate(sliding):
        changes, name = {"intermediate_size": size({"intermediate_size": sizes[layer]}, "intermediate_size")}, "dense"
        if sparse[layer]:
            changes["gate_cutoff"], name = _deviations(sparse[layer]), "sparse"
        if layer >= own:
            changes["kv_layer"] = lender(sliding, own, layer)
            name += "_sliding" if slides else "_full"
        kinds.append(Kind(name, tuple(sorted(changes.items()))))
    return DecoderSpec(**fields).with_kinds(kinds)


def _streams(config: dict[str, Any]) -> AltUp:
    streams, active = size(config, "altup_num_inputs", 4), config.get("altup_active_idx") or 0
    if streams > _STREAMS or type(active) is not int or not 0 <= active < streams:
        raise UserError(
            f"config.json: altup_active_idx={shorten(active)} of altup_num_inputs={streams} (2 to {_STREAMS})"
        )
    return AltUp(streams, active, flag(config, "altup_correct_scale", True))


def _of_layers(config: dict[str, Any], name: str, default: Any) -> list[Any]:
    """What a config says once for all layers, or of each."""
    found, layers = default if config.get(name) is None else config[name], layer_count(config)
    found = found if isinstance(found, list | tuple) else [found] * layers
    if len(found) != layers:
        raise UserError(f"config.json: {name} has {len(found)} numbers, for {layers} layers")
    return list(found)


def _deviations(share: Any) -> float:
    """How far above its mean a normal distribution has all but this share of its values."""
    if isinstance(share, bool) or not isinstance(share, int | float) or not 0 < share < 1:
        raise UserError(f"config.json: activation_sparsity_pattern has {shorten(share)}, which is not a share")
    return statistics.NormalDist().inv_cdf(share)
