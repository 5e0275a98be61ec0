"""OLMo 3: OLMo 2 with windows in three of four layers, whose RoPE is never scaled."""

from typing import Any

from ftjax.errors import UserError
from ftjax.models.families.fields import decoder_fields, layer_types, rope, shorten, windows
from ftjax.models.spec import DecoderSpec

_KINDS = ("full_attention", "sliding_attention")


def olmo3(config: dict[str, Any]) -> DecoderSpec:
    config = {"rms_norm_eps": 1e-5, "sliding_window": 4096} | config
    ropes = _ropes(config)
    config = config | {"rope_parameters": None, "rope_scaling": None}
    fields = decoder_fields(config)
    head_dim, positions = fields["head_dim"], fields["max_position_embeddings"]
    sliding = layer_types(config, [(layer + 1) % 4 != 0 for layer in range(fields["num_hidden_layers"])])
    fields["ropes"] = tuple(rope(config | {"rope_parameters": given}, head_dim, positions) for given in ropes)
    fields["layer_ropes"] = tuple(map(int, sliding))
    fields["layer_windows"] = windows(config, sliding)
    return DecoderSpec(**fields, pre_norms=False, post_norms=True, qk_norm="projection")


def _ropes(config: dict[str, Any]) -> list[dict[str, Any]]:
    """The parameters of the layers that see all, whose `rope_theta` may be at the top, and of those with a window."""
    given, scaling = config.get("rope_parameters") or {}, config.get("rope_scaling") or {}
    if not isinstance(given, dict) or not isinstance(scaling, dict) or given.keys() - set(_KINDS):
        raise UserError(
            f"config.json: rope_parameters of an 'olmo3' model are objects under {' and '.join(_KINDS)}; "
            f"they are {shorten(given)}"
        )
    full, local = ((given.get(kind) or {}) for kind in _KINDS)
    theta = config.get("rope_theta") or 500_000.0
    return [{"rope_theta": theta} | full | scaling, {"rope_theta": 500_000.0} | local]
