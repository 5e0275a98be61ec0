"""Kernels kept in bfloat16, for what reads all of them again with every token."""

import jax
import jax.numpy as jnp

from ftjax import lora, tree
from ftjax.models.decoder import Decoder
from ftjax.tree import Tree

_HEAD, _TABLE = "lm_head/kernel", "embed_tokens/embedding"


def narrowed(model: Decoder, variables: Tree) -> Tree:
    """`variables` as oneDNN's products read them, where `model.matmul` says so: a third of the bytes to move.

    Kernels are then in the `quant` collection as the bits of their bfloat16 values: XLA on CPUs would widen arrays of
    bfloat16 whenever it takes a layer of them. A tied head has the bits beside its table, whose rows stay as they are.
    """
    if model.matmul != "onednn":
        return variables
    leaves, packed = tree.flatten(variables["params"]), tree.flatten(variables.get("quant", {}))
    for path in [path for path in lora.quantizable(leaves) if "/experts/" not in path] + [_HEAD]:
        if path in leaves:
            packed[path.removesuffix("kernel") + "bits"] = _bits(leaves.pop(path))
    if model.spec.tie_word_embeddings:
        packed["embed_tokens/bits"] = _bits(leaves[_TABLE])
    return variables | {"params": tree.unflatten(leaves), "quant": tree.unflatten(packed)}


@jax.jit
def _bits(kernel: jax.Array) -> jax.Array:
    return jax.lax.bitcast_convert_type(kernel.astype(jnp.bfloat16), jnp.uint16)
