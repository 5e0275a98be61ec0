"""Nemotron-H and Nemotron 3: each layer is one of Mamba-2, attention without positions, an MLP and a mixture."""

import dataclasses
import math
from typing import Any

from ftjax.errors import UserError
from ftjax.models.families.deepseek import corrected
from ftjax.models.families.fields import activation, decoder_fields, flag, positive, refuse, shorten, size
from ftjax.models.families.mamba_shared import listed_layers, mamba, step_limits
from ftjax.models.spec import DecoderSpec, Kind, Mamba

IGNORED = r"^mtp\."  # the head that guesses further tokens
_LAYER = "backbone.layers.{}."


def _named(ours: str, theirs: str, *names: str) -> dict[str, str]:
    leaves = ("kernel", "weight"), ("bias", "bias")
    return {f"layers/{ours}/{name}/{leaf}": f"{_LAYER}{theirs}.{name}.{its}" for name in names for leaf, its in leaves}


NAMES = {
    "embed_tokens/embedding": "backbone.embeddings.weight",
    "norm/scale": "backbone.norm_f.weight",
    "layers/input_layernorm/scale": f"{_LAYER}norm.weight",
    "layers/post_attention_layernorm/scale": f"{_LAYER}norm.weight",  # of MLPs; a layer has one of the two
    **_named("self_attn", "mixer", "q_proj", "k_proj", "v_proj", "o_proj"),
    **_named("mamba", "mixer", "in_proj", "out_proj"),
    **{
        f"layers/mamba/{name}": f"{_LAYER}mixer.{name.replace('/', '.')}"
        for name in ("A_log", "D", "dt_bias", "conv1d/weight", "conv1d/bias")
    },
    "layers/mamba/norm/scale": f"{_LAYER}mixer.norm.weight",
    **_named("mlp", "mixer", "up_proj", "down_proj"),
    **_named("mlp/shared_expert", "mixer.shared_experts", "up_proj", "down_proj"),
    **_named("mlp/experts", "mixer.experts.{}", "up_proj", "down_proj"),
    "layers/mlp/router/kernel": f"{_LAYER}mixer.gate.weight",
    "layers/mlp/correction": f"{_LAYER}mixer.gate.e_score_correction_bias",
}
_DEFAULTS = {
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 4096,
    "intermediate_size": 21_504,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 7688,
}


def nemotron_h(config: dict[str, Any]) -> DecoderSpec:
    config = _DEFAULTS | config
    for name in ("attention_bias", "mamba_proj_bias", "moe_latent_size", "residual_in_fp32", "sliding_window"):
        refuse(config, name)  # or transformers has the name and does nothing
    refuse(config, "tie_word_embeddings")
    refuse(config, "n_shared_experts", harmless=1)
    names = listed_layers(config)
    act, eps = activation(config, "mlp_hidden_act", default="relu2"), positive(config, "layer_norm_epsilon", 1e-5)
    fields = decoder_fields(config | {"num_hidden_layers": len(names), "hidden_act": act}) | {"norm_eps": eps}
    fields |= {"ropes": (), "layer_ropes": (None,) * len(names), "mlp_bias": flag(config, "mlp_bias")}
    spec = DecoderSpec(**fields, gate=None, norm="rms_wide", only="mlp")
    mixer, own = (("experts", None), ("only", "mixer")), activation(config, "mamba_hidden_act")
    its = (("mamba", _mamba(config | {"hidden_act": own})), ("hidden_act", own))
    kinds = {
        "linear_attention": Kind("mamba", mixer + its),
        "full_attention": Kind("full", mixer),
        "mlp": Kind("mlp", (("experts", None), ("intermediate_size", spec.intermediate_size))),
        "moe": Kind("moe"),
    }
    if "moe" in names:
        width = size(config, "moe_shared_expert_intermediate_size", 7688)
        experts = dataclasses.replace(corrected(config), shared=width)
        spec = dataclasses.replace(spec, experts=experts, intermediate_size=size(config, "moe_intermediate_size"))
    return spec.with_kinds([kinds[name] for name in names])


def _mamba(config: dict[str, Any]) -> Mamba:
    if step_limits(config) != (0.0, math.inf):  # which transformers has and does not use
        raise UserError(f"config.json: time_step_limit={shorten(config['time_step_limit'])} is not supported")
    heads, head_dim = size(config, "mamba_num_heads", 128), size(config, "mamba_head_dim", 64)
    # Those with two names were called by the first in older files.
    sizes = {
        "mamba_n_heads": heads,
        "mamba_d_head": head_dim,
        "mamba_n_groups": size(config, "n_groups", config.get("mamba_n_groups", 8)),
        "mamba_d_state": size(config, "ssm_state_size", 128),
        "mamba_d_conv": size(config, "conv_kernel", config.get("mamba_d_conv", 4)),
        "mamba_conv_bias": flag(config, "use_conv_bias", config.get("mamba_conv_bias", True)),
    }
    bias, least = flag(config, "use_bias"), positive(config, "time_step_min", config.get("mamba_dt_min", 0.001))
    return mamba(config | sizes, heads * head_dim, bias, out_bias=bias, limits=(least, math.inf))
