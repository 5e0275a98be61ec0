"""DeepSeek V2 and V3, and what has V3's architecture (Moonlight, and Kimi K2 by another name).

Latent attention, dense layers first, shared experts beside the others. V3 scores these by sigmoids, and adds to each a
correction where they are chosen.
"""

from collections.abc import Sequence
from typing import Any

from ftjax.errors import UserError
from ftjax.models.families.fields import dense_first, flag, latent_fields, positive, refuse, shorten, size
from ftjax.models.spec import DecoderSpec, Experts, Kind

_MLP = ("gate_proj", "up_proj", "down_proj")
NAMES = {
    "layers/mlp/router/kernel": "model.layers.{}.mlp.gate.weight",
    "layers/mlp/correction": "model.layers.{}.mlp.gate.e_score_correction_bias",
    **{f"layers/mlp/experts/{name}/kernel": f"model.layers.{{}}.mlp.experts.{{}}.{name}.weight" for name in _MLP},
    **{
        f"layers/mlp/shared_expert/{name}/kernel": f"model.layers.{{}}.mlp.shared_experts.{name}.weight"
        for name in _MLP
    },
    **{f"layers/mlp/shared_expert/{name}/bias": f"model.layers.{{}}.mlp.shared_experts.{name}.bias" for name in _MLP},
}
_V2 = {
    "q_lora_rank": 1536,
    "moe_intermediate_size": 1407,
    "n_routed_experts": 64,
    "n_shared_experts": 2,
}
_V3 = {
    "q_lora_rank": 1536,
    "max_position_embeddings": 4096,
    "moe_intermediate_size": 2048,
    "n_routed_experts": 256,
    "num_experts_per_tok": 8,
    "n_group": 8,
    "topk_group": 4,
    "routed_scaling_factor": 2.5,
    "first_k_dense_replace": 3,
}


def deepseek_v2(config: dict[str, Any]) -> DecoderSpec:
    config = _V2 | config
    refuse(config, "scoring_func", harmless="softmax")
    refuse(config, "norm_topk_prob")  # which transformers ignores and DeepSeek's own code does not
    methods = {"greedy": None, "group_limited_greedy": "max"}
    method = config.get("topk_method") or "greedy"
    if method not in methods:
        raise UserError(f"config.json: topk_method={shorten(method)} of a deepseek_v2 model is not greedy in any way")
    experts = _routed(config, normalize=False, group_score=methods[method])
    fields = latent_fields(config) | {"mlp_bias": flag(config, "mlp_bias")}
    return mixture(config, fields, experts, dense_first(config, fields))


def deepseek_v3(config: dict[str, Any]) -> DecoderSpec:
    config = _V3 | config
    refuse(config, "scoring_func", harmless="sigmoid")
    refuse(config, "topk_method", harmless="noaux_tc")
    fields = latent_fields(config)
    return mixture(config, fields, corrected(config), dense_first(config, fields))


def corrected(config: dict[str, Any]) -> Experts:
    """Experts as V3 chooses them."""
    return _routed(config, flag(config, "norm_topk_prob", True), "top2", score="sigmoid", correction=True)


def _routed(config: dict[str, Any], normalize: bool, group_score: str | None, **options) -> Experts:
    """group_score: as of Experts, None where the config's groups do not count."""
    groups = (size(config, "n_group", 1), size(config, "topk_group", 1)) if group_score else (1, 1)
    return Experts(
        count=size(config, "n_routed_experts"),
        per_token=size(config, "num_experts_per_tok", 6),
        normalize=normalize,
        groups=None if groups[0] == 1 else groups,
        group_score=group_score or "top2",
        scale=positive(config, "routed_scaling_factor", 1.0),
        shared=size(config, "n_shared_experts", 1) * size(config, "moe_intermediate_size"),
        **options,
    )


def mixture(config: dict[str, Any], fields: dict[str, Any], experts: Experts, dense: Sequence[bool]) -> DecoderSpec:
    """The decoder of `fields`, with experts in the layers that are not `dense`."""
    alone = Kind("dense", (("intermediate_size", fields["intermediate_size"]), ("experts", None)))
    sizes = {"intermediate_size": size(config, "moe_intermediate_size")}
    return DecoderSpec(**fields | sizes, experts=experts).with_kinds(
        [alone if its else Kind("sparse") for its in dense]
    )
