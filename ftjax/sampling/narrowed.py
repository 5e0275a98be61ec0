"""Kernels kept in bfloat16, for what reads all of them again with every token."""

import jax
import jax.numpy as jnp

from ftjax import lora, quant, tree
from ftjax.models.decoder import Decoder
from ftjax.tree import Tree

_HEAD, _TABLE = "lm_head/kernel", "embed_tokens/embedding"


def narrowed(model: Decoder, variables: Tree) -> Tree:
    """`variables` as products of few rows read them where oneDNN makes the others (`model.matmul`): a third of the
    bytes to move, each once.

    Kernels of layers and of the head are then in panels (see quant.py) in the collection that layers do not split: XLA
    would copy each layer's for every token. A tied head has them beside its table, whose rows stay as they are. Kernels
    whose sizes panels do not divide stay in `params`.
    """
    if model.matmul != "onednn":
        return variables
    leaves, packed, stacks = tree.flatten(variables["params"]), tree.flatten(variables.get("quant", {})), {}

    def pack(module: str, kernel: jax.Array, layers: jax.Array) -> bool:
        fits = kernel.shape[1] % 2 == kernel.shape[2] % 16 == 0
        if fits:
            stacks[f"{module}/panels"], packed[f"{module}/layer"] = _panels(kernel), layers
        return fits

    for path in lora.quantizable(leaves):
        kernel = leaves[path]
        if "/experts/" not in path and pack(path.rpartition("/")[0], kernel, jnp.arange(len(kernel), dtype=jnp.int32)):
            del leaves[path]
    first = jnp.int32(0)
    if _HEAD in leaves and pack("lm_head", leaves[_HEAD][None], first):
        del leaves[_HEAD]
    if model.spec.tie_word_embeddings:
        pack("embed_tokens", leaves[_TABLE].T[None], first)
    collections = {"params": leaves, "quant": packed, quant.STACKS: stacks}
    return variables | {name: tree.unflatten(its) for name, its in collections.items() if its}


_panels = jax.jit(quant.panels)
