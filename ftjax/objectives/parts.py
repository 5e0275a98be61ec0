"""Tokens and the output head in pieces, over a mesh: what every sum over the vocabulary is made of.

The head is used a chunk of columns at a time: that chunk is gathered from the devices it is split over, multiplied by
blocks of this device's own tokens, and let go.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from ftjax.models import onednn
from ftjax.objectives import head as heads
from ftjax.objectives.head import Head
from ftjax.sharding import partition_spec, platform

BLOCK = 2**25  # logits of a device at a time: 128 MiB in float32
COLUMNS = 8192  # of the vocabulary at a time, where the head has to be gathered
# Tokens in a block, at most, where it has not: blocks without a trained token are skipped, and what fills the last one
# up is not. CPUs multiply fewer as fast; only for bfloat16 the head is rounded and rearranged once more for each block.
TOKENS, ON_CPUS = 512, {jnp.dtype("float32"): 128, jnp.dtype("bfloat16"): 256}
LOWEST = -1e30  # a logit that does not count: finite, because the difference of two infinities is NaN


class Chunks(NamedTuple):
    """How the logits are cut: columns of the vocabulary, and tokens in a block. The product is what is held of them."""

    columns: int
    tokens: int


class HeadSplit(NamedTuple):
    """What is split over which mesh axes, () where nothing is."""

    width: tuple[str, ...]  # the model width of the head
    vocabulary: tuple[str, ...]
    tokens: tuple[str, ...]


def placed(head: Head, hidden: jax.Array):
    """(the mesh or None, what it splits, the spec of each array of the head, rank -> the spec of arrays by token).

    hidden [B, T, D] and head, {path: array}, are whole here, outside `shard_map`.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return None, HeadSplit((), (), ()), None, None
    rows, length, _ = partition_spec(("batch", "length", "width"), hidden.shape, mesh)
    specs = {path: partition_spec(heads.axes(path), leaf.shape, mesh) for path, leaf in head.items()}
    kernel = next(path for path in head if path.startswith("params/") and len(heads.axes(path)) == 2)
    vocabulary = specs[kernel][heads.axes(kernel).index("vocab")]
    split = HeadSplit(
        _names(specs[kernel][heads.width_axis(kernel)]), _names(vocabulary), _names(rows) + _names(length)
    )
    return mesh, split, specs, lambda rank: P(rows, length, *[None] * (rank - 2))


def _names(entry: str | tuple[str, ...] | None) -> tuple[str, ...]:
    return () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)


