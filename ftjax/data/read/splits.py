"""`split` and `limit` of an entry: which of the records of a source are used."""

import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from ftjax.errors import UserError

_BOUND = r"(-?\d+(?:\.\d+)?%?)?"
_SPLIT = re.compile(rf"([\w.+-]*)(?:\[{_BOUND}:{_BOUND}\])?")


class Split(NamedTuple):
    """The name of a split and the bounds of a slice of it, as they were written: "", "10", "-10%"."""

    name: str
    start: str = ""
    stop: str = ""

    def range(self, n: int) -> range:
        """The records of this slice of n. ValueError for a bound beyond them, which tfds and datasets refuse too."""
        start, stop = _bound(self.start, n), _bound(self.stop, n)
        if any(bound is not None and abs(bound) > n for bound in (start, stop)):
            raise ValueError
        return range(n)[start:stop]

    def __str__(self) -> str:
        return f"{self.name}[{self.start}:{self.stop}]"


def parse(split: str, source: str) -> Split:
    """`train`, `train[:90%]`, `train[100:200]`, or `[-10%:]` for a slice of train; UserError for anything else."""
    found = _SPLIT.fullmatch(split.replace(" ", ""))
    bounds = [bound or "" for bound in found.groups()[1:]] if found else []
    if not found or not split.strip() or any("." in bound and not bound.endswith("%") for bound in bounds):
        raise UserError(f"{source}: {split!r} is no split; write 'train', 'train[:90%]', 'train[100:200]' or '[-10%:]'")
    return Split(found[1] or "train", *bounds)


def choose(n: int, split: Split, limit: int | None, source: str) -> Sequence[int] | np.ndarray:
    """The records, rising, of `split` out of n, and of those at most `limit`: a range, or int64 where `limit` cuts.

    The limit takes those with the lowest hash of their index in the whole source: spread over all of it, the same ones
    in every run and however the source is spelled, and the smaller of two limits is part of the larger.

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
        highest = np.partition(hashes, limit - 1)[limit - 1]  # no two are equal: the hash is one to one
        return np.flatnonzero(hashes <= highest) + bounds.start
    return bounds


def _bound(bound: str, n: int) -> int | None:
    if not bound:
        return None
    if not bound.endswith("%"):
        return int(bound)
    if abs(percent := float(bound[:-1])) > 100:
        raise ValueError
    # Round to the nearest row, and from the start, so that [:90%] meets both [90%:] and [-10%:].
    return round((percent + 100 * bound.startswith("-")) * n / 100)


def _hash(index: np.ndarray) -> np.ndarray:
    """uint64 [n]: splitmix64 (Steele, Lea and Flood 2014) of the indices."""
    z = (index + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))
