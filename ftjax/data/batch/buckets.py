"""Padding where examples are not packed: rows of similar length in one batch, and few different lengths of batches.

Each length of batch is compiled once, so there are at most MOST of them, chosen for the data.
"""

import math
from collections.abc import Callable

import numpy as np

MOST = 8  # lengths of batches
WINDOW = 256  # batches whose rows are sorted by length together; a change changes the batches of a run


def choose(lengths: np.ndarray, max_length: int, multiple: int = 1) -> tuple[int, ...]:
    """At most MOST lengths, rising, that pad these examples the least; the last one holds the longest.

    They are multiples of 32 where rows may be long, of 8 where they are short, and of `multiple`, or max_length itself.

    Args:
      lengths: int [N], at least one, none above max_length.
    """
    step = math.lcm(32 if max_length >= 512 else 8, multiple)
    step *= -(-max_length // (256 * step))  # at most 256 to choose from
    histogram = np.bincount(-(-lengths // step))
    upto = np.cumsum(histogram)  # examples of up to so many steps
    last = len(histogram) - 1
    j, i = np.ogrid[: last + 1, : last + 1]
    # What it costs to pad all examples above i and up to j steps to j steps.
    padded = np.where(i < j, (upto[:, None] - upto[None, :]) * j, np.inf)
    cost, shorter = np.where(np.arange(last + 1) > 0, np.inf, 0.0), []
    for _ in range(MOST):  # with one length more, the longest of which is j
        total = cost[None, :] + padded
        shorter.append(total.argmin(axis=1))
        cost = np.where(np.arange(last + 1) > 0, total.min(axis=1), 0.0)
    found, at = [], last
    while at:
        found.append(min(at * step, max_length))
        at = int(shorter.pop()[at])
    return tuple(found[::-1])


def length_of(longest: np.ndarray | int, lengths: tuple[int, ...]) -> np.ndarray:
    """The smallest of `lengths` that holds examples of up to `longest` tokens; elementwise."""
    return np.asarray(lengths)[np.searchsorted(lengths, longest)]


def arrange(
    order: np.ndarray, lengths: np.ndarray, batch_size: int, first: int, shuffle: Callable[[int], np.ndarray]
) -> np.ndarray:
    """The examples of `order` such that those of similar length are in one batch.

    Among the next WINDOW batches they are sorted by length and cut into batches; then all batches are shuffled. Those
    that share a batch with another epoch stay as they are.

    Args:
      lengths: int [N], of all examples.
      first: how many of the first examples go into a batch that has been begun.
      shuffle: number of batches -> int, a permutation of them.
    """
    first = min(first, len(order))
    whole = (len(order) - first) // batch_size
    middle = order[first : first + whole * batch_size]
    window = np.arange(len(middle)) // (WINDOW * batch_size)
    batches = middle[np.lexsort((lengths[middle], window))].reshape(whole, batch_size)
    return np.concatenate([order[:first], batches[shuffle(whole)].ravel(), order[first + len(middle) :]])
