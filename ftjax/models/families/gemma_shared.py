"""What Gemma 3n and 4 have in common: per-layer embeddings, and last layers that use the keys and values of others."""

from typing import Any

from ftjax.errors import UserError
from ftjax.models.families.fields import activation, decoder_fields, layer_types, shorten, size, windows
from ftjax.models.spec import PerLayer

_INPUTS = ("embed_tokens_per_layer/embedding", "per_layer_model_projection/kernel", "per_layer_projection_norm/scale")
PER_LAYER_NAMES = {f"per_layer/{path}": f"model.{path.partition('/')[0]}.weight" for path in _INPUTS}


def gemma_fields(config: dict[str, Any], period: int) -> tuple[dict[str, Any], list[bool]]:
    """Arguments of DecoderSpec but for ropes, and whether each layer slides; by default every `period`-th sees all."""
    fields = decoder_fields(config | {"rope_parameters": None, "rope_scaling": None})
    layers = fields["num_hidden_layers"]
    sliding = layer_types(config, [(layer + 1) % period != 0 for layer in range(layers)])
    fields |= {
        "norm": "rms_wide",
        "post_norms": True,
        "qk_norm": "head",
        "v_norm": True,
        "layer_windows": windows(config, sliding),
        "layer_ropes": tuple(int(slides) for slides in sliding),
        "attention_scales": (1.0,) * layers,
        "hidden_act": activation(config, "hidden_activation", default="gelu_pytorch_tanh"),
        "embedding_scale": fields["hidden_size"] ** 0.5,
        "per_layer": _per_layer(config),
    }
    return fields, sliding


def first_shared(config: dict[str, Any], sliding: list[bool]) -> int:
    """The first of the last layers, which have no keys and values of their own."""
    layers, shared = len(sliding), config.get("num_kv_shared_layers") or 0
    if shared and (size(config, "num_kv_shared_layers") >= layers or {*sliding[: layers - shared]} != {*sliding}):
        raise UserError(
            f"config.json: num_kv_shared_layers={shorten(shared)} of {layers} layers leaves none before them of each "
            "of layer_types, whose keys and values they could use"
        )
    return layers - shared


def lender(sliding: list[bool], own: int, layer: int) -> int:
    """Of the `own` first layers the last that sees as much as `layer` does."""
    return max(other for other in range(own) if sliding[other] == sliding[layer])


def _per_layer(config: dict[str, Any]) -> PerLayer | None:
    if config["hidden_size_per_layer_input"] in (0, None):
        return None
    rows = size(config, "vocab_size_per_layer_input", 262_144)
    return PerLayer(rows, size(config, "hidden_size_per_layer_input"))
