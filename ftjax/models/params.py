"""A decoder's parameters before they exist: shapes, dtypes, logical axes, shardings."""

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
    for path, leaf in tree.flatten(jax.eval_shape(lambda: nn.unbox(_init(model)))).items():
        where = sharding.named(mesh, axes[path], leaf.shape)
        out[path] = jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where)
    return tree.unflatten(out)


def shapes(model: Decoder) -> dict[str, tuple[int, ...]]:
    """{path: shape}, as the layers declare them."""
    return {path: leaf.shape for path, leaf in tree.flatten(jax.eval_shape(lambda: nn.unbox(_init(model)))).items()}


def logical_axes(model: Decoder) -> dict[str, tuple[str | None, ...]]:
    """{path: logical axis names, one per dimension}, as the layers declare them."""
    specs = tree.flatten(nn.get_partition_spec(jax.eval_shape(lambda: _init(model))))
    return {path: tuple(spec) for path, spec in specs.items()}


def _init(model: Decoder) -> Tree:
    """Every parameter, in a box with its axes."""
    return model.init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32), method=model.init_all)["params"]
