"""A decoder's parameters before they exist: shapes, dtypes, logical axes, shardings."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from ftjax import sharding, tree
from ftjax.models.decoder import Decoder
from ftjax.tree import Tree


def abstract_params(model: Decoder, mesh: Mesh) -> Tree:
    """Nested dict of ShapeDtypeStruct with `.sharding` set for `mesh`; nothing is allocated."""
    axes, out = logical_axes(model), {}
    for path, leaf in tree.flatten(_declared(model)[0]).items():
        where = sharding.named(mesh, axes[path], leaf.shape)
        out[path] = jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where)
    return tree.unflatten(out)


def shapes(model: Decoder) -> dict[str, tuple[int, ...]]:
    """{path: shape}, as the layers declare them."""
    return {path: leaf.shape for path, leaf in tree.flatten(_declared(model)[0]).items()}


def logical_axes(model: Decoder) -> dict[str, tuple[str | None, ...]]:
    """{path: logical axis names, one per dimension}, as the layers declare them."""
    specs = tree.flatten(nn.get_partition_spec(_declared(model)[1]))
    return {path: tuple(spec) for path, spec in specs.items()}


@functools.lru_cache(maxsize=8)  # every command asks for the same several times, and tracing a model takes a while
def _declared(model: Decoder) -> tuple[Tree, Tree]:
    """The shape of every parameter, and the same in boxes with their axes."""

    def init() -> tuple[Tree, Tree]:
        boxes = model.init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32), method=model.init_all)["params"]
        return nn.unbox(boxes), boxes

    return jax.eval_shape(init)
