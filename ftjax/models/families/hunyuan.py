"""Hunyuan: norms of queries and keys after RoPE, whose base is stretched by a fixed `alpha`; its mixture."""

import dataclasses
from typing import Any

from ftjax.errors import UserError
from ftjax.models.families.fields import decoder_fields, positive, refuse, shorten, size
from ftjax.models.rope import rope_parameters
from ftjax.models.spec import DecoderSpec, Experts

NAMES = {
    f"layers/self_attn/{ours}/scale": f"model.layers.{{}}.self_attn.{theirs}.weight"
    for ours, theirs in (("q_norm", "query_layernorm"), ("k_norm", "key_layernorm"))
}
_MLP = ("gate_proj", "up_proj", "down_proj")
MOE_NAMES = NAMES | {
    "layers/mlp/router/kernel": "model.layers.{}.mlp.gate.wg.weight",
    **{f"layers/mlp/experts/{name}/kernel": f"model.layers.{{}}.mlp.experts.{{}}.{name}.weight" for name in _MLP},
    **{f"layers/mlp/shared_expert/{name}/kernel": f"model.layers.{{}}.mlp.shared_mlp.{name}.weight" for name in _MLP},
}


def hunyuan(config: dict[str, Any]) -> DecoderSpec:
    refuse(config, "use_cla")  # layers that share keys and values
    config = {"rms_norm_eps": 1e-5} | config
    given = rope_parameters(config)
    if given["rope_type"] == "dynamic" and given.get("alpha"):  # what its files call dynamic is the same at all lengths
        dim = decoder_fields(config | {"rope_scaling": None, "rope_parameters": None})["head_dim"]
        theta = positive(given, "rope_theta", 10_000.0) * positive(given, "alpha", 1.0) ** (dim / max(dim - 2, 1))
        config |= {"rope_scaling": None, "rope_parameters": {"rope_theta": theta}}
    return DecoderSpec(**decoder_fields(config), qk_norm="head", qk_norm_last=True)


def hunyuan_moe(config: dict[str, Any]) -> DecoderSpec:
    for name, harmless in (("use_qk_norm", True), ("num_shared_expert", 1), ("moe_layer_num_skipped", 0)):
        refuse(_alike(config, name), name, harmless)
    spec = hunyuan(config)
    refuse(_alike(config, "moe_intermediate_size"), "moe_intermediate_size", spec.intermediate_size)
    experts = Experts(
        count=size(config, "num_experts", 1),
        per_token=size(_alike(config, "moe_topk"), "moe_topk", 1),
        normalize=True,
        shared=spec.intermediate_size,
    )
    return dataclasses.replace(spec, experts=experts)


def _alike(config: dict[str, Any], name: str) -> dict[str, Any]:
    """`config` with one number for a setting that its files list for each layer; UserError if layers differ."""
    given = config.get(name)
    if not isinstance(given, list):
        return config
    if not given or any(one != given[0] for one in given):
        raise UserError(f"config.json: {name}={shorten(given)} is not the same in all layers, which is not supported")
    return config | {name: given[0]}
