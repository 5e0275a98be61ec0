"""Sharded arrays filled block by block, so that a host holds only a few blocks besides its own devices' shards.

`filled` walks over all shards at the same time: in each round every shard gets its next block of rows. On accelerators
that makes one round one call of a compiled function, the same for all rounds. Shards that hold the same values, or lie
side by side in the same rows of a tensor, share one reading.
"""

import functools
import itertools
import math
from collections.abc import Callable, Collection, Iterable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

# How many values are read at once: 16 MB of float32, of which a few copies exist while they are cast, checked and laid
# out. Smaller blocks are slower, larger ones not faster.
BLOCK_VALUES = 4 * 2**20

Read = Callable[[tuple[int, ...], tuple[slice, ...]], np.ndarray]


def filled(leaf: jax.ShapeDtypeStruct, read: Read, depth: int = 0, transposed: bool = False) -> jax.Array:
    """The array that `leaf` describes, with values from `read`.

    Its first `depth` dimensions number the tensors that are stacked in it (layer, expert); the others are a tensor's
    own, the last two exchanged if `transposed`. `read(place, index)` returns the part `index` (a slice per dimension)
    of tensor number `place`, in leaf's dtype. It is called only for values that this process's devices hold, and once
    for each value, however many devices hold it. (Tensors that are scalars are read by every process.)

    A leaf without sharding becomes an ordinary array on the default device.
    """
    if leaf.sharding is None:
        local, indices = leaf.shape, {None: (slice(None),) * len(leaf.shape)}
    elif isinstance(leaf.sharding, NamedSharding):
        local = leaf.sharding.shard_shape(leaf.shape)
        indices = leaf.sharding.addressable_devices_indices_map(leaf.shape)
    else:
        raise ValueError(f"{leaf.sharding} is not a NamedSharding")
    if len(leaf.shape) == depth:
        values = np.stack([read(place, ()) for place in np.ndindex(leaf.shape)]).reshape(leaf.shape)
        if leaf.sharding is None:
            return jnp.asarray(values)
        return jax.make_array_from_callback(leaf.shape, leaf.sharding, lambda index: values[index])
    # From here on dimensions are in the files' order; `order` is its own inverse, so it converts in both directions.
    rank = len(leaf.shape)
    order = [*range(rank - 2), rank - 1, rank - 2] if transposed else list(range(rank))
    shard = tuple(local[i] for i in order)
    starts = {device: tuple(index[i].indices(leaf.shape[i])[0] for i in order) for device, index in indices.items()}
    step = _rows_at_once(shard[depth:], len(set(starts.values())))
    target = _target(leaf, local, starts)
    for offset in itertools.product(*map(range, shard[:depth]), range(0, shard[depth], step)):
        rows = min(step, shard[depth] - offset[-1])
        corner = (*offset, *[0] * (rank - depth - 1))
        blocks = (
            (devices, (block.swapaxes(-1, -2) if transposed else block)[(None,) * depth])
            for devices, block in _blocks(read, starts, offset, (rows, *shard[depth + 1 :]))
        )
        target.write(tuple(corner[i] for i in order), blocks)
    return target.array()


