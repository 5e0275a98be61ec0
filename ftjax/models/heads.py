"""Heads that give numbers for each position: the score of a reward model, the value of a critic, logits of classes.

They are a collection of their own, `heads`, beside `params` and `lora`: always trained, in float32, never part of what
the model says. {"score": {"kernel": [D, K]}}
"""

import zlib
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from ftjax import sharding, tree
from ftjax.models.spec import DecoderSpec
from ftjax.tree import Tree

COLLECTION = "heads"
SCORE = "score"  # the head of reward models and classifiers; transformers' name
VALUE = "value"  # of a critic


def abstract_heads(widths: Mapping[str, int], spec: DecoderSpec, mesh: Mesh) -> Tree:
    """The heads as ShapeDtypeStructs with shardings; widths: how many numbers each gives, by its name."""

    def kernel(width: int) -> jax.ShapeDtypeStruct:
        shape = (spec.hidden_size, width)
        return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=sharding.named(mesh, ("embed", None), shape))

    return {name: {"kernel": kernel(width)} for name, width in widths.items()}


def init_heads(abstract: Tree, seed: int) -> Tree:
    """Gaussian kernels with variance 1 / (D + 1), as the reward heads of Stiennon et al. (2020, appendix B.1) have.

    That of a critic is 0: where it knows nothing yet, its values are to be no noise in the advantages.
    """
    leaves = tree.flatten(abstract)

    def make():
        keys = {path: jax.random.fold_in(jax.random.key(seed), zlib.crc32(path.encode())) for path in leaves}
        return {
            path: jax.random.normal(keys[path], leaf.shape, leaf.dtype) * (leaf.shape[0] + 1) ** -0.5
            for path, leaf in leaves.items()
        } | {path: jnp.zeros(leaf.shape, leaf.dtype) for path, leaf in leaves.items() if path.startswith(f"{VALUE}/")}

    return tree.unflatten(jax.jit(make, out_shardings={path: leaf.sharding for path, leaf in leaves.items()})())


def values(variables: Tree, name: str, hidden: jax.Array) -> jax.Array:
    """float32 [B, T, K]: what the head `name` gives for hidden states [B, T, D]."""
    kernel = variables[COLLECTION][name]["kernel"]
    return jnp.matmul(hidden.astype(jnp.float32), kernel, precision="highest")
