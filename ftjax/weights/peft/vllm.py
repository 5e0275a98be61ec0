"""Adapters as vLLM wants them: plain LoRA of linear layers, of one rank and one alpha.

vLLM refuses modules_to_save and DoRA, ignores rank_pattern and alpha_pattern, and has a largest rank, 16 unless it is
started with another --max-lora-rank.
"""

from collections.abc import Collection

import jax.numpy as jnp

from ftjax import tree
from ftjax.errors import UserError
from ftjax.tree import Tree
from ftjax.weights.peft.keys import EMBEDDING, HEAD

MAX_RANK = 16


def uniform(adapters: Tree, saved: Collection[str], max_rank: int = MAX_RANK) -> Tree:
    """The `lora` collection with one rank and scale 1: scales go into B, and smaller ranks are filled up with zeros.

    PiSSA's adapters become differences here already. saved: the paths trained whole beside them. Raises UserError for
    what vLLM does not do, naming it.
    """
    leaves = tree.flatten(adapters)
    modules = [path.removesuffix("/lora_a") for path in leaves if path.endswith("/lora_a")]
    ranks = {module: leaves[f"{module}/lora_a"].shape[-1] * _times(leaves, module) for module in modules}
    rank = max(ranks.values())
    refused = {
        "modules_to_save": bool(saved),
        "DoRA": any(path.endswith("/lora_magnitude") for path in leaves),
        "an adapter of the embedding or the head": bool({EMBEDDING, HEAD} & set(modules)),
        f"rank {rank} (over --vllm_rank={max_rank}, to be given to vLLM as --max-lora-rank)": rank > max_rank,
    }
    if wrong := [what for what, found in refused.items() if found]:
        raise UserError(f"--vllm: vLLM does not take {', '.join(wrong)}; use --format merged, or peft without --vllm")
    out = {}
    for module in modules:
        a, b, scale = (leaves[f"{module}/{part}"] for part in ("lora_a", "lora_b", "lora_scale"))
        if _times(leaves, module) == 2:
            a = jnp.concatenate([a, leaves[f"{module}/lora_a0"]], axis=-1)
            b = jnp.concatenate([b, -leaves[f"{module}/lora_b0"]], axis=-2)
        b = b * jnp.asarray(scale)[..., None, None]
        missing, before = rank - ranks[module], [(0, 0)] * (a.ndim - 2)
        out[f"{module}/lora_a"] = jnp.pad(a, [*before, (0, 0), (0, missing)])
        out[f"{module}/lora_b"] = jnp.pad(b, [*before, (0, missing), (0, 0)])
        out[f"{module}/lora_scale"] = jnp.ones_like(scale)
    return tree.unflatten(out)


def _times(leaves: dict, module: str) -> int:
    return 2 if f"{module}/lora_a0" in leaves else 1
