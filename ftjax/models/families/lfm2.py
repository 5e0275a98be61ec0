"""LFM2: gated short convolutions in the place of attention in most layers."""

from typing import Any

from ftjax.errors import UserError
from ftjax.models.families.fields import attending, decoder_fields, flag, number, positive, shorten, size
from ftjax.models.spec import Convolution, DecoderSpec, Kind

NAMES = {
    "norm/scale": "model.embedding_norm.weight",
    "layers/input_layernorm/scale": "model.layers.{}.operator_norm.weight",
    "layers/post_attention_layernorm/scale": "model.layers.{}.ffn_norm.weight",
    "layers/self_attn/q_norm/scale": "model.layers.{}.self_attn.q_layernorm.weight",
    "layers/self_attn/k_norm/scale": "model.layers.{}.self_attn.k_layernorm.weight",
    "layers/self_attn/o_proj/kernel": "model.layers.{}.self_attn.out_proj.weight",
    "layers/mlp/gate_proj/kernel": "model.layers.{}.feed_forward.w1.weight",
    "layers/mlp/up_proj/kernel": "model.layers.{}.feed_forward.w3.weight",
    "layers/mlp/down_proj/kernel": "model.layers.{}.feed_forward.w2.weight",
}


def lfm2(config: dict[str, Any]) -> DecoderSpec:
    config = {"num_key_value_heads": 8, "max_position_embeddings": 128_000, "tie_word_embeddings": True} | config
    config["rms_norm_eps"] = positive(config, "norm_eps", 1e-5)
    config["tie_word_embeddings"] = flag(config, "tie_embedding", flag(config, "tie_word_embeddings"))
    config["intermediate_size"] = _inner(config, size(config, "block_ff_dim", size(config, "intermediate_size", 12288)))
    fields = decoder_fields(config, default_theta=1_000_000.0)
    spec = DecoderSpec(**fields | {"qkv_bias": False, "o_bias": False}, qk_norm="head")
    convolution = Convolution(size(config, "conv_L_cache", 3), flag(config, "conv_bias"))
    if convolution.taps < 2:
        raise UserError(f"config.json: conv_L_cache={convolution.taps} has to be at least 2")
    named = config.get("full_attn_idxs")
    if named is not None and not isinstance(named, list):
        raise UserError(f"config.json: full_attn_idxs={shorten(named)} is not a list of numbers of layers")
    numbers = range(spec.num_hidden_layers)
    attends = attending(config, "conv", [layer in (numbers if named is None else named) for layer in numbers])
    conv = Kind("conv", (("convolution", convolution),))
    return spec.with_kinds([Kind("full") if full else conv for full in attends])


def _inner(config: dict[str, Any], inner: int) -> int:
    """Columns of the MLP, of the width that the config names."""
    if not flag(config, "block_auto_adjust_ff_dim", True):
        return inner
    multiple, factor = size(config, "block_multiple_of", 256), number(config, "block_ffn_dim_multiplier", 1.0)
    return multiple * -(-int(factor * int(2 * inner / 3)) // multiple)
