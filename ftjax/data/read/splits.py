"""`split` and `limit` of an entry: which of the records of a source are used."""

import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from ftjax.errors import UserError

_BOUND = r"(-?\d+(?:\.\d+)?%?)?"
_SPLIT = re.compile(rf"([\w.+-]*)(?:\[{_BOUND}:{_BOUND}\])?")


class SplitSlice(NamedTuple):
    """The name of a split and the bounds of a slice of it, as the user wrote them: "", "10", "-10%"."""

    name: str
    start: str = ""
    stop: str = ""

    def range(self, n: int) -> range:
        """The indices of this slice of n records. ValueError for a bound beyond them, as in tfds and datasets."""
        start, stop = _bound(self.start, n), _bound(self.stop, n)
        if any(bound is not None and abs(bound) > n for bound in (start, stop)):
            raise ValueError
        return range(n)[start:stop]

    def __str__(self) -> str:
        return f"{self.name}[{self.start}:{self.stop}]"


def parse_split(split: str, source: str) -> SplitSlice:
    """`train`, `train[:90%]`, `train[100:200]`, or `[-10%:]` for a slice of train; UserError for anything else."""
    match = _SPLIT.fullmatch(split.replace(" ", ""))
    bounds = [bound or "" for bound in match.groups()[1:]] if match else []
    if not match or not split.strip() or any("." in bound and not bound.endswith("%") for bound in bounds):
        raise UserError(f"{source}: {split!r} is no split; write 'train', 'train[:90%]', 'train[100:200]' or '[-10%:]'")
    return SplitSlice(match[1] or "train", *bounds)


def select(n: int, split: SplitSlice, limit: int | None, source: str) -> Sequence[int] | np.ndarray:
    """Indices, rising, of the records of `split` out of n, at most `limit` of them: a range, or int64 where it cuts.

    The limit takes the records whose index in the whole source has the lowest hash: they are spread over all of it,
    the same in every run and for every spelling of the source, and a smaller limit takes a part of what a larger one
    takes.

    Raises:
      UserError: nothing is left.
    """
    try:
        bounds = split.range(n)
    except ValueError:
        raise UserError(f"{source}: the split {split} reaches beyond its {n} rows; give bounds within them") from None
    if not bounds:
        raise UserError(f"{source}: the split {split} holds none of its {n} rows; give other bounds")
    if limit is not None and limit < len(bounds):
        hashes = _hash(np.arange(bounds.start, bounds.stop, dtype=np.uint64))
        highest = np.partition(hashes, limit - 1)[limit - 1]  # the hash is one to one, so no two are equal
        return np.flatnonzero(hashes <= highest) + bounds.start
    return bounds


def _bound(bound: str, n: int) -> int | None:
    if not bound:
        return None
    if not bound.endswith("%"):
        return int(bound)
    if abs(percent := float(bound[:-1])) > 100:
        raise ValueError
    # Rounded to the nearest row, counted from the start: [:90%] ends where [90%:] and [-10%:] begin.
    return round((percent + 100 * bound.startswith("-")) * n / 100)


def _hash(index: np.ndarray) -> np.ndarray:
    """uint64 [n]: splitmix64 (Steele, Lea and Flood 2014) of the indices."""
    z = (index + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))
