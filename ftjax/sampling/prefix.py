"""What prompts that are read together begin with, such as a system message or the examples of few-shot prompts, is read
once for all of them.

What a token leaves in the cache depends on nothing after it, so the prefix is read of one row, and of each prompt only
the rest. Which prompts are read together does not change by it, and so neither do the number of reads and their memory.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from ftjax.sampling.request import Row
from ftjax.sampling.slots import Read

WORTH = 2**10  # tokens, of all prompts together, that need not be read: fewer take no longer than to compile for it
AHEAD = 64  # waiting prompts that are looked at beside those that are read now
SHORTEST = 32  # tokens of a prefix: by fewer, what is read becomes hardly shorter, as it is padded
LONGEST_REST = 512  # tokens: attention after a prefix holds all their scores


class Prefix(NamedTuple):
    """What was read of some prompts' first tokens."""

    tokens: np.ndarray  # int32 [length]
    adapter: int  # as in Rows; it was read with that
    long: tuple[bool, ...]  # see Row.long
    read: Read  # of one row, padded

    def begins(self, row: Row, long: tuple[bool, ...]) -> bool:
        """Whether the prompt of a row that has no images begins with it, and has one more token at least: the last one
        is read when the next is chosen.
        """
        prompt, length = row.request.prompt, len(self.tokens)
        alike = row.request.row_adapter == self.adapter and long == self.long
        return alike and len(prompt) > length and np.array_equal(prompt[:length], self.tokens)


def gains(length: int, longest: int) -> bool:
    """Whether prompts of up to `longest` tokens are read faster after a prefix of `length`: not where that is a small
    part of them, since attention over whole prompts has better kernels.
    """
    rest = longest - length
    return length >= SHORTEST and rest <= min(2 * length, LONGEST_REST)


def in_common(prompts: Sequence[np.ndarray]) -> int:
    """How many tokens different prompts, int32 [length] each, begin with, all but the last of one at most; 0 where it
    is not worth to read these by themselves.
    """
    shortest = min(len(prompt) for prompt in prompts) - 1
    beginnings = np.stack([prompt[:shortest] for prompt in prompts])
    differing = np.flatnonzero((beginnings != beginnings[0]).any(axis=0))
    length = int(differing[0]) if len(differing) else shortest
    return length if length * (len(prompts) - 1) >= WORTH else 0
