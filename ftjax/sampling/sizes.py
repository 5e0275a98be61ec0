"""How large is what the engine compiles: few sizes, since each takes seconds."""

import math
from collections.abc import Sequence

import jax

from ftjax import sharding
from ftjax.models.decoder import Decoder

STOPS = 8  # stop tokens that rows have room for, so that calls with others compile nothing
CAPACITY = 128  # tokens of a slot at first; doubled when a row needs more
LENGTHS = 32  # the shortest length that prompts are padded to; the others are its doubles
FEW = 2**8  # tokens, with padding, that are read so fast that only compiling counts


def capacity(length: int, model: Decoder) -> int:
    """Tokens of a slot for rows of `length`: few sizes, since each is compiled."""
    return _within(_doubled(CAPACITY, length), length, model)


def at_first(longest: int) -> int:
    """The tokens that slots have room for at first, of whose rows the longest may have so many: not a size less than it
    needs in the end, which would be compiled for nothing; nor one that is much larger, as few rows reach it.
    """
    return min(longest, 2 * CAPACITY)


def padded(length: int, rows: int, model: Decoder) -> int:
    """The length that so many prompts are padded to, the longest of which has `length` tokens.

    A double of LENGTHS where there are few tokens; for many, padding would cost more than compiling four times as many
    lengths.
    """
    size = _doubled(LENGTHS, length)
    if rows * size > FEW:
        size = -(-length // (size // 8)) * (size // 8)
    return _within(size, length, model)


def _doubled(size: int, least: int) -> int:
    """`size`, doubled until it is `least`."""
    while size < least:
        size *= 2
    return size


def _within(size: int, least: int, model: Decoder) -> int:
    """`size`, or what there is where the model has fewer positions; never less than `least`."""
    return max(min(size, model.spec.max_position_embeddings), least)


def coarse(count: int, most: int) -> int:
    """A number of rows for `count` of them: few are compiled."""
    return min(2 ** math.ceil(math.log2(count)), most)


def most_stops(stop_tokens: Sequence[int]) -> int:
    """Room for stop tokens: STOPS, doubled until they fit."""
    return max(STOPS, 2 ** math.ceil(math.log2(max(len(stop_tokens), 1))))


def rounded(rows: int, mesh: jax.sharding.Mesh) -> int:
    """`rows`, or a few more: as many for each of the devices that share a batch."""
    parts = 1 if mesh.empty else sharding.row_parts(mesh)
    return math.ceil(rows / parts) * parts
