"""Padding of examples that are not packed: rows of similar length share a batch, and batches have few lengths.

The step is compiled once for each batch length, so there are at most MOST of them, chosen for the data.
"""

import math
from collections.abc import Callable

import numpy as np

MOST = 8  # batch lengths
WINDOW = 256  # batches whose rows are sorted by length together; another number gives a run other batches


def batch_lengths(lengths: np.ndarray, max_length: int, multiple: int = 1) -> tuple[int, ...]:
    """The batch lengths, at most MOST, that pad these examples the least; ascending, the last one holds the longest.

    Each is a multiple of 32 (of 8 if max_length is below 512) and of `multiple`, or max_length itself. They are found
    by dynamic programming over the number of batch lengths.

    Args:
      lengths: int [N], at least one, none above max_length.
    """
    step = math.lcm(32 if max_length >= 512 else 8, multiple)
    step *= -(-max_length // (256 * step))  # at most 256 candidates
    histogram = np.bincount(-(-lengths // step))
    upto = np.cumsum(histogram)  # [n]: how many examples have at most so many steps
    last = len(histogram) - 1
    j, i = np.ogrid[: last + 1, : last + 1]
    # The tokens of all examples of more than i and at most j steps, padded to j steps.
    padded = np.where(i < j, (upto[:, None] - upto[None, :]) * j, np.inf)
    cost, shorter = np.where(np.arange(last + 1) > 0, np.inf, 0.0), []
    for _ in range(MOST):  # each turn allows one more length; cost[j] is the least for the examples of at most j steps
        total = cost[None, :] + padded
        shorter.append(total.argmin(axis=1))
        cost = np.where(np.arange(last + 1) > 0, total.min(axis=1), 0.0)
    chosen, steps = [], last
    while steps:
        chosen.append(min(steps * step, max_length))
        steps = int(shorter.pop()[steps])
    return tuple(chosen[::-1])


def length_of(longest: np.ndarray | int, lengths: tuple[int, ...]) -> np.ndarray:
    """The smallest of the batch `lengths` that is at least `longest`; elementwise."""
    return np.asarray(lengths)[np.searchsorted(lengths, longest)]


def arrange(
    order: np.ndarray, lengths: np.ndarray, batch_size: int, first: int, shuffle: Callable[[int], np.ndarray]
) -> np.ndarray:
    """int [n]: the examples of `order`, rearranged so that those of similar length share a batch.

    Within each WINDOW of batches they are sorted by length and cut into batches; then all batches are shuffled.
    Examples that share a batch with another epoch stay in their position.

    Args:
      order: int [n], indices of examples.
      lengths: int [N], of all examples.
      first: how many of `order` fill the batch that the epoch before has begun.
      shuffle: number of batches -> int, a permutation of them.
    """
    first = min(first, len(order))
    whole = (len(order) - first) // batch_size
    middle = order[first : first + whole * batch_size]
    window = np.arange(len(middle)) // (WINDOW * batch_size)
    batches = middle[np.lexsort((lengths[middle], window))].reshape(whole, batch_size)
    return np.concatenate([order[:first], batches[shuffle(whole)].ravel(), order[first + len(middle) :]])
