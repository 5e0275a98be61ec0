"""SigLIP's vision tower, as Gemma 3 has it: images of one size, and a mean over the patches of a token."""

import math
from typing import Any

from ftjax.errors import UserError
from ftjax.models.families.fields import activation, layer_count, object_of, positive, refuse, size, token_id
from ftjax.models.families.tower_shared import of_layers
from ftjax.models.spec import Vision

_MODULES = {
    "norm1": "layer_norm1",
    "norm2": "layer_norm2",
    **{f"self_attn/{name}_proj": f"self_attn.{name}_proj" for name in "qkv"},
    "self_attn/o_proj": "self_attn.out_proj",
    "mlp/up_proj": "mlp.fc1",
    "mlp/down_proj": "mlp.fc2",
}
NAMES = {
    "vision/patches/weight": "model.vision_tower.embeddings.patch_embedding.weight",
    "vision/patches/bias": "model.vision_tower.embeddings.patch_embedding.bias",
    "vision/positions/embedding": "model.vision_tower.embeddings.position_embedding.weight",
    **of_layers("model.vision_tower.encoder.layers.{}", _MODULES),
    "vision/projector/norm/scale": "model.vision_tower.post_layernorm.weight",
    "vision/projector/norm/bias": "model.vision_tower.post_layernorm.bias",
    "vision/projector/mean_norm/scale": "model.multi_modal_projector.mm_soft_emb_norm.weight",
    "vision/projector/weight": "model.multi_modal_projector.mm_input_projection_weight",
}
# Releases of transformers before 5 had the tower one level deeper, and some all but the head under "model.".
READ_AS = (
    ("model.vision_tower.vision_model.", "model.vision_tower."),
    ("vision_tower.vision_model.", "model.vision_tower."),
    ("vision_tower.", "model.vision_tower."),
    ("multi_modal_projector.", "model.multi_modal_projector."),
)
WRITTEN_AS = (
    ("model.vision_tower.", "vision_tower."),
    ("model.multi_modal_projector.", "multi_modal_projector."),
    ("model.", "language_model.model."),
    ("lm_head.", "language_model.lm_head."),
)


def gemma3_vision(config: dict[str, Any]) -> Vision:
    tower = {"model_type": config["model_type"]} | object_of(config, "vision_config")
    refuse(tower, "num_channels", harmless=3)
    refuse({"vision_use_head": True} | tower, "vision_use_head")  # a head that Gemma 3 has no use for
    patch, heads = size(tower, "patch_size", 16), size(tower, "num_attention_heads", 12)
    grid, tokens = size(tower, "image_size", 224) // patch, size(config, "mm_tokens_per_image", 256)
    side, width = math.isqrt(tokens), size(tower, "hidden_size", 768)
    if side * side != tokens or grid % side:
        raise UserError(
            f"config.json: mm_tokens_per_image={tokens} do not go into {grid} x {grid} patches; they are a square of "
            "equal squares"
        )
    if width % heads:
        raise UserError(f"config.json: vision_config has hidden_size={width}, not a multiple of its {heads} heads")
    return Vision(
        family=config["model_type"],
        image_token=token_id(config, "image_token_index", 262_144),
        hidden_size=width,
        intermediate_size=size(tower, "intermediate_size", 3072),
        num_hidden_layers=layer_count({"num_hidden_layers": 12} | tower),
        num_attention_heads=heads,
        patch=patch,
        merge=grid // side,
        hidden_act=activation(tower, "hidden_act", default="gelu_pytorch_tanh"),
        norm="layer",
        norm_eps=positive(tower, "layer_norm_eps", 1e-6),
        mean=(0.5, 0.5, 0.5),
        std=(0.5, 0.5, 0.5),
        grid=grid,
        patch_bias=True,
        projector="mean",
        two_way=True,
    )