def cut(chunks: Chunks | None, hidden: jax.Array, head: Head, split: HeadSplit) -> Chunks:
    """The given cut or the usual one, for this device's part of hidden [B, T, D] and of the head."""
    here, tokens = columns_of(head), math.prod(hidden.shape[:2])
    if chunks is None:
        columns = min(here, COLUMNS) if split.width else here
        own = ON_CPUS[onednn.operands()] if platform(jax.sharding.get_abstract_mesh()) == "cpu" else TOKENS
        chunks = Chunks(columns, max(BLOCK // columns, 1) if split.width else own)
    return Chunks(min(chunks.columns, here), min(chunks.tokens, tokens))


def columns_of(head: Head) -> int:
    """Of the vocabulary, in this part of a head."""
    paths = (path for path in head if path.startswith("params/"))
    return next(head[path].shape[heads.axes(path).index("vocab")] for path in paths)


def token_index(hidden: jax.Array) -> jax.Array:
    """int32 [B, T]: the index of each token in the whole batch, by which the dropout of an adapter on the head draws.

    Made before `shard_map`, inside which a device would count its own tokens from 0.
    """
    return jnp.arange(math.prod(hidden.shape[:2]), dtype=jnp.int32).reshape(hidden.shape[:2])


def blocks(wanted: jax.Array, size: int) -> tuple[jax.Array, jax.Array]:
    """bool [B, T] -> int32 [blocks, size]: the positions, those that are wanted first; and bool [blocks, size], whether
    one is there and wanted.

    So the tokens that are not trained on, prompts and padding, fill whole blocks, which are then skipped.
    """
    flat = wanted.reshape(-1)
    order = jnp.argsort(~flat, stable=True)
    fill = (0, -flat.size % size)
    return jnp.pad(order, fill).reshape(-1, size), jnp.pad(flat[order], fill).reshape(-1, size)


def back(values: jax.Array, order: jax.Array, real: jax.Array, like: jax.Array) -> jax.Array:
    """values [blocks, tokens, ...] in `order`, int32 [blocks, tokens] -> [B, T, ...], the first two sides of `like`.

    What fills the last block up is dropped.
    """
    count = math.prod(like.shape)
    flat = values.reshape(-1, *values.shape[2:])[:count]
    out = jnp.zeros_like(flat).at[order.reshape(-1)[:count]].set(flat, unique_indices=True)
    return out.reshape(*like.shape, *values.shape[2:])


def part(head: Head, columns: int, start: jax.Array, split: HeadSplit, dtype: jnp.dtype) -> Head:
    """`columns` of the head from `start` on, whole along the model's width; of a matrix in the dtype of its product."""
    exact = any(path.endswith("/lora_magnitude") for path in head)  # DoRA takes norms of what is stored
    out = {}
    for path, leaf in head.items():
        names = heads.axes(path)
        if len(names) == 2 and not exact:
            leaf = leaf.astype(dtype)  # before it travels
        if "vocab" in names:
            leaf = jax.lax.dynamic_slice_in_dim(leaf, start, columns, names.index("vocab"))
        if split.width and (axis := heads.width_axis(path)) is not None:
            leaf = jax.lax.all_gather(leaf, split.width, axis=axis, tiled=True)
        out[path] = leaf
    return out


def add_part(d_head: Head, d_part: Head, start: jax.Array, split: HeadSplit, dtype: jnp.dtype) -> Head:
    """Sums a chunk's gradient over the devices that had other tokens, and adds it in its place."""
    others = tuple(axis for axis in split.tokens if axis not in split.width)
    # Devices that share the tokens but not the width computed the same, and would be summed as if they had not.
    twice = [axis for axis in split.width if axis not in split.tokens]
    out = {}
    for path, new in d_part.items():
        names = heads.axes(path)
        new = jax.lax.psum(new, others) if others else new
        if split.width and (axis := heads.width_axis(path)) is not None:
            if twice:
                new = new / math.prod(jax.lax.axis_size(axis) for axis in twice)
            new = new.astype(dtype)  # as the gradients of the layers travel
            new = jax.lax.psum_scatter(new, split.width, scatter_dimension=axis, tiled=True)
            new = new.astype(jnp.float32)
        elif split.width:
            shared = tuple(axis for axis in split.width if axis in split.tokens)
            new = jax.lax.psum(new, shared) if shared else new
        if "vocab" in names:
            axis = names.index("vocab")
            old = jax.lax.dynamic_slice_in_dim(d_head[path], start, new.shape[axis], axis)
            out[path] = jax.lax.dynamic_update_slice_in_dim(d_head[path], old + new, start, axis)
        else:
            out[path] = d_head[path] + new
    return out


def of_shared(path: str, leaf: jax.Array, split: HeadSplit) -> jax.Array:
    """What is whole on devices that share the vocabulary got a part of its gradient on each."""
    return jax.lax.psum(leaf, split.vocabulary) if split.vocabulary and "vocab" not in heads.axes(path) else leaf


def starts(head: Head, columns: int) -> tuple[jax.Array, jax.Array]:
    """int32 [chunks]: where each begins, and the first column that the one before it did not have.

    Chunks are all of one size, as a scan wants them, so the last one begins early where they do not divide the
    vocabulary; the columns that it has again are masked.
    """
    here = columns_of(head)
    fresh = jnp.arange(0, here, columns, dtype=jnp.int32)
    return jnp.minimum(fresh, here - columns), fresh


def all_columns(head: Head, split: HeadSplit) -> int:
    """Of the whole vocabulary."""
    return columns_of(head) * math.prod(jax.lax.axis_size(axis) for axis in split.vocabulary)


def first_column(head: Head, split: HeadSplit) -> jax.Array | int:
    """Of this device's part of the vocabulary."""
    return jax.lax.axis_index(split.vocabulary) * columns_of(head) if split.vocabulary else 0
