"""One matrix product per group of rows, for experts: each row is multiplied by the kernel of its group.

TPUs have `jax.lax.ragged_dot` for it. Elsewhere XLA multiplies every row by every kernel (128 times the work for 128
experts), so there the rows are taken in blocks of one group each.
"""

import jax
import jax.numpy as jnp


@jax.custom_vjp
def grouped_matmul(rows: jax.Array, kernels: jax.Array, sizes: jax.Array) -> jax.Array:
    """rows [N, in], the groups one after the other; kernels [groups, in, out]; sizes int32 [groups] -> [N, out].

    Rows after the last group's give zeros and have no part in any gradient.
    """
    out = jax.lax.platform_dependent(rows, kernels, sizes, tpu=jax.lax.ragged_dot, default=_by_blocks)
    return _of_groups(out, sizes)


def _forward(rows, kernels, sizes):
    return grouped_matmul(rows, kernels, sizes), (rows, kernels, sizes)


def _backward(saved, out):
    gradients = jax.lax.platform_dependent(*saved, out, tpu=_ragged_gradients, default=_gradients_by_blocks)
    return _of_groups(gradients[0], saved[2]), gradients[1], None


grouped_matmul.defvjp(_forward, _backward)


def _of_groups(rows: jax.Array, sizes: jax.Array) -> jax.Array:
    """`rows` with zeros after the last group's, where neither way of multiplying says what it leaves."""
    return jnp.where((jnp.arange(rows.shape[0]) < sizes.sum())[:, None], rows, 0)


def _ragged_gradients(rows, kernels, sizes, out):
    return jax.vjp(lambda rows, kernels: jax.lax.ragged_dot(rows, kernels, sizes), rows, kernels)[1](out)


def _by_blocks(rows: jax.Array, kernels: jax.Array, sizes: jax.Array, transposed: bool = False) -> jax.Array:
    """`transposed`: each kernel is used as [out, in]."""
    block = _block(rows, sizes)
    places, count = _places(sizes, block)
    contracted = ((1,), (1 if transposed else 0,))
    padded = jnp.pad(rows, ((0, block), (0, 0)))
    width = kernels.shape[1 if transposed else 2]

    def multiply(i, out):
        group, start, _ = places(i)
        part = jax.lax.dynamic_slice_in_dim(padded, start, block)
        kernel = jax.lax.dynamic_index_in_dim(kernels, group, keepdims=False)
        part = jax.lax.dot_general(part, kernel, (contracted, ((), ())))
        # What it writes beyond its group is overwritten by the next one's first block.
        return jax.lax.dynamic_update_slice_in_dim(out, part.astype(out.dtype), start, axis=0)

    out = jnp.zeros((padded.shape[0], width), rows.dtype)
    return jax.lax.fori_loop(0, count, multiply, out)[: rows.shape[0]]


def _gradients_by_blocks(rows, kernels, sizes, out):
    block = _block(rows, sizes)
    places, count = _places(sizes, block)
    padded, padded_out = (jnp.pad(array, ((0, block), (0, 0))) for array in (rows, out))

    def add(i, total):
        group, start, length = places(i)
        part, part_out = (jax.lax.dynamic_slice_in_dim(array, start, block) for array in (padded, padded_out))
        part = jnp.where(jnp.arange(block)[:, None] < length, part, 0)
        product = jax.lax.dot_general(part, part_out, (((0,), (0,)), ((), ())), preferred_element_type=jnp.float32)
        return total.at[group].add(product)

    # Where the kernels are frozen nothing reads this, and XLA leaves the loop out.
    total = jax.lax.fori_loop(0, count, add, jnp.zeros(kernels.shape, jnp.float32))
    return _by_blocks(out, kernels, sizes, transposed=True), total.astype(kernels.dtype)


def _block(rows: jax.Array, sizes: jax.Array) -> int:
    """About half of what a group has on average: larger blocks waste rows, smaller ones are many."""
    average = rows.shape[0] // (2 * sizes.shape[0])
    return min(max(16, 1 << max(average - 1, 0).bit_length()), 512)


def _places(sizes: jax.Array, block: int):
    """(i -> (group, first row, rows of the group from there on) of block i, the number of blocks)."""
    ends = jnp.cumsum(sizes)
    block_ends = jnp.cumsum(-(-sizes // block))

    def place(i):
        group = jnp.searchsorted(block_ends, i, side="right")
        first_block = block_ends[group] - -(-sizes[group] // block)
        start = ends[group] - sizes[group] + (i - first_block) * block
        return group, start, ends[group] - start

    return place, block_ends[-1]
