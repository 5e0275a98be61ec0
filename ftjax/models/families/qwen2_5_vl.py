"""Qwen2.5-VL: a Qwen2 whose tokens have three positions, and a ViT over images of any size, in windows."""

from typing import Any

from ftjax.errors import UserError
from ftjax.models.families.fields import activation, layer_count, object_of, positive, refuse, shorten, size, token_id
from ftjax.models.families.tower_shared import of_layers
from ftjax.models.spec import Vision

_PARTS = {"kernel": "weight", "bias": "bias"}
# Of Qwen2.5-VL, besides the language model's.
_TOKENS = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id", "vision_token_id")
_MODULES = {
    "norm1": "norm1",
    "norm2": "norm2",
    "self_attn/qkv_proj": "attn.qkv",
    "self_attn/o_proj": "attn.proj",
    **{f"mlp/{name}_proj": f"mlp.{name}_proj" for name in ("gate", "up", "down")},
}
NAMES = {
    "vision/patches/weight": "model.visual.patch_embed.proj.weight",
    **of_layers("model.visual.blocks.{}", _MODULES),
    "vision/projector/norm/scale": "model.visual.merger.ln_q.weight",
    **{f"vision/projector/up_proj/{ours}": f"model.visual.merger.mlp.0.{its}" for ours, its in _PARTS.items()},
    **{f"vision/projector/down_proj/{ours}": f"model.visual.merger.mlp.2.{its}" for ours, its in _PARTS.items()},
}
READ_AS = (("visual.", "model.visual."),)
WRITTEN_AS = (("model.visual.", "visual."),)


def language_model(config: dict[str, Any]) -> dict[str, Any]:
    """The config of the Qwen2 inside a Qwen2.5-VL, which published files have flat beside that of the tower.

    Of text alone its three positions are one, and it is a Qwen2.
    """
    if config.get("text_config") is not None:
        inner = object_of(config, "text_config")
    else:
        inner = {name: value for name, value in config.items() if name not in ("vision_config", *_TOKENS)}
    given = inner.get("rope_scaling") or inner.get("rope_parameters")
    if isinstance(given, dict):
        of_text = {name: value for name, value in given.items() if name != "mrope_section"}
        of_text |= {name: "default" for name in ("type", "rope_type") if of_text.get(name) == "mrope"}
        inner = {name: value for name, value in inner.items() if name != "rope_scaling"} | {"rope_parameters": of_text}
    defaults = {"rope_theta": 1e6, "rms_norm_eps": 1e-5, "vocab_size": 152_064}
    return defaults | inner | {"model_type": "qwen2"}


def qwen2_5_vision(config: dict[str, Any]) -> Vision:
    given = object_of(config, "vision_config")
    tower = {name: value for name, value in given.items() if value is not None} | {"model_type": config["model_type"]}
    # Published files have both names of the channels, and neither says another number.
    for name in ("in_channels", "in_chans"):
        refuse(tower, name, harmless=3)
    patch, merge = size(tower, "patch_size", 14), size(tower, "spatial_merge_size", 2)
    width, heads = size(tower, "hidden_size", 3584), size(tower, "num_heads", 16)
    window, layers = size(tower, "window_size", 112), layer_count({"depth": 32} | tower, "depth")
    full = tower.get("fullatt_block_indexes", [7, 15, 23, 31])
    if not isinstance(full, list) or not all(type(layer) is int for layer in full):
        raise UserError(f"config.json: fullatt_block_indexes={shorten(full)} is not a list of numbers of layers")
    if width % heads or width // heads % 4:
        raise UserError(
            f"config.json: vision_config has hidden_size={width} and {heads} heads, whose size is no multiple of 4"
        )
    tokens = window // merge // patch
    if not tokens:
        raise UserError(f"config.json: window_size={window} holds no token of {merge} x {merge} patches of {patch}")
    rope = object_of({"rope_parameters": {}} | tower, "rope_parameters") | {"model_type": config["model_type"]}
    refuse(rope, "rope_type", harmless="axial")
    return Vision(
        family=config["model_type"],
        image_token=token_id(config, "image_token_id", 151_655),
        hidden_size=width,
        intermediate_size=size(tower, "intermediate_size", 3420),
        num_hidden_layers=layers,
        num_attention_heads=heads,
        patch=patch,
        merge=merge,
        hidden_act=activation(tower, "hidden_act"),
        norm="rms",
        norm_eps=1e-6,
        mean=(0.48145466, 0.4578275, 0.40821073),
        std=(0.26862954, 0.26130258, 0.27577711),
        rope_theta=positive(rope, "rope_theta", 10_000.0),
        window=tokens * merge,
        full_layers=tuple(sorted(layer for layer in {*full} if 0 <= layer < layers)),
        frames=size(tower, "temporal_patch_size", 2),
        fused_qkv=True,
        gated=True,
    )


def mrope_sections(config: dict[str, Any]) -> tuple[int, ...]:
    inner = config.get("text_config") or config
    given = inner.get("rope_scaling") or inner.get("rope_parameters") or {}
    sections = given.get("mrope_section", [16, 24, 24])
    if not isinstance(sections, list) or len(sections) != 3 or not all(type(n) is int and n > 0 for n in sections):
        raise UserError(f"config.json: mrope_section={shorten(sections)} is not a list of three numbers of pairs")
    return tuple(sections)
