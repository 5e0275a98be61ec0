"""Sharded arrays filled piece by piece, so that a host holds a few pieces besides what its own devices hold."""

import functools
import itertools
import math
from collections.abc import Callable, Iterable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

# How many values are read at once: 16 MB of float32, of which a few copies exist while they are cast, checked and laid
# out. Smaller ones are slower, larger ones not faster.
PIECE = 4 * 2**20

Read = Callable[[tuple[int, ...], tuple[slice, ...]], np.ndarray]


def filled(leaf: jax.ShapeDtypeStruct, read: Read, depth: int = 0, transposed: bool = False) -> jax.Array:
    """The array that `leaf` describes, with what `read` returns in it.

    Its first `depth` dimensions are indices of tensors, the others those of a tensor, in reverse if `transposed`.
    `read(place, index)` returns the part `index` (a slice per dimension) of the tensor at `place` in leaf's dtype. It
    is only called for what this process's devices hold, and once for each value, however many of them hold it.

    A leaf without sharding becomes an ordinary array on the default device.
    """
    if leaf.sharding is None:
        local, indices = leaf.shape, {None: (slice(None),) * len(leaf.shape)}
    elif isinstance(leaf.sharding, NamedSharding):
        local = leaf.sharding.shard_shape(leaf.shape)
        indices = leaf.sharding.addressable_devices_indices_map(leaf.shape)
    else:
        raise ValueError(f"{leaf.sharding} is not a NamedSharding")
    # All that follows is in the order of the tensors' dimensions, which `order` makes of ours and ours of it.
    rank = len(leaf.shape)
    order = [*range(depth), *(reversed(range(depth, rank)) if transposed else range(depth, rank))]
    shard = tuple(local[i] for i in order)
    starts = {device: tuple(index[i].indices(leaf.shape[i])[0] for i in order) for device, index in indices.items()}
    step = _rows_at_once(shard[depth:], len(set(starts.values())))
    target = _target(leaf, local, starts)
    for offset in itertools.product(*map(range, shard[:depth]), range(0, shard[depth], step)):
        rows = min(step, shard[depth] - offset[-1])
        at = (*offset, *[0] * (rank - depth - 1))
        pieces = (
            (devices, (piece.T if transposed else piece)[(None,) * depth])
            for devices, piece in _pieces(read, starts, offset, (rows, *shard[depth + 1 :]))
        )
        target.write(tuple(at[i] for i in order), pieces)
    return target.array()


