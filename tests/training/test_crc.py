"""The crc32 of an array from its blocks is zlib's of the whole (the witness), however it is cut."""

import itertools
import zlib

import jax.numpy as jnp
import numpy as np
import pytest

from ftjax.training import crc

SHAPES = [(), (1,), (7,), (96,), (6, 8), (5, 4, 6), (3, 1, 8), (1, 9, 1, 2), (2, 3, 4, 5)]


def cuts(rng, size):
    """Slices that cover an axis once."""
    ends = sorted({0, size, *rng.integers(0, size + 1, rng.integers(0, 4)).tolist()})
    return [slice(low, high) for low, high in itertools.pairwise(ends)]


@pytest.mark.parametrize("dtype", [np.float32, np.int8, jnp.bfloat16, np.float64, np.uint16])
def test_blocks_add_up_to_the_crc32_of_the_whole(dtype):
    rng = np.random.default_rng(0)
    for shape in SHAPES * 8:
        whole = rng.integers(0, 256, (*shape, np.dtype(dtype).itemsize), np.uint8).view(dtype)[..., 0]
        blocks = list(itertools.product(*(cuts(rng, size) for size in shape)))
        parts = [crc.of_block(shape, index, whole[index]) for index in blocks]
        assert crc.of_whole(whole.nbytes, parts) == f"{zlib.crc32(whole.tobytes()):08x}", (shape, blocks)


def test_a_block_left_out_or_moved_shows():
    whole = np.arange(24, dtype=np.int32).reshape(4, 6)
    top, bottom = (slice(0, 2), slice(0, 6)), (slice(2, 4), slice(0, 6))
    right = crc.of_whole(96, [crc.of_block((4, 6), top, whole[top]), crc.of_block((4, 6), bottom, whole[bottom])])
    assert right == f"{zlib.crc32(whole.tobytes()):08x}"
    assert right != crc.of_whole(96, [crc.of_block((4, 6), top, whole[top])])
    assert right != crc.of_whole(
        96, [crc.of_block((4, 6), top, whole[bottom]), crc.of_block((4, 6), bottom, whole[top])]
    )
