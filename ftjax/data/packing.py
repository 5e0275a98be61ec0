"""Packing: several documents share a row of T tokens, and none sees another or is cut."""

from bisect import bisect_right, insort
from collections.abc import Sequence

import numpy as np

from ftjax.data.example import Example

# How far ahead of its place in the order an example may be drawn. Changing it changes the batches of every packed run.
WINDOW = 256


def pack(lengths: np.ndarray, capacity: int, order: np.ndarray) -> list[np.ndarray]:
    """Groups examples into rows of at most `capacity` tokens, near their place in `order`.

    Each row starts with the example that has waited longest and is filled with the longest that fits among the next
    WINDOW of the order, so every example comes at most WINDOW examples early and WINDOW rows late. O(n log WINDOW).

    Args:
      lengths: int [N], in tokens, 1 to capacity.
      order: int [n], the examples to pack.

    Returns:
      One array of example indices for each row; every entry of `order` is in exactly one.

    Raises:
      ValueError: a length is not in 1..capacity.
    """
    sizes = np.asarray(lengths)[order].tolist()
    if sizes and not 1 <= min(sizes) <= max(sizes) <= capacity:
        raise ValueError(f"lengths {min(sizes)} to {max(sizes)} do not fit rows of {capacity} tokens")
    waiting: list[tuple[int, int]] = []  # (length, -place), sorted: of two as long, the earlier place is found first
    taken = bytearray(len(sizes))
    oldest = drawn = 0
    rows = []
    while oldest < len(sizes):
        row, free = [], capacity
        while True:
            while drawn < len(sizes) and len(waiting) < WINDOW:
                insort(waiting, (sizes[drawn], -drawn))
                drawn += 1
            if not row:
                at = bisect_right(waiting, (sizes[oldest], -oldest)) - 1
            else:
                at = bisect_right(waiting, (free, 0)) - 1
            if at < 0:
                break
            size, place = waiting.pop(at)
            taken[-place] = 1
            row.append(-place)
            free -= size
        rows.append(np.asarray(order)[row])
        while oldest < len(sizes) and taken[oldest]:
            oldest += 1
    return rows


def fill(examples: Sequence[Example], rows: Sequence[np.ndarray], T: int) -> dict[str, np.ndarray]:
    """The batch of the given rows of example indices; an empty row is all zeros (padding).

    Returns:
      Arrays [len(rows), T]: tokens int32; targets int32, the next token of the same document, else 0; weights
      float32, 1 where the target is trained; positions int32, from 0 in each document; segment_ids int32, 1, 2, ..
      and 0 for padding.

    Raises:
      ValueError: the examples of a row are longer than T together.
    """
    shape = (len(rows), T)
    batch = {name: np.zeros(shape, np.int32) for name in ("tokens", "targets", "positions", "segment_ids")}
    batch["weights"] = np.zeros(shape, np.float32)
    for b, row in enumerate(rows):
        start = 0
        for segment, index in enumerate(row, 1):
            example = examples[index]
            stop = start + len(example.tokens)
            if stop > T:
                raise ValueError(f"row {b} has {stop} or more tokens, more than {T}")
            batch["tokens"][b, start:stop] = example.tokens
            batch["targets"][b, start : stop - 1] = example.tokens[1:]
            batch["weights"][b, start : stop - 1] = example.trained[1:]
            batch["positions"][b, start:stop] = np.arange(stop - start)
            batch["segment_ids"][b, start:stop] = segment
            start = stop
    return batch
