"""Kernels and adapters kept in bfloat16, for what reads all of them again with every token."""

import jax
import jax.numpy as jnp

from ftjax import lora, quant, tree
from ftjax.models.adapter import is_plain
from ftjax.models.decoder import Decoder
from ftjax.tree import Tree

_HEAD, _TABLE = "lm_head/kernel", "embed_tokens/embedding"


def narrowed(model: Decoder, variables: Tree) -> Tree:
    """`variables` as what generates multiplies by them where oneDNN makes the other products (`model.matmul`): a
    third of the bytes to move, each once.

    Kernels of layers and of the head are then in panels (see quant.py) in the collection that layers do not split: XLA
    would copy each layer's for every token. A tied head has them beside its table, whose rows stay as they are. Kernels
    whose sizes panels do not divide stay in `params`. What adapts a kernel in panels is in panels as well, by itself:
    in the sum of both, of which bfloat16 keeps eight bits, a small change would be lost. DoRA's stays as it is.
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
    adapters = {}
    for module, its in tree.by_module(variables.get("lora", {})).items():
        if f"{module}/panels" in stacks and module != "embed_tokens" and is_plain(its, None):
            a, b = _of_adapter(its["lora_a"], its["lora_b"], its["lora_scale"])
            stacks |= {f"{module}/a_panels": a, f"{module}/b_panels": b}
        else:
            adapters |= {f"{module}/{name}": leaf for name, leaf in its.items()}
    collections = {"params": leaves, "quant": packed, quant.STACKS: stacks, "lora": adapters}
    others = {name: its for name, its in variables.items() if name not in collections}
    return others | {name: tree.unflatten(its) for name, its in collections.items() if its}


_panels = jax.jit(quant.panels)


@jax.jit
def _of_adapter(a: jax.Array, b: jax.Array, scale: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The panels of A [layers, in, r] and of B [layers, r, out] times its scale [layers], with zeros up to a rank that
    panels can have. Outside of layers there is no `layers`."""
    b, more = b * scale[..., None, None], (0, -a.shape[-1] % 16)
    a, b = (x.reshape(-1, *x.shape[-2:]) for x in (a, b))
    return quant.panels(jnp.pad(a, ((0, 0), (0, 0), more))), quant.panels(jnp.pad(b, ((0, 0), more, (0, 0))))
