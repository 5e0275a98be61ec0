"""Batches as a pure function of (seed, index), whatever was asked for before and on how many hosts."""

import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from ftjax.data import packing as packing_lib
from ftjax.data.example import Example
from ftjax.errors import UserError


@dataclass
class Loader:
    """An endless stream of rows of max_length tokens: epoch 0, then epoch 1, and so on, cut into batches.

    Each epoch holds every example once, shuffled and packed by (seed, epoch) alone. A batch may hold the end of one
    epoch and the start of the next, so nothing is skipped or repeated. Asking for any batch in any order, from any
    thread, gives the same arrays; going back to an earlier epoch only costs packing it again.

    Attributes:
      examples: at least one, none longer than max_length.
      batch_size: rows of a global batch: packed rows, or single examples where packing is off.
      max_length: T, the tokens of a row.
      packing: put several examples into a row.
      seed: not negative.
      shuffle: False keeps the order of the examples and allows fewer rows than a batch; for evaluation.

    Raises:
      UserError: no examples; with shuffle, fewer rows in an epoch than batch_size.
      ValueError: an example longer than max_length (`chat.tokenize_all` cuts them), or an argument out of range.
    """

    examples: Sequence[Example]
    batch_size: int
    max_length: int
    packing: bool
    seed: int
    shuffle: bool = True
    _lengths: np.ndarray = field(init=False, repr=False)
    _rows: dict[int, int] = field(init=False, repr=False, default_factory=dict)  # rows of each epoch seen so far
    _plan: tuple[int, list[np.ndarray]] = field(init=False, repr=False, default=(-1, []))  # the last epoch used

    def __post_init__(self):
        if not self.examples:
            raise UserError("the data set has no examples; check data.train and data.eval")
        if self.batch_size < 1 or self.seed < 0:
            raise ValueError(f"batch_size {self.batch_size} must be positive and seed {self.seed} not negative")
        self._lengths = np.array([len(example.tokens) for example in self.examples])
        longest = int(self._lengths.argmax())
        if self._lengths[longest] > self.max_length:
            origin, length = self.examples[longest].origin, self._lengths[longest]
            raise ValueError(f"{origin} has {length} tokens, more than max_length {self.max_length}")
        if self.shuffle and (rows := self.rows_per_epoch(0)) < self.batch_size:
            packed = f", packed into {rows} rows of {self.max_length} tokens" if self.packing else ""
            raise UserError(
                f"the training data ({len(self.examples)} examples{packed}) does not fill one batch of "
                f"{self.batch_size} rows; set data.batch_size to {rows} or less, or add data"
            )

    def batch(self, index: int) -> dict[str, np.ndarray]:
        """Batch `index` (from 0): arrays [batch_size, max_length], as `packing.fill` gives them."""
        epoch, row = self._locate(index * self.batch_size)
        rows: list[np.ndarray] = []
        while len(rows) < self.batch_size:
            plan = self._epoch(epoch)
            rows += plan[row : row + self.batch_size - len(rows)]
            epoch, row = epoch + 1, 0
        return packing_lib.fill(self.examples, rows, self.max_length)

    def eval_batches(self) -> Iterator[dict[str, np.ndarray]]:
        """Every example once, in order, never shuffled; the last batch is filled up with empty rows (all zeros)."""
        rows = self._group(np.arange(len(self.examples)))
        for start in range(0, len(rows), self.batch_size):
            part = rows[start : start + self.batch_size]
            part += [np.zeros(0, int)] * (self.batch_size - len(part))
            yield packing_lib.fill(self.examples, part, self.max_length)

    def rows_per_epoch(self, epoch: int) -> int:
        """Rows of the epoch; with packing it may differ a little between epochs."""
        if epoch not in self._rows:
            self._epoch(epoch)
        return self._rows[epoch]

    def batches_in(self, epochs: float) -> int:
        """How many batches cover the first `epochs` epochs, rounded up; packs each of them once to count its rows."""
        whole = int(epochs)
        rows = self._first_row(whole)
        if epochs > whole:
            rows += math.ceil((epochs - whole) * self.rows_per_epoch(whole))
        return -(-rows // self.batch_size)

    def epoch_at(self, index: int) -> float:
        """How many epochs are done before batch `index`: 0.0 at index 0, 1.5 in the middle of the second."""
        epoch, row = self._locate(index * self.batch_size)
        return epoch + row / self.rows_per_epoch(epoch)

    def packing_efficiency(self) -> float:
        """Share of the places in the rows of epoch 0 that hold a token and not padding."""
        return float(self._lengths.sum() / (self.rows_per_epoch(0) * self.max_length))

    def fingerprint(self) -> str:
        """sha256 (hex) of all that decides the batches: tokens, masks, lengths and the parameters of their order."""
        names = ("batch_size", "max_length", "packing", "seed", "shuffle")
        order = {name: getattr(self, name) for name in names} | {"window": packing_lib.WINDOW, "version": 1}
        digest = hashlib.sha256(json.dumps(order).encode())
        digest.update(self._lengths.astype("<i8").tobytes())
        for example in self.examples:
            digest.update(example.tokens.astype("<i4").tobytes())
            digest.update(example.trained.astype("u1").tobytes())
        return digest.hexdigest()

    def _epoch(self, epoch: int) -> list[np.ndarray]:
        """The rows of an epoch. Only the last used is kept; both caches are replaced whole, so threads may share."""
        cached, rows = self._plan
        if cached != epoch:
            rows = self._group(self._order(epoch))
            self._rows[epoch] = len(rows)
            self._plan = (epoch, rows)
        return rows

    def _order(self, epoch: int) -> np.ndarray:
        if not self.shuffle:
            return np.arange(len(self.examples))
        # NumPy promises that raw bits stay the same in later versions, not that permutations do; 64 bits tie never.
        bits = np.random.PCG64(np.random.SeedSequence([self.seed, epoch])).random_raw(len(self.examples))
        return np.argsort(bits, kind="stable")

    def _group(self, order: np.ndarray) -> list[np.ndarray]:
        if self.packing:
            return packing_lib.pack(self._lengths, self.max_length, order)
        return list(order[:, None])

    def _first_row(self, epoch: int) -> int:
        return sum(self.rows_per_epoch(e) for e in range(epoch))

    def _locate(self, row: int) -> tuple[int, int]:
        """The epoch of a row of the endless stream, and its place in it."""
        epoch = 0
        while row >= (rows := self.rows_per_epoch(epoch)):
            row -= rows
            epoch += 1
        return epoch, row