def _rows_at_once(shard: tuple[int, ...], shards: int) -> int:
    """How many rows of every shard make a block: a divisor of its rows if one is near, to compile `_write` once."""
    most = max(1, BLOCK_VALUES // (math.prod(shard[1:]) * shards))
    if most >= shard[0]:
        return shard[0]
    return next((rows for rows in range(most, most // 2, -1) if shard[0] % rows == 0), most)


def _blocks(
    read: Read, starts: dict, offset: tuple[int, ...], size: tuple[int, ...]
) -> Iterator[tuple[list, np.ndarray]]:
    """Yields (devices, their block): of `size`, `offset` after the start of the devices' shard.

    Blocks that lie side by side in the same rows share one reading.
    """
    row = len(offset) - 1  # the dimensions before it number the tensors
    sharing: dict[tuple, dict[tuple[int, ...], list]] = {}  # {(place, first row): {first columns: devices}}
    for device, start in starts.items():
        place = tuple(start[i] + offset[i] for i in range(row))
        columns = sharing.setdefault((place, start[row] + offset[row]), {})
        columns.setdefault(start[row + 1 :], []).append(device)
    for (place, first), columns in sharing.items():
        for group in _boxes(columns, size[1:]):
            lowest = tuple(map(min, zip(*group)))
            index = [slice(low, max(axis) + n) for low, axis, n in zip(lowest, zip(*group), size[1:])]
            values = read(place, (slice(first, first + size[0]), *index))
            for corner in group:
                inner = tuple(slice(start - low, start - low + n) for start, low, n in zip(corner, lowest, size[1:]))
                yield columns[corner], values[(slice(None), *inner)]


def _boxes(corners: Collection[tuple[int, ...]], size: tuple[int, ...]) -> list[list[tuple[int, ...]]]:
    """All corners as one group if blocks of `size` at them fill the box around them, else each alone."""
    box = math.prod(max(axis) - min(axis) + n for axis, n in zip(zip(*corners), size))
    return [list(corners)] if box == len(corners) * math.prod(size) else [[corner] for corner in corners]


def _aligned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An array that JAX on a CPU uses without a copy, which it would make unless memory begins at a multiple of 64."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    space = np.empty(size + 64, np.uint8)
    return space[-space.ctypes.data % 64 :][:size].view(dtype).reshape(shape)


def _copy(out: np.ndarray, values: np.ndarray) -> None:
    """out[...] = values; the transpose of a matrix in slabs of 64 columns.

    Slabs are four times as fast: NumPy writes column by column, and in a large matrix each write misses the cache.
    """
    if values.ndim < 2 or values.strides[-1] <= values.strides[-2]:
        out[...] = values
    else:
        for start in range(0, values.shape[-1], 64):
            out[..., start : start + 64] = values[..., start : start + 64]


def _target(leaf: jax.ShapeDtypeStruct, local: tuple[int, ...], starts: dict) -> "_InHostMemory | _InDeviceMemory":
    platforms = {device.platform for device in starts if device} or {jax.default_backend()}
    return (_InHostMemory if platforms == {"cpu"} else _InDeviceMemory)(leaf, local, starts)


class _InHostMemory:
    """Shards on a CPU, whose memory is the host's: blocks are copied to where they stay.

    (The way of `_InDeviceMemory` works on a CPU too, but there XLA copies the whole shard for each block of bfloat16.)
    """

    def __init__(self, leaf: jax.ShapeDtypeStruct, local: tuple[int, ...], starts: dict):
        self._leaf = leaf
        buffers = {start: _aligned(local, leaf.dtype) for start in set(starts.values())}
        self._shards = {device: buffers[start] for device, start in starts.items()}

    def write(self, corner: tuple[int, ...], blocks: Iterable[tuple[list, np.ndarray]]) -> None:
        for devices, block in blocks:
            window = tuple(slice(start, start + size) for start, size in zip(corner, block.shape))
            _copy(self._shards[devices[0]][window], block)

    def array(self) -> jax.Array:
        shards = [jax.device_put(shard, device) for device, shard in self._shards.items()]
        return _joined(self._leaf.shape, self._leaf.sharding, shards)


class _InDeviceMemory:
    """Shards on accelerators: allocated as zeros, then each block is sent and written in place."""

    def __init__(self, leaf: jax.ShapeDtypeStruct, local: tuple[int, ...], starts: dict):
        self._sharding, self._order = leaf.sharding, list(starts)
        self._parts = tuple(whole // part for whole, part in zip(leaf.shape, local))
        self._array = jax.jit(lambda: jnp.zeros(leaf.shape, leaf.dtype), out_shardings=leaf.sharding)()

    def write(self, corner: tuple[int, ...], blocks: Iterable[tuple[list, np.ndarray]]) -> None:
        sent = {}
        for devices, block in blocks:
            laid_out = _aligned(block.shape, block.dtype)
            _copy(laid_out, block)
            sent |= {device: jax.device_put(laid_out, device) for device in devices}
        self._array.block_until_ready()  # wait for the block before, or blocks would pile up in memory
        shape = tuple(size * parts for size, parts in zip(laid_out.shape, self._parts))
        joined = _joined(shape, self._sharding, [sent[device] for device in self._order])
        self._array = _write(self._array, joined, np.array(corner, np.int32), self._sharding)

    def array(self) -> jax.Array:
        return self._array


def _joined(shape: tuple[int, ...], sharding: NamedSharding | None, shards: list[jax.Array]) -> jax.Array:
    return shards[0] if sharding is None else jax.make_array_from_single_device_arrays(shape, sharding, shards)


@functools.partial(jax.jit, static_argnames="sharding", donate_argnames="array")
def _write(array: jax.Array, blocks: jax.Array, corner: jax.Array, sharding: NamedSharding | None) -> jax.Array:
    """`array` with each device's block written at `corner` (int32 [dimensions]) of its shard, in place by donation."""

    def write(array, block, corner):
        return jax.lax.dynamic_update_slice(array, block, tuple(corner))

    if sharding is None:
        return write(array, blocks, corner)
    spec = sharding.spec
    return jax.shard_map(write, mesh=sharding.mesh, in_specs=(spec, spec, jax.P()), out_specs=spec)(
        array, blocks, corner
    )
