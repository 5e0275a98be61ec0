"""Adapters for vLLM: plain LoRA of linear layers, of one rank and one alpha.

vLLM refuses modules_to_save and DoRA, ignores rank_pattern and alpha_pattern, and has a largest rank, 16 unless it is
started with --max-lora-rank.
"""

from collections.abc import Collection

import jax.numpy as jnp

from ftjax import lora, tree
from ftjax.errors import UserError
from ftjax.tree import Tree
from ftjax.weights.peft.adapter import rank_of
from ftjax.weights.peft.experts import is_expert
from ftjax.weights.peft.keys import EMBEDDING, HEAD

MAX_RANK = 16


def uniform(adapters: Tree, saved: Collection[str], max_rank: int = MAX_RANK) -> Tree:
    """The `lora` collection with one rank and scale 1: scales go into B, and smaller ranks are padded with zeros.

    PiSSA's adapters become plain ones of twice the rank. saved: the paths of parameters trained whole beside the
    adapters. Raises UserError, with their names, for features that vLLM does not support.
    """
    modules = tree.by_module(adapters)
    rank = max(map(rank_of, modules.values()))
    refused = {
        "modules_to_save": bool(saved),
        "adapters of experts": any(map(is_expert, modules)),
        "DoRA": any("lora_magnitude" in parts for parts in modules.values()),
        "an adapter of the embedding or the head": bool({EMBEDDING, HEAD} & modules.keys()),
        f"rank {rank} (over --vllm_rank={max_rank}, to be given to vLLM as --max-lora-rank)": rank > max_rank,
    }
    if wrong := [feature for feature, present in refused.items() if present]:
        raise UserError(f"--vllm: vLLM does not take {', '.join(wrong)}; use --format merged, or peft without --vllm")
    out = {}
    for module, parts in modules.items():
        plain = lora.of_whole_base(parts) if "lora_a0" in parts else parts
        a, b, scale = (plain[part] for part in ("lora_a", "lora_b", "lora_scale"))
        b = b * jnp.asarray(scale)[..., None, None]
        missing, before = rank - a.shape[-1], [(0, 0)] * (a.ndim - 2)
        out[f"{module}/lora_a"] = jnp.pad(a, [*before, (0, 0), (0, missing)])
        out[f"{module}/lora_b"] = jnp.pad(b, [*before, (0, missing), (0, 0)])
        out[f"{module}/lora_scale"] = jnp.where(jnp.asarray(scale) == 0, 0.0, 1.0)  # 0: a layer without an adapter
    return tree.unflatten(out)
