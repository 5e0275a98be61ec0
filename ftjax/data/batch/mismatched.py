"""Documents of a prompt with the completion of another row, on which KTO measures how far the policy has gone.

Which completion a prompt gets is a function of the documents that stand beside each other, not of the rows they are in:
so it is the same for every packing, mesh and number of hosts.
"""

from bisect import bisect_left, insort
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from ftjax.data.batch import packing
from ftjax.data.format.example import Document
from ftjax.data.tokens.examples import Examples

PREFIX = "mismatched_"
MISMATCHED = {PREFIX + name: dtype for name, dtype in packing.BATCH.items()}  # further arrays [rows, T] of a batch


class Prompts(NamedTuple):
    """What stands before the first trained token of each example, which is one document."""

    lengths: np.ndarray  # int32 [N], tokens
    numbers: np.ndarray  # int32 [N], equal where the tokens are

    @classmethod
    def of(cls, examples: Examples) -> "Prompts":
        lengths, numbers, known = np.zeros(len(examples), np.int32), np.zeros(len(examples), np.int32), {}
        for i in range(len(examples)):
            (document,) = examples.documents_of(i)
            lengths[i] = document.trained.argmax()
            numbers[i] = known.setdefault(document.tokens[: lengths[i]].tobytes(), len(known))
        return cls(lengths, numbers)


def partners(prompts: Prompts, documents: np.ndarray) -> np.ndarray:
    """int64 [n]: whose completion the prompt of each of `documents`, examples [n], gets: another of them; -1 for none.

    Never that of an example with the same prompt. In the order of the prompts' lengths, equal ones side by side, the
    completions move on by as many places as the commonest prompt has: the least that takes each away from its own. So
    each is used once, and meets the next shorter prompts, with which it fits where it did before. Only a prompt of more
    than half of the documents finds too few others; its last ones get some of theirs once more.
    """
    lengths, numbers = prompts.lengths[documents], prompts.numbers[documents]
    order = np.lexsort((documents, numbers, lengths))
    ordered = numbers[order]
    _, which, counts = np.unique(ordered, return_inverse=True, return_counts=True)
    source = (np.arange(len(order)) + counts.max(initial=0)) % max(len(order), 1)
    own = np.flatnonzero(ordered[source] == ordered)
    others = np.flatnonzero(which != counts.argmax()) if len(order) else own
    partner = np.full(len(order), -1)
    if len(others):
        source[own] = others[np.arange(len(own)) % len(others)]
        partner[order] = documents[order][source]
    return partner


class Placed(NamedTuple):
    """Where one of the documents goes: which it is, its row, and how many of its tokens there is room for."""

    index: int
    row: int
    length: int


def placed(lengths: np.ndarray, least: np.ndarray, rows: int, T: int) -> list[Placed]:
    """Documents of so many tokens in `rows` rows of T: the longest first, each into the fullest row where it fits.

    One that fits nowhere is cut to the largest room that is left; where that is below `least` it is left out.
    """
    rooms, out = [(T, row) for row in range(rows)], []  # ascending
    for index in np.argsort(-lengths, kind="stable").tolist():
        at = min(bisect_left(rooms, (int(lengths[index]),)), len(rooms) - 1)
        room, row = rooms[at]
        length = min(int(lengths[index]), room)
        if length >= least[index]:
            del rooms[at]
            insort(rooms, (room - length, row))
            out.append(Placed(index, row, length))
    return out


def fill(
    examples: Examples,
    prompts: Prompts,
    documents: np.ndarray,
    partner: np.ndarray,
    shape: tuple[int, int],
    longest: int,
    rows: Sequence[int] | None,
) -> dict[str, np.ndarray]:
    """The arrays of MISMATCHED, of `shape`: the prompt of each of `documents` with the completion of its `partner`.

    Args:
      documents, partner: int [n], examples; a partner of -1 is none.
      longest: the most tokens of a document.
      rows: fill only these; None: all.
    """
    there = partner >= 0
    documents, partner = documents[there], partner[there]
    before = prompts.lengths[documents]
    lengths = np.minimum(before + examples.lengths[partner] - prompts.lengths[partner], longest)
    wanted, filled = set(range(shape[0]) if rows is None else rows), [[] for _ in range(shape[0])]
    for index, row, length in placed(lengths, before + 1, *shape):
        if row in wanted:
            (own,), (other,) = examples.documents_of(documents[index]), examples.documents_of(partner[index])
            filled[row].append(joined(own, other).cut(length))
    return {PREFIX + name: array for name, array in packing.lay(filled, shape[1], packing.BATCH).items()}


def joined(own: Document, other: Document) -> Document:
    """The prompt of one document and the completion of another."""
    before, after = own.trained.argmax(), other.trained.argmax()
    tokens = np.concatenate([own.tokens[:before], other.tokens[after:]])
    return Document(tokens, np.concatenate([own.trained[:before], other.trained[after:]]))
