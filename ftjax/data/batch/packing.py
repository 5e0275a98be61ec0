"""Packing: several examples share a row of T tokens, and no document sees another or is cut.

Which lengths share a row is decided on the histogram of the lengths alone ("efficient sequence packing without
cross-contamination", arXiv 2107.02027), by best fit, the longest first. The caller's shuffle then decides which example
takes which slot of its length. So the number of rows does not depend on the order of an epoch, and fitting ten million
examples takes no longer than ten thousand.
"""

import itertools
from bisect import bisect_left, insort
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ftjax.data.batch import patches
from ftjax.data.batch.beginnings import Beginnings
from ftjax.data.format.example import Document
from ftjax.data.tokens.examples import Examples

# Part of the data's fingerprint. A change here or in the loader that gives other batches must increase it.
ORDER_VERSION = 2

# The arrays [rows, T] of every batch; a method may have more.
BATCH = {
    "tokens": np.int32,
    "targets": np.int32,  # the next token of the same document, else 0
    "weights": np.float32,  # 1 where the target is trained, else 0
    "positions": np.int32,  # from 0 in each document, or from what it shares with those before it (`beginnings`)
    "segment_ids": np.int32,  # 1, 2, ... by document, and 0 for padding
}

# And where a source is replayed: 1 at the tokens of its documents, else 0.
REPLAY = {"replay": np.float32}

# And where a reference was asked before: log p of each document's trained tokens, at its last token, else 0.
REFERENCE = {"reference_logps": np.float32}

# And where the model wrote them: of each trained token how much better its completion is than others, and log p under
# the distribution that it was drawn from; at what predicts it, as `weights`.
ROLLOUT = {"advantages": np.float32, "sampled_logps": np.float32}

# And where that is corrected for: log p of it as the trainer has it before the round, and what the token counts.
CORRECTED = {"old_logps": np.float32, "correction": np.float32}

# And where a critic says what is still to come of a completion: what it said, at each trained token's place, and what
# there was; where the coefficient of the KL divergence follows it, its estimate there.
CRITIC = {"values": np.float32, "returns": np.float32}
KL = {"kl": np.float32}

# And where other rows stand beside completions: 1 at the tokens of their documents, else 0.
PTX = {"ptx": np.float32}

# And where rows say something of their documents: the label of each token, see `Document`.
LABELS = {"labels": np.float32}


@dataclass(frozen=True)
class RowPlan:
    """Which examples each row holds, as two arrays: row r holds order[starts[r] : starts[r + 1]]."""

    order: np.ndarray  # int [n]: indices of examples
    starts: np.ndarray  # int64 [rows + 1], rising from 0 to n

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, row: int) -> np.ndarray:
        return self.order[self.starts[row] : self.starts[row + 1]]


Patterns = list[tuple[tuple[int, ...], int]]  # the lengths that share a row, and the number of such rows


