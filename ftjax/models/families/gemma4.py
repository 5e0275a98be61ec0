"""Gemma 4 text: layers of two shapes, per-layer embeddings, last layers that use the keys and values of others."""

import dataclasses
from typing import Any

from ftjax.errors import UserError
from ftjax.models.families.fields import flag, optional, refuse, rope, shorten, size
from ftjax.models.families.gemma_shared import PER_LAYER_NAMES, first_shared, gemma_fields, lender
from ftjax.models.spec import DecoderSpec, Experts, Kind

_DEFAULTS = {
    "vocab_size": 262_144,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "max_position_embeddings": 131_072,
    "sliding_window": 512,
    "tie_word_embeddings": True,
    "hidden_size_per_layer_input": 256,
}
_ROPES = {
    "full_attention": {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1e6},
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
}
NAMES = {
    **PER_LAYER_NAMES,
    "layers/layer_scalar": "model.layers.{}.layer_scalar",
    "layers/router/scale": "model.layers.{}.router.scale",
    **{f"layers/experts/{name}/kernel": f"model.layers.{{}}.experts.{name}" for name in ("gate_up_proj", "down_proj")},
}


def gemma4(config: dict[str, Any]) -> DecoderSpec:
    config = _DEFAULTS | config
    if config.get("use_bidirectional_attention") != "vision":  # which is of images alone
        refuse(config, "use_bidirectional_attention")
    if isinstance(config.get("layer_types"), list):  # the last layer sees all, whatever is said, as in transformers
        config["layer_types"] = [*config["layer_types"][:-1], "full_attention"]
    fields, sliding = gemma_fields(config, period=6)
    if fields["per_layer"] and fields["per_layer"].rows < fields["vocab_size"]:
        raise UserError("config.json: vocab_size_per_layer_input of a Gemma 4 is less than its vocab_size")
    sliding[-1], fields["layer_windows"] = False, (*fields["layer_windows"][:-1], None)
    fields["layer_ropes"] = (*fields["layer_ropes"][:-1], 0)
    shapes = [_shape(config, fields, layer, slides) for layer, slides in enumerate(sliding)]
    heads, ropes = (
        {slides: shapes[sliding.index(slides)] for slides in sliding},
        config.get("rope_parameters") or _ROPES,
    )
    if any(shape != heads[slides] for slides, shape in zip(sliding, shapes)):
        raise UserError(f"config.json: layers of one of layer_types have heads of unlike shapes, {shorten(shapes)}")
    fields["ropes"] = tuple(
        rope(
            config | {"rope_parameters": ropes.get(kind) or _ROPES[kind]},
            heads.get(slides, {"head_dim": 2})["head_dim"],
            fields["max_position_embeddings"],
            partial=not slides,
        )
        for kind, slides in (("full_attention", False), ("sliding_attention", True))
    )
    if flag(config, "enable_moe_block"):
        sizes, shared = (size(config, "num_experts"), size(config, "top_k_experts")), fields["intermediate_size"]
        fields["experts"] = Experts(*sizes, normalize=True, shared=shared, gate="halves", beside=True)
        fields["intermediate_size"] = size(config, "moe_intermediate_size")
    kinds = _kinds(config, fields, sliding, shapes)
    cap = optional(config, "final_logit_softcapping")
    return DecoderSpec(**fields, logit_softcap=cap, layer_scalar=True).with_kinds(kinds)


def _kinds(config: dict[str, Any], fields: dict[str, Any], sliding: list[bool], shapes: list[dict]) -> list[Kind]:
    """Layers that slide and that see all, each with keys and values of its own or, the last ones, those of another."""
    own, wide = first_shared(config, sliding), {"intermediate_size": 2 * fields["intermediate_size"]}
    if experts := fields.get("experts"):
        wide = {"experts": dataclasses.replace(experts, shared=2 * experts.shared)}
    kinds = []
    for layer, slides in enumerate(sliding):
        changes, name = dict(shapes[layer]), "sliding" if slides else "full"
        if layer < own:
            changes |= {"values_are_keys": True} if flag(config, "attention_k_eq_v") and not slides else {}
        else:
            changes["kv_layer"] = lender(sliding, own, layer)
            changes |= wide if flag(config, "use_double_wide_mlp") else {}
            name += "_shared"
        kinds.append(Kind(name, tuple(sorted(changes.items()))))
    return kinds


def _shape(config: dict[str, Any], fields: dict[str, Any], layer: int, slides: bool) -> dict[str, int]:
    """head_dim and num_key_value_heads of a layer, as configs have them since transformers 5.24 and before."""
    its = {} if slides else {"head_dim": config.get("global_head_dim") or 512}
    if flag(config, "attention_k_eq_v") and not slides:  # the number of heads is another only there
        its["num_key_value_heads"] = config.get("num_global_key_value_heads")
    if isinstance(given := config.get("per_layer_config"), dict):
        its = given.get(str(layer)) or {}
    if not isinstance(its, dict) or its.keys() - {"head_dim", "num_key_value_heads"}:
        raise UserError(f"config.json: per_layer_config of layer {layer} is {shorten(its)}, not of heads alone")
    shape = {name: size(its, name, fields[name]) for name in ("head_dim", "num_key_value_heads")}
    if shape["head_dim"] % 2 or fields["num_attention_heads"] % shape["num_key_value_heads"]:
        raise UserError(f"config.json: {fields['num_attention_heads']} heads do not go with {shape} in layer {layer}")
    return shape
