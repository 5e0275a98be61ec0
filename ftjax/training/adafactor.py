"""Adafactor (Shazeer and Stern 2018, arXiv 1804.04235) over stacked layers.

optax's takes the two longest axes of an array for rows and columns. Of a stack [layers, in, out] those may be layers
and inputs, and its clipping would be by the size of all layers together. Here each layer's matrix is one.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from ftjax import tree
from ftjax.tree import Tree

DECAY = 0.8  # the second moment's rate in step t is 1 - t^-DECAY
SMALLEST = 1e-30  # added to squared gradients


class FactoredState(NamedTuple):
    """Second moments, float32: of matrices [..., in, out] the means over their rows and columns, of others all."""

    count: jax.Array  # int32 scalar: steps done
    rows: Tree  # [..., in]
    columns: Tree  # [..., out]
    whole: Tree


def scale_by_factored_moments(is_matrix: Callable[[str], bool]) -> optax.GradientTransformation:
    """Gradients over the root of their second moment, each matrix or vector clipped to a root mean square of 1.

    As transformers' Adafactor with scale_parameter=False and relative_step=False, which its Trainer uses: the learning
    rate is absolute. is_matrix: of the paths, which belong to matrices; of the others the last axis is a vector.
    """

    def init(params: Tree) -> FactoredState:
        leaves = tree.flatten(params)
        matrices = {path: leaf for path, leaf in leaves.items() if is_matrix(path)}
        rows = {path: jnp.zeros(leaf.shape[:-1], jnp.float32) for path, leaf in matrices.items()}
        columns = {path: jnp.zeros(_without_rows(leaf.shape), jnp.float32) for path, leaf in matrices.items()}
        whole = {path: jnp.zeros(leaf.shape, jnp.float32) for path, leaf in leaves.items() if path not in matrices}
        return FactoredState(jnp.zeros((), jnp.int32), *map(tree.unflatten, (rows, columns, whole)))

    def update(updates: Tree, state: FactoredState, params: Tree | None = None) -> tuple[Tree, FactoredState]:
        count = state.count + 1
        rate = 1.0 - count.astype(jnp.float32) ** -DECAY
        rows, columns, whole = (tree.flatten(part) for part in state[1:])
        out = {}
        for path, gradient in tree.flatten(updates).items():
            squares = gradient * gradient + SMALLEST
            if path in rows:
                rows[path] = rate * rows[path] + (1 - rate) * squares.mean(-1)
                columns[path] = rate * columns[path] + (1 - rate) * squares.mean(-2)
                of_rows = jax.lax.rsqrt(rows[path] / rows[path].mean(-1, keepdims=True))
                scaled = gradient * of_rows[..., None] * jax.lax.rsqrt(columns[path])[..., None, :]
            else:
                whole[path] = rate * whole[path] + (1 - rate) * squares
                scaled = gradient * jax.lax.rsqrt(whole[path])
            own = (-2, -1) if path in rows else (-1,)
            size = jnp.sqrt((scaled * scaled).mean(own, keepdims=True))
            out[path] = scaled / jnp.maximum(size, 1.0)
        return tree.unflatten(out), FactoredState(count, *map(tree.unflatten, (rows, columns, whole)))

    return optax.GradientTransformation(init, update)


def _without_rows(shape: tuple[int, ...]) -> tuple[int, ...]:
    return (*shape[:-2], shape[-1])
