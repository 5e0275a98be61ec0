"""crc32 of an array's bytes from its blocks, which may lie on different hosts: each is digested alone, then XORed.

A crc32 without its initial and final inversion is linear over GF(2): it is the remainder of the message, taken as a
polynomial, after division by the crc's polynomial. So the remainder of the whole is the XOR of the remainders of its
runs of bytes, each multiplied by x^8 for every byte that follows the run. (Williams, "A painless guide to CRC error
detection algorithms", 1993; zlib's `crc32_combine` does the same for two neighbors.) Polynomials are 32-bit numbers
with x^0 in the highest bit.
"""

import functools
import math
import zlib

import numpy as np

_POLYNOMIAL = 0xEDB88320
_ONE = 1 << 31
_X8 = 1 << 23
_INVERTED = 0xFFFFFFFF


def of_block(shape: tuple[int, ...], index: tuple[slice, ...], block: np.ndarray) -> int:
    """What `block`, at `index` of an array of `shape`, contributes to the crc32 of the array's bytes in C order."""
    strides = [math.prod(shape[axis + 1 :]) * block.dtype.itemsize for axis in range(len(shape))]
    starts = [part.indices(size)[0] for part, size in zip(index, shape)]
    # The last axes, as far as the block covers them, are contiguous together with the axis before them: one run.
    first = len(shape)
    while first and block.shape[first - 1] == shape[first - 1]:
        first -= 1
    first = max(first - 1, 0)
    run = math.prod(block.shape[first:]) * block.dtype.itemsize
    rows = np.ascontiguousarray(block).reshape(-1).view(np.uint8).reshape(-1, run)
    remainders = np.array([_remainder(row) for row in rows], np.uint32).reshape(block.shape[:first])
    for stride in reversed(strides[:first]):
        remainders = _joined(remainders, stride)
    last = sum((start + size - 1) * stride for start, size, stride in zip(starts, block.shape[:first], strides))
    end = last + sum(start * stride for start, stride in zip(starts[first:], strides[first:])) + run
    return _times(int(remainders), _power(math.prod(shape) * block.dtype.itemsize - end))


def of_whole(nbytes: int, parts: list[int]) -> str:
    """The crc32 in 8 hex digits of an array of `nbytes`, from what its blocks contribute; they must cover it once."""
    zeros = _times(_INVERTED, _power(nbytes)) ^ _INVERTED
    return f"{functools.reduce(int.__xor__, parts, zeros):08x}"


def _remainder(run: np.ndarray) -> int:
    """The crc32 of bytes without its two inversions."""
    return zlib.crc32(run, _INVERTED) ^ _INVERTED


def _joined(remainders: np.ndarray, stride: int) -> np.ndarray:
    """uint32 [..., n] -> [...]: the remainder of n runs together, which begin `stride` bytes apart.

    Neighbors are joined in pairs, so that NumPy joins many at once.
    """
    while remainders.shape[-1] > 1:
        if remainders.shape[-1] % 2:  # a zero remainder before the first changes nothing
            remainders = np.concatenate([np.zeros_like(remainders[..., :1]), remainders], axis=-1)
        table = _table(stride)
        left, right = remainders[..., 0::2], remainders[..., 1::2]
        for byte in range(4):
            right = right ^ table[byte][(left >> np.uint32(8 * byte)) & np.uint32(255)]
        remainders, stride = right, 2 * stride
    return remainders[..., 0]


@functools.lru_cache(maxsize=512)
def _table(nbytes: int) -> np.ndarray:
    """uint32 [4, 256]: what each byte of a remainder becomes when `nbytes` bytes follow."""
    power = _power(nbytes)
    table = np.zeros((4, 256), np.uint32)
    for bit in range(32):
        byte, bit_of_byte = divmod(bit, 8)
        size = 1 << bit_of_byte
        table[byte, size : 2 * size] = table[byte, :size] ^ np.uint32(_times(1 << bit, power))
    return table


@functools.lru_cache(maxsize=4096)
def _power(nbytes: int) -> int:
    """x^(8 nbytes) modulo the crc's polynomial."""
    out, square = _ONE, _X8
    while nbytes:
        if nbytes & 1:
            out = _times(out, square)
        square = _times(square, square)
        nbytes >>= 1
    return out


def _times(a: int, b: int) -> int:
    """The product of two polynomials modulo the crc's."""
    out = 0
    for bit in range(31, -1, -1):
        if a >> bit & 1:
            out ^= b
        b = b >> 1 ^ (_POLYNOMIAL if b & 1 else 0)
    return out