def patterns(histogram: np.ndarray, capacity: int) -> Patterns:
    """Which lengths share a row, and how often.

    Best fit decreasing: the longest examples first, each into the fullest row where it still fits.

    Args:
      histogram: int [n], histogram[l] examples have l tokens.
      capacity: tokens of a row.

    Raises:
      ValueError: a length is not in 1..capacity.
    """
    lengths = np.flatnonzero(histogram)
    if len(lengths) and not 1 <= lengths[0] <= lengths[-1] <= capacity:
        raise ValueError(f"lengths {lengths[0]} to {lengths[-1]} do not fit rows of {capacity} tokens")
    open_rows: dict[int, Patterns] = {}  # by their free tokens
    rooms: list[int] = []  # the keys of open_rows, ascending

    def put(room: int, pattern: tuple[int, ...], count: int) -> None:
        if room not in open_rows:
            open_rows[room] = []
            insort(rooms, room)
        open_rows[room].append((pattern, count))

    for length in lengths[::-1].tolist():
        left = int(histogram[length])
        while left:
            fullest = bisect_left(rooms, length)
            if fullest == len(rooms):  # no open row has room
                whole, rest = divmod(left, capacity // length)
                most = (length,) * (capacity // length)
                if whole:
                    put(capacity - length * len(most), most, whole)
                if rest:
                    put(capacity - length * rest, (length,) * rest, 1)
                break
            room = rooms[fullest]
            pattern, count = open_rows[room].pop()
            if not open_rows[room]:
                del open_rows[room], rooms[fullest]
            # As many of this length into each of these rows as fit, so that many short examples take few turns.
            each = min(room // length, -(-left // count))
            filled = min(count, left // each)
            put(room - length * each, pattern + (length,) * each, filled)
            if filled < count:
                put(room, pattern, count - filled)
            left -= filled * each
    return [group for room in rooms for group in open_rows[room]]


def count_rows(patterns: Patterns) -> int:
    """The number of rows."""
    return sum(count for _, count in patterns)


def assign(patterns: Patterns, lengths: np.ndarray, order: np.ndarray, row_order: np.ndarray | None) -> RowPlan:
    """Puts examples into slots of their length: of one length, the first in `order` gets the slot in the first row.

    Args:
      patterns: those of exactly these lengths.
      lengths: int [N], of all examples.
      order: int [n], the examples to place, each as often as it occurs.
      row_order: int [rows], a permutation of the rows; None sorts them by the earliest example in each.
    """
    counts = np.array([count for _, count in patterns], np.int64)
    sizes = np.repeat(np.array([len(pattern) for pattern, _ in patterns], np.int64), counts)
    # int64 [n]: the length of each slot
    slots = np.concatenate([np.zeros(0, np.int64), *(np.tile(pattern, count) for pattern, count in patterns)])
    starts = np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)])
    if row_order is not None:
        slots, starts = _reorder(slots, starts, row_order)
    placed = np.empty(len(order), order.dtype)
    placed[_by_length(slots)] = order[_by_length(lengths[order])]
    if row_order is None and len(sizes):
        rank = np.empty(len(lengths), np.int64)
        rank[order] = np.arange(len(order))
        earliest = np.minimum.reduceat(rank[placed], starts[:-1])
        placed, starts = _reorder(placed, starts, np.argsort(earliest, kind="stable"))
    return RowPlan(placed, starts)


def _by_length(lengths: np.ndarray) -> np.ndarray:
    """A stable order by length; NumPy's sort of 16-bit integers is linear."""
    small = len(lengths) and lengths.max() < 2**16
    return np.argsort(lengths.astype(np.uint16) if small else lengths, kind="stable")


def _reorder(values: np.ndarray, starts: np.ndarray, row_order: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(values, starts) with their rows in another order."""
    sizes = np.diff(starts)[row_order]
    new_starts = np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)])
    source = np.repeat(starts[:-1][row_order] - new_starts[:-1], sizes) + np.arange(len(values))
    return values[source], new_starts


def fill(
    examples: Examples, rows: Sequence[np.ndarray], T: int, P: int | None = None, alike: Beginnings | None = None
) -> dict[str, np.ndarray]:
    """The arrays of BATCH, [len(rows), T], for rows of example indices; an empty row is all zeros (padding).

    Where a source is replayed those of REPLAY, too, where a reference was asked of all documents those of REFERENCE,
    where documents have labels those of LABELS, and where the model sees images those of `patches.PATCHES`.

    Each document is a segment of its own, and the documents of one example are adjacent: if examples are pairs,
    segments 1 and 2 are the first pair, 3 and 4 the next.

    Args:
      P: patches of a row; None: as many as these rows need (`patches.room`).
      alike: what a row holds once where its documents begin alike; None: each document is there whole.

    Raises:
      ValueError: the examples of a row are longer than T together.
    """
    documents = [itertools.chain.from_iterable(map(examples.documents_of, row)) for row in rows]
    begins = [alike.of_row(row) if alike else np.zeros(examples.document_lengths[row].size, int) for row in rows]
    lengths = [examples.document_lengths[row].reshape(-1) - of_row for row, of_row in zip(rows, begins)]
    batch = lay(documents, T, BATCH | (LABELS if examples.labeled else {}), begins)
    if any(examples.replayed):
        documents_of_each = examples.document_lengths.shape[1]
        batch["replay"] = np.zeros((len(rows), T), REPLAY["replay"])
        for b, row in enumerate(rows):
            is_replay = np.repeat(np.asarray(examples.replayed)[examples.source_ids[row]], documents_of_each)
            batch["replay"][b, : lengths[b].sum()] = np.repeat(is_replay, lengths[b])
    if examples.reference_logps is not None:
        batch["reference_logps"] = np.zeros((len(rows), T), REFERENCE["reference_logps"])
        for b, row in enumerate(rows):
            last = np.cumsum(lengths[b]) - 1
            batch["reference_logps"][b, last] = examples.reference_logps[row].reshape(-1)
    if examples.images:
        batch |= patches.fill(examples, rows, T, patches.room(examples, rows) if P is None else P)
    return batch


def lay(
    rows: Sequence[Iterable[Document]],
    T: int,
    names: Mapping[str, type],
    begins: Sequence[Iterable[int]] | None = None,
) -> dict[str, np.ndarray]:
    """Arrays [len(rows), T] of these names, for rows of documents that lie one after the other.

    begins: how many tokens of each document are left out at its beginning, as those before it have them; None: none.

    Raises:
      ValueError: the documents of a row are longer than T together.
    """
    batch = {name: np.zeros((len(rows), T), dtype) for name, dtype in names.items()}
    for b, documents in enumerate(rows):
        start = 0
        of_row = itertools.repeat(0) if begins is None else begins[b]
        for segment, (document, begin) in enumerate(zip(documents, of_row), 1):
            tokens, trained, labels = (part if part is None else part[begin:] for part in document)
            stop = start + len(tokens)
            if stop > T:
                raise ValueError(f"row {b} has {stop} or more tokens, more than {T}")
            batch["tokens"][b, start:stop] = tokens
            batch["targets"][b, start : stop - 1] = tokens[1:]
            batch["weights"][b, start : stop - 1] = trained[1:]
            batch["positions"][b, start:stop] = np.arange(begin, begin + stop - start)
            batch["segment_ids"][b, start:stop] = segment
            if labels is not None:
                batch["labels"][b, start:stop] = labels
            start = stop
    return batch
