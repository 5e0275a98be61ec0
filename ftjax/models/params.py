"""A decoder's parameters before they exist (shapes, dtypes, shardings), and random ones for tests and scratch runs."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from ftjax import sharding, tree
from ftjax.models.decoder import Decoder
from ftjax.tree import Tree


def abstract_params(model: Decoder, mesh: Mesh) -> Tree:
    """Nested dict of ShapeDtypeStruct with `.sharding` set for `mesh`; nothing is allocated."""
    axes = logical_axes(model)
    leaves = tree.flatten(jax.eval_shape(lambda: _init(model, 0)))
    return tree.unflatten(
        {
            path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding.named(mesh, axes[path], leaf.shape))
            for path, leaf in leaves.items()
        }
    )


def shapes(model: Decoder) -> dict[str, tuple[int, ...]]:
    """{path: shape}, as the layers declare them."""
    return {path: leaf.shape for path, leaf in tree.flatten(jax.eval_shape(lambda: _init(model, 0))).items()}


def logical_axes(model: Decoder) -> dict[str, tuple[str | None, ...]]:
    """{path: logical axis names, one per dimension}, as the layers declare them."""
    specs = tree.flatten(nn.get_partition_spec(jax.eval_shape(lambda: _init_boxed(model, 0))))
    return {path: tuple(spec) for path, spec in specs.items()}


def random_params(model: Decoder, seed: int, abstract: Tree) -> Tree:
    """Random parameters, made where `abstract`'s shardings put them; the same values on any mesh."""
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    return jax.jit(lambda: _init(model, seed), out_shardings=shardings)()


def _init_boxed(model: Decoder, seed: int) -> Tree:
    tokens = jnp.zeros((1, 1), jnp.int32)
    return model.init(jax.random.key(seed), tokens, method=model.init_all)["params"]


def _init(model: Decoder, seed: int) -> Tree:
    return nn.unbox(_init_boxed(model, seed))
