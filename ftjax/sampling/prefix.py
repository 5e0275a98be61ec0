"""What waiting prompts begin with, such as a system message or the examples of few-shot prompts, is read once for all.

What a token leaves in the cache depends on nothing after it, so that what all begin with is read of one row, and of
every prompt only what comes after it.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from ftjax.sampling.request import Row
from ftjax.sampling.slots import Read

SHORTEST = 32  # tokens: to leave fewer out makes what is read no shorter by more than its padding
WORTH = 2**10  # tokens that need not be read: fewer take no longer than to compile what goes on from a prefix
AHEAD = 64  # waiting prompts that are looked at
SCORES = 2**22  # of a head, what is read at once by what it sees: attention after a prefix holds them all


class Prefix(NamedTuple):
    """What was read of some prompts' beginning."""

    tokens: np.ndarray  # int32 [length]
    adapter: int  # as in Rows; it was read with that
    long: tuple[bool, ...]  # see Row.long
    read: Read  # of one row, padded

    def begins(self, row: Row, long: tuple[bool, ...]) -> bool:
        """Whether a row goes on from it; the last token of a prompt is read when the next is chosen."""
        prompt, length = row.request.prompt, len(self.tokens)
        alike = row.request.images is None and row.request.row_adapter == self.adapter and long == self.long
        return alike and len(prompt) > length and np.array_equal(prompt[:length], self.tokens)


def holds(length: int, rows: int, width: int) -> bool:
    """Whether the scores of so many rows' next `width` tokens, with padding, after a prefix of `length` can be held."""
    return rows * width * (length + width) <= SCORES


def in_common(prompts: Sequence[np.ndarray]) -> int:
    """How many tokens different prompts, int32 [length] each, begin with that are worth to be read by themselves; else
    0. Never the last of one.
    """
    shortest = min(len(prompt) for prompt in prompts) - 1
    beginnings = np.stack([prompt[:shortest] for prompt in prompts])
    differing = np.flatnonzero((beginnings != beginnings[0]).any(axis=0))
    length = int(differing[0]) if len(differing) else shortest
    return length if length >= SHORTEST and length * (len(prompts) - 1) >= WORTH else 0
