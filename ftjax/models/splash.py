"""Splash attention, the Pallas kernel for TPUs that JAX ships: no scores in memory, blocks that see nothing skipped.

It masks by index within a row and by segment. In rows of this project a segment's tokens lie one after the other and
their positions count up by one, so that is the same as masking by position (tests/models/test_kernels.py).
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu import splash_attention as splash
from jax.sharding import AbstractMesh, NamedSharding
from jax.sharding import PartitionSpec as P

from ftjax.models.spec import DecoderSpec

LANES = 128  # the kernel takes lengths in multiples of it
BLOCKS = (512, 256, 128)  # rows and columns of scores at a time; larger ones do not fit the memory of every TPU's core

Kernels = dict[int, Callable[..., jax.Array]]  # by window, in rows that are no longer than the longest


def cannot(spec: DecoderSpec, length: int, parts: int) -> str:
    """What the kernel cannot serve of rows of `length` tokens over `parts` devices; "" if it can."""
    if odd := [width for width in (spec.head_dim, spec.value_dim) if width % 8]:
        return f"heads of {odd[0]} dimensions, not a multiple of 8"
    if parts > 1 and length % (parts * LANES):
        return f"rows of {length} tokens in {parts} parts, which are not multiples of {LANES}"
    return ""


def attention(
    kernels: Kernels,
    queries: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    query_segments: jax.Array,
    key_segments: jax.Array,
    scale: float | jax.Array,
    window: int | jax.Array | None,
    sinks: jax.Array | None,
) -> jax.Array:
    """As models.attention.attention, on one device; `kernels` from `make_kernels`, one for each window there is.

    Queries may be a part of the row, if the kernels are the same part's.
    """
    whole, length = keys.shape[1], queries.shape[1]
    if fill := -whole % LANES:  # only where the row is not split
        queries, keys, values = (jnp.pad(x, ((0, 0), (0, fill), (0, 0), (0, 0))) for x in (queries, keys, values))
        query_segments, key_segments = (jnp.pad(x, ((0, 0), (0, fill))) for x in (query_segments, key_segments))
    queries = queries * jnp.asarray(scale, queries.dtype)
    queries, keys, values = (x.transpose(0, 2, 1, 3) for x in (queries, keys, values))
    segments = splash.SegmentIds(query_segments, key_segments)

    def run(kernel):
        return jax.vmap(lambda q, k, v, segments: kernel(q, k, v, segments, sinks))(queries, keys, values, segments)

    if len(kernels) == 1:
        (kernel,) = kernels.values()
        out = run(kernel)
    else:  # layers differ, and are one scan: each kernel is compiled once, and the layer's own is run
        index = jnp.argmax(jnp.asarray(list(kernels)) == jnp.minimum(window, whole))
        out = jax.lax.switch(index, [functools.partial(run, kernel) for kernel in kernels.values()])
    return out.transpose(0, 2, 1, 3)[:, :length]


def make_kernels(
    windows: tuple[int | None, ...], heads: int, length: int, parts: int, softcap: float | None, interpret: bool = False
) -> Kernels:
    """{window: kernel} for each different one of `windows` in rows of `length` tokens; None is a window of `length`.

    heads: of queries, on one device; parts: how many devices share a row's queries.
    """
    reach = dict.fromkeys(length if window is None else min(window, length) for window in windows)
    return {window: _make_kernel(window, heads, length, parts, softcap, interpret) for window in reach}


def table_specs(kernels: Kernels, mesh: AbstractMesh, parts: str | None):
    """How `kernels` are split for `jax.shard_map` where the mesh axis `parts` splits the queries of a row."""
    where = NamedSharding(mesh, P(None, parts))
    return {window: kernel.manual_sharding_spec(where) for window, kernel in kernels.items()}


def _make_kernel(window, heads, length, parts, softcap, interpret):
    sees_all = window == length
    length += -length % LANES
    shape = (length, length)
    mask = splash.CausalMask(shape) if sees_all else splash.LocalMask(shape, (window - 1, 0), 0)
    rows, columns = _block(length // parts), _block(length)
    blocks = splash.BlockSizes(
        block_q=rows,
        block_kv=columns,
        block_q_dkv=rows,
        block_kv_dkv=columns,
        block_q_dq=rows,
        block_kv_dq=columns,
    )
    return splash.make_splash_mha(  # which remembers the tables of each mask
        splash.MultiHeadMask([mask] * heads),
        block_sizes=blocks,
        head_shards=1,
        q_seq_shards=parts,
        attn_logits_soft_cap=softcap,
        interpret=interpret,
    )


def _block(length: int) -> int:
    return next(block for block in BLOCKS if length % block == 0)
