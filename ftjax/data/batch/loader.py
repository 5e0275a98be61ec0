"""Batches as a pure function of (seed, index), independent of earlier calls and of the number of hosts."""

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from fractions import Fraction

import numpy as np

from ftjax.data.batch import beginnings, buckets, mismatched, packing, patches
from ftjax.data.batch.mismatched import Prompts
from ftjax.data.batch.packing import RowPlan
from ftjax.data.batch.permutation import permutation
from ftjax.data.tokens.examples import Examples
from ftjax.errors import UserError


@dataclass
class Loader:
    """An endless stream of rows: epoch 0, then epoch 1, and so on, cut into batches.

    Each epoch holds the examples of a source as often as its weight says, shuffled and packed by (seed, epoch) alone.
    If a weight is not whole, each epoch takes the next part of the source's own shuffled passes: with 0.5, two epochs
    see each example once. A batch may hold the end of one epoch and the start of the next, or several that are smaller
    than it, so nothing is skipped or repeated. Batches may be requested in any order and from any thread.

    With packing, rows have max_length tokens, and with `shares` they hold what their documents begin with alike only
    once. Without it, a row is one example, examples of similar length share a
    batch, and all rows of a batch have the smallest of `lengths` that holds them.

    With `mismatched`, batches have the arrays of `mismatched.MISMATCHED`, too: prompts with completions of the same
    batch, or in an evaluation of all examples.

    Raises:
      UserError: no examples; with shuffle, none in the first epoch.
      ValueError: an example longer than max_length (`tokenize.tokenize` cuts them), or an argument out of range.
    """

    examples: Examples  # at least one, none longer than max_length
    batch_size: int  # rows of a global batch: packed rows, or single examples without packing
    max_length: int  # T, the most tokens of a row
    packing: bool  # put several examples into a row
    seed: int  # not negative
    shuffle: bool = True  # False is for evaluation: each example once, whatever its weight; they need not fill a batch
    multiple: int = 1  # batch lengths without packing are multiples of it; it changes padding and nothing else
    mismatched: int = 0  # the most tokens of a mismatched document; 0: there are none
    shares: bool = False  # with packing
    lengths: tuple[int, ...] = field(init=False)  # all lengths that batches have
    prompts: Prompts | None = field(init=False, repr=False, default=None)  # with `mismatched`
    alike: beginnings.Beginnings | None = field(init=False, repr=False)  # with `shares`
    _sizes: np.ndarray = field(init=False, repr=False)  # int [N], tokens that each example adds to a row
    _rows: dict[int, int] = field(init=False, repr=False, default_factory=dict)  # rows of each epoch seen so far
    _plan: tuple[int, RowPlan | None] = field(init=False, repr=False, default=(-1, None))  # the last epoch used

    def __post_init__(self) -> None:
        if not len(self.examples):
            raise UserError("the data set has no examples; check data.train and data.eval")
        if self.batch_size < 1 or self.seed < 0:
            raise ValueError(f"batch_size {self.batch_size} must be positive and seed {self.seed} not negative")
        self.alike = beginnings.of(self.examples) if self.shares else None
        self._sizes = self.alike.sizes if self.alike else self.examples.lengths
        longest = int(self._sizes.argmax())
        if (length := self._prefix + self._sizes[longest]) > self.max_length:
            origin = self.examples.origin(longest)
            raise ValueError(f"{origin} has {length} tokens, more than max_length {self.max_length}")
        self._weights = [Fraction(repr(weight)) for weight in self.examples.weights]
        self._sources = [
            np.flatnonzero(self.examples.source_ids == source).astype(np.int32) for source in range(len(self._weights))
        ]
        self.lengths = (self.max_length,)
        if not self.packing:
            self.lengths = buckets.batch_lengths(self.examples.lengths, self.max_length, self.multiple)
        if self.mismatched:
            self.prompts = Prompts.of(self.examples)
        if self.shuffle and not self.rows_per_epoch(0):
            raise UserError("an epoch has no examples; raise the weights of data.train, or add rows")

    @property
    def _prefix(self) -> int:
        return self.alike.prefix if self.alike else 0

    def batch(self, index: int, rows: Sequence[int] | None = None) -> dict[str, np.ndarray]:
        """Batch `index` (from 0): arrays [batch_size, T], as `packing.fill` gives them.

        rows: fill only these rows, those of one host; the others stay padding. None: all.
        """
        plan_rows = self._batch_rows(index)
        return self.fill(plan_rows, rows, self._partners(np.concatenate(plan_rows)))

    def batch_examples(self, index: int) -> np.ndarray:
        """int [n]: the indices of the examples of batch `index`, row by row."""
        return np.concatenate(self._batch_rows(index))

    def batch_tokens(self, index: int) -> int:
        """How many tokens the whole batch holds, without padding; reads none of them."""
        return int(sum(self._prefix + self._sizes[row].sum() for row in self._batch_rows(index)))

    def shared_tokens(self, index: int) -> int:
        """How many more tokens the documents of the batch have by themselves, where they share what they begin with."""
        return int(sum(self.examples.lengths[row].sum() for row in self._batch_rows(index))) - self.batch_tokens(index)

    def eval_batches(self, rows: Sequence[int] | None = None) -> Iterator[dict[str, np.ndarray]]:
        """Every example once, always in the same order; the last batch is filled up with empty rows (all zeros).

        rows: as in `batch`.
        """
        partners = self._partners(np.arange(len(self.examples)))
        for plan_rows in self.eval_rows():
            of_rows = None if partners is None else partners[np.concatenate(plan_rows)]
            yield self.fill(plan_rows, rows, of_rows)

    def eval_rows(self) -> Iterator[list[np.ndarray]]:
        """The indices of the examples in each row of each of `eval_batches`."""
        every = np.arange(len(self.examples))
        by_length = np.argsort(self.examples.lengths, kind="stable")
        plan = self._packed(every, None) if self.packing else _singles(by_length)
        for start in range(0, len(plan), self.batch_size):
            part = [plan[row] for row in range(start, min(start + self.batch_size, len(plan)))]
            yield part + [every[:0]] * (self.batch_size - len(part))

    def without_partner(self, batches: int) -> np.ndarray | None:
        """int [n]: the examples of the first of so many batches whose prompts are all the same; None: there is none."""
        for index in range(batches):
            documents = self.batch_examples(index)
            numbers = self.prompts.numbers[documents]
            if (numbers == numbers[0]).all():
                return documents
        return None

    def rows_per_epoch(self, epoch: int) -> int:
        """Rows of the epoch. The number differs a little between epochs if a weight is not whole."""
        if all(weight.denominator == 1 for weight in self._weights):
            epoch = 0
        if epoch not in self._rows:
            chosen = self._chosen(epoch)
            self._rows[epoch] = packing.count_rows(self._patterns(chosen)) if self.packing else len(chosen)
        return self._rows[epoch]

    def batches_in(self, epochs: float) -> int:
        """How many batches cover the first `epochs` epochs, rounded up."""
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
        """Share of the positions in the rows of epoch 0 that hold a token and not padding."""
        tokens = int(self._sizes[self._chosen(0)].sum(dtype=np.int64))
        if self.packing:
            return (tokens / self.rows_per_epoch(0) + self._prefix) / self.max_length
        lengths = self.examples.lengths[self._epoch(0).order]
        starts = np.arange(0, len(lengths), self.batch_size)
        padded = buckets.length_of(np.maximum.reduceat(lengths, starts), self.lengths)
        return tokens / int((padded * np.diff(starts, append=len(lengths))).sum())

    def fingerprint(self) -> str:
        """sha256 (hex) of all that decides the batches: tokens, masks, tokenizer, template, and the order."""
        names = ("batch_size", "max_length", "packing", "seed", "shuffle")
        order = {name: getattr(self, name) for name in names}
        order |= {"weights": [str(weight) for weight in self._weights], "version": packing.ORDER_VERSION}
        if any(self.examples.replayed):
            order["replayed"] = list(self.examples.replayed)
        if self.mismatched:
            order["mismatched"] = self.mismatched
        if self.shares:
            order["shares"] = True
        sources = hashlib.sha256(np.ascontiguousarray(self.examples.source_ids, "<i4").data).hexdigest()
        return hashlib.sha256(json.dumps([order, self.examples.digest, sources]).encode()).hexdigest()

    def fill(
        self, plan_rows: list[np.ndarray], rows: Sequence[int] | None, partners: np.ndarray | None = None
    ) -> dict[str, np.ndarray]:
        """The batch of which each row has the given examples; rows: as in `batch`.

        partners: int [n], of each of these examples, row by row, the one whose completion its prompt gets.
        """
        longest = max(int(self.examples.lengths[row].sum()) for row in plan_rows)
        T = self.max_length if self.packing else int(buckets.length_of(longest, self.lengths))
        wanted = set(range(len(plan_rows)) if rows is None else rows)
        P = patches.room(self.examples, plan_rows) if self.examples.images else None  # on all hosts the same
        filled = [row if b in wanted else row[:0] for b, row in enumerate(plan_rows)]
        batch = packing.fill(self.examples, filled, T, P, self.alike)
        if partners is not None:
            shape, documents = batch["tokens"].shape, np.concatenate(plan_rows)
            batch |= mismatched.fill(self.examples, self.prompts, documents, partners, shape, self.mismatched, rows)
        return batch

    def _partners(self, documents: np.ndarray) -> np.ndarray | None:
        return mismatched.partners(self.prompts, documents) if self.prompts else None

    def _batch_rows(self, index: int) -> list[np.ndarray]:
        epoch, row = self._locate(index * self.batch_size)
        rows: list[np.ndarray] = []
        while len(rows) < self.batch_size:
            plan = self._epoch(epoch)
            rows += [plan[r] for r in range(row, min(row + self.batch_size - len(rows), len(plan)))]
            epoch, row = epoch + 1, 0
        return rows

    def _epoch(self, epoch: int) -> RowPlan:
        """The rows of an epoch. The last plan is kept with its epoch in one tuple, so that threads may share it."""
        cached, plan = self._plan
        if cached != epoch or plan is None:
            plan = self._make(epoch)
            self._plan = (epoch, plan)
        return plan

    def _make(self, epoch: int) -> RowPlan:
        chosen = self._chosen(epoch)
        if self.shuffle:
            chosen = chosen[permutation(len(chosen), self.seed, epoch)]
        if self.packing:
            return self._packed(chosen, lambda n: permutation(n, self.seed, epoch, 0, 1))
        first = -self._first_row(epoch) % self.batch_size  # rows that fill the batch which the epoch before has begun
        order = buckets.arrange(
            chosen, self.examples.lengths, self.batch_size, first, lambda n: permutation(n, self.seed, epoch, 0, 1)
        )
        return _singles(order)

    def _packed(self, chosen: np.ndarray, shuffle_rows: Callable[[int], np.ndarray] | None) -> RowPlan:
        patterns = self._patterns(chosen)
        row_order = shuffle_rows(packing.count_rows(patterns)) if shuffle_rows else None
        return packing.assign(patterns, self._sizes, chosen, row_order)

    def _patterns(self, chosen: np.ndarray) -> packing.Patterns:
        return packing.patterns(np.bincount(self._sizes[chosen]), self.max_length - self._prefix)

    def _chosen(self, epoch: int) -> np.ndarray:
        """int [n]: the examples of an epoch by source, each as often as it occurs."""
        if not self.shuffle:
            return np.arange(len(self.examples), dtype=np.int32)
        parts = []
        for source, (examples, weight) in enumerate(zip(self._sources, self._weights, strict=True)):
            n = len(examples)
            start, stop = (math.floor(weight * n * e) for e in (epoch, epoch + 1))
            while start < stop:  # pass by pass through the source
                turn, begin = divmod(start, n)
                end = min(n, begin + stop - start)
                whole = end - begin == n
                parts.append(examples if whole else examples[permutation(n, self.seed, turn, source + 1)[begin:end]])
                start += end - begin
        return np.concatenate(parts).astype(np.int32) if parts else np.zeros(0, np.int32)

    def _first_row(self, epoch: int) -> int:
        return sum(self.rows_per_epoch(e) for e in range(epoch))

    def _locate(self, row: int) -> tuple[int, int]:
        """The epoch of a row of the endless stream, and its index in that epoch."""
        epoch = 0
        while row >= (rows := self.rows_per_epoch(epoch)):
            row -= rows
            epoch += 1
        return epoch, row


def _singles(order: np.ndarray) -> RowPlan:
    """One example a row."""
    return RowPlan(order, np.arange(len(order) + 1))
