"""How many examples an update sees, how many epochs there are and how long a row is, where the data is to decide."""

import math
from typing import NamedTuple

import numpy as np

from ftjax.data.batch import packing

FEW_UPDATES = 50  # with fewer a run is told that it hardly learns
SEEN = 200  # examples, repeated ones too, that make so many updates in small batches
_ROWS = 16  # rows of full length in a batch, at most
_FULL = 0.9  # of what the best row length fills: the shortest that fills so much is taken
_LENGTHS = 16  # row lengths that are tried, about


class Sizes(NamedTuple):
    """What is settled of a run's batches; 0 is still open."""

    batch_size: int  # rows of a global batch
    row_length: int  # tokens of a row
    epochs: float


class Limits(NamedTuple):
    """What a choice has to keep to.

    Attributes:
      length: tokens of the longest example that there may be.
      packing: whether several examples share a row.
      rows: a batch is a multiple of so many.
      parts: so many devices share the rows of a batch.
      multiple: a row length is a multiple of it, or `length`.
      epochs: the method's usual number, and its largest.
      prefix: tokens that each row has once, whatever examples share it (`beginnings`).
    """

    length: int
    packing: bool
    rows: int
    parts: int
    multiple: int
    epochs: tuple[float, float]
    prefix: int = 0


def choose(given: Sizes, lengths: np.ndarray, count: float, limits: Limits) -> Sizes:
    """`given` with what is open in it chosen.

    An update sees about sqrt(s) / 4 examples, where s is how many the whole run sees: so it has 4 sqrt(s) updates, and
    both grow with the data. 300 examples seen make 69 updates of 4; LIMA's 15,000 make 490 of 31 (it took 32), Alpaca's
    156,000 make 1,580 of 99 (it took 128). A number of steps that is given changes nothing about it.

    Args:
      lengths: int [n], tokens that each example, or of a fair share of them, adds to a row; n > 0.
      count: how many examples an epoch has.
    """
    epochs = given.epochs or usual_epochs(count, limits.epochs)
    seen = count * epochs
    update = math.sqrt(seen) / 4
    if given.batch_size:
        return Sizes(given.batch_size, given.row_length or limits.length, epochs)
    most = max(limits.length, given.row_length)
    length = given.row_length or _row_length(lengths, update * float(lengths.mean()), limits)
    each = rows_of(lengths, length - limits.prefix, limits.packing) / len(lengths) / limits.rows
    units = [round(max(update, 1.0) * each), _ROWS * most // (length * limits.rows), int(seen * each / FEW_UPDATES)]
    return Sizes(limits.rows * max(min(units), 1), length, epochs)


def usual_epochs(count: float, epochs: tuple[float, float]) -> float:
    """The usual number, or as many more, in whole ones, as few examples need for FEW_UPDATES."""
    usual, most = epochs
    return min(max(usual, float(math.ceil(SEEN / max(count, 1)))), most)


def rows_of(lengths: np.ndarray, room: int, packed: bool) -> int:
    """Rows that these examples make, each with room for so many of their tokens."""
    return packing.count_rows(packing.patterns(np.bincount(lengths), room)) if packed else len(lengths)


def _row_length(lengths: np.ndarray, tokens: float, limits: Limits) -> int:
    """The shortest of those that hold every example and fill well. A batch of about `tokens` has a row for each device.

    Shorter rows make batches finer and attention cheaper; without packing they are as long as the longest example.
    """
    step, prefix = limits.multiple, limits.prefix
    first = -(-(prefix + int(lengths.max())) // step) * step
    if not limits.packing or first >= limits.length:
        return min(first, limits.length)
    last = max(first, min(limits.length, prefix + int(tokens / limits.parts)))
    tried = {*range(first, last + 1, step * max(1, (last - first) // (step * _LENGTHS))), last - last % step}
    tried |= {last} & {limits.length}
    sizes = {length: length * rows_of(lengths, length - prefix, True) for length in sorted(tried)}
    return next(length for length, size in sizes.items() if _FULL * size <= min(sizes.values()))