def _rows_at_once(shard: tuple[int, ...], shards: int) -> int:
    """How many rows of every shard make a piece: a divisor of all its rows if one is near, to compile but once."""
    most = max(1, PIECE // (math.prod(shard[1:]) * shards))
    if most >= shard[0]:
        return shard[0]
    return next((rows for rows in range(most, most // 2, -1) if shard[0] % rows == 0), most)


def _pieces(
    read: Read, starts: dict, offset: tuple[int, ...], size: tuple[int, ...]
) -> Iterator[tuple[list, np.ndarray]]:
    """Yields (devices, their piece): of `size`, `offset` after the start of the devices' shard.

    Pieces that lie side by side in the same rows share one reading.
    """
    *place, row = range(len(offset))
    sharing: dict[tuple, dict[tuple[int, ...], list]] = {}
    for device, start in starts.items():
        here = tuple(start[i] + offset[i] for i in place)
        columns = sharing.setdefault((here, start[row] + offset[row]), {})
        columns.setdefault(start[row + 1 :], []).append(device)
    for (here, first), columns in sharing.items():
        for group in _boxes(columns, size[1:]):
            lowest = tuple(map(min, zip(*group)))
            index = [slice(low, max(axis) + n) for low, axis, n in zip(lowest, zip(*group), size[1:])]
            values = read(here, (slice(first, first + size[0]), *index))
            for corner in group:
                inner = tuple(slice(c - low, c - low + n) for c, low, n in zip(corner, lowest, size[1:]))
                yield columns[corner], values[(slice(None), *inner)]


def _boxes(corners, size: tuple[int, ...]) -> list[list[tuple[int, ...]]]:
    """All corners as one group if pieces of `size` there fill the box around them, else each alone."""
    box = math.prod(max(axis) - min(axis) + n for axis, n in zip(zip(*corners), size))
    return [list(corners)] if box == len(corners) * math.prod(size) else [[corner] for corner in corners]


def _aligned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Memory that JAX on a CPU takes as it is, where it would copy what does not begin at a multiple of 64."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    space = np.empty(size + 64, np.uint8)
    return space[-space.ctypes.data % 64 :][:size].view(dtype).reshape(shape)


def _copy(out: np.ndarray, values: np.ndarray) -> None:
    """out[...] = values; the transpose of a matrix in slabs of 64 columns.

    That is four times as fast: NumPy writes it column by column, and in a large matrix each write misses the cache.
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
    """Shards on a CPU, whose memory is the host's: pieces are copied to where they stay.

    (XLA on a CPU would do as below, but for bfloat16 it goes through the whole shard for each piece.)
    """

    def __init__(self, leaf: jax.ShapeDtypeStruct, local: tuple[int, ...], starts: dict):
        self._leaf = leaf
        buffers = {start: _aligned(local, leaf.dtype) for start in set(starts.values())}
        self._shards = {device: buffers[start] for device, start in starts.items()}

    def write(self, at: tuple[int, ...], pieces: Iterable[tuple[list, np.ndarray]]) -> None:
        for devices, piece in pieces:
            window = tuple(slice(start, start + size) for start, size in zip(at, piece.shape))
            _copy(self._shards[devices[0]][window], piece)

    def array(self) -> jax.Array:
        shards = [jax.device_put(shard, device) for device, shard in self._shards.items()]
        return _joined(self._leaf.shape, self._leaf.sharding, shards)


class _InDeviceMemory:
    """Shards on accelerators: made empty, then each piece is sent and written in place."""

    def __init__(self, leaf: jax.ShapeDtypeStruct, local: tuple[int, ...], starts: dict):
        self._sharding, self._order = leaf.sharding, list(starts)
        self._parts = tuple(whole // part for whole, part in zip(leaf.shape, local))
        self._array = jax.jit(lambda: jnp.zeros(leaf.shape, leaf.dtype), out_shardings=leaf.sharding)()

    def write(self, at: tuple[int, ...], pieces: Iterable[tuple[list, np.ndarray]]) -> None:
        sent = {}
        for devices, piece in pieces:
            laid_out = _aligned(piece.shape, piece.dtype)
            _copy(laid_out, piece)
            sent |= {device: jax.device_put(laid_out, device) for device in devices}
        self._array.block_until_ready()  # the piece before this one, or they would pile up
        shape = tuple(size * parts for size, parts in zip(laid_out.shape, self._parts))
        joined = _joined(shape, self._sharding, [sent[device] for device in self._order])
        self._array = _write(self._array, joined, np.array(at, np.int32), self._sharding)

    def array(self) -> jax.Array:
        return self._array


def _joined(shape: tuple[int, ...], sharding: NamedSharding | None, shards: list[jax.Array]) -> jax.Array:
    return shards[0] if sharding is None else jax.make_array_from_single_device_arrays(shape, sharding, shards)


@functools.partial(jax.jit, static_argnames="sharding", donate_argnames="array")
def _write(array: jax.Array, pieces: jax.Array, at: jax.Array, sharding: NamedSharding | None) -> jax.Array:
    """`array` with each device's piece written at `at` (int32, one per dimension) of its shard, in place."""

    def write(array, piece, at):
        return jax.lax.dynamic_update_slice(array, piece, tuple(at))

    if sharding is None:
        return write(array, pieces, at)
    spec = sharding.spec
    return jax.shard_map(write, mesh=sharding.mesh, in_specs=(spec, spec, jax.P()), out_specs=spec)(array, pieces, at)
