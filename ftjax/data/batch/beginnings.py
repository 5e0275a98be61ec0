"""What documents that stand in one row begin with alike, so that the row holds it once: a system message, the prompt of
both answers of a pair.

A document in a row then begins at the position where it differs, and goes on from the tokens before it
(`models.attention.seen_until`). Only tokens are shared that predict nothing that is trained. So the loss of each
document and its gradients are what they are in a row of its own; only the products are fewer.
"""

from typing import NamedTuple

import numpy as np

from ftjax.data.format.example import Document
from ftjax.data.tokens.examples import Examples

KEPT = 2  # tokens of a document that are its own at least: objectives reserve room for so few


class Beginnings(NamedTuple):
    """Of a set of examples.

    Attributes:
      prefix: tokens that every document begins with. The first example of a row holds them, and no other.
      begins: int32 [N, K], the position of the first token that each document of an example adds to those before it in
        a row; of the first example of a row, whose first document holds all its tokens, the first is 0 instead.
      sizes: int32 [N], how many tokens an example adds to `prefix`.
    """

    prefix: int
    begins: np.ndarray
    sizes: np.ndarray

    def of_row(self, row: np.ndarray) -> np.ndarray:
        """int [n]: of the documents of a row of these examples."""
        begins = self.begins[row].reshape(-1)
        begins[:1] = 0
        return begins


def alike(document: Document, other: Document) -> int:
    """How many tokens that `document` begins with may be those of `other`."""
    most = min(
        int(document.trained.argmax()) - 1 if document.trained.any() else len(document.tokens), len(other.tokens)
    )
    most = max(0, min(most, len(document.tokens) - KEPT))
    differ = (document.tokens[:most] != other.tokens[:most]) | other.trained[:most]
    return int(differ.argmax()) if differ.any() else most


def of(examples: Examples) -> Beginnings:
    """What the documents of `examples` begin with alike: all of them, and each with the one before it in its example.

    It goes over one position of all documents at a time, so a million examples take no loop of their own.
    """
    starts = examples.starts[:, None] + np.cumsum(examples.document_lengths, axis=1) - examples.document_lengths
    every, count = np.arange(starts.size), starts.shape[1]
    flat = _Flat(examples, starts.reshape(-1), np.repeat(np.arange(len(examples)), count))
    prefix = 0
    while len(every) and flat.may_share(every, prefix).all() and flat.same(every, every[:1], prefix).all():
        prefix += 1
    begins = np.full(starts.size, prefix, np.int32)
    active = every[every % count > 0]  # those that have one before them in their example
    while len(active):
        position = int(begins[active[0]])
        goes_on = flat.may_share(active, position) & flat.same(active, active - 1, position)
        active = active[goes_on]
        begins[active] += 1
    begins = begins.reshape(-1, count)
    return Beginnings(prefix, begins, (examples.document_lengths - begins).sum(axis=1, dtype=np.int32))


class _Flat(NamedTuple):
    """All documents of a set of examples, one after the other."""

    examples: Examples
    starts: np.ndarray  # int64 [n], where the tokens of each begin in its part
    of: np.ndarray  # int [n], the example of each

    def may_share(self, which: np.ndarray, position: int) -> np.ndarray:
        """bool [m]: whether those of `which` may share their token at a position, having shared those before it."""
        enough = self._lengths(which) - KEPT > position
        out = np.zeros(len(which), bool)
        out[enough] = self._tokens(which[enough], position + 1) >= 0  # what it would predict is not trained
        return out

    def same(self, which: np.ndarray, others: np.ndarray, position: int) -> np.ndarray:
        """bool [m]: whether they have the token there that `others` have, which may be shorter."""
        out = (position < self._lengths(which)) & (position < self._lengths(others))
        others = np.broadcast_to(others, which.shape)
        out[out] = self._tokens(which[out], position) == self._tokens(others[out], position)
        return out

    def _lengths(self, which: np.ndarray) -> np.ndarray:
        return self.examples.document_lengths.reshape(-1)[which]

    def _tokens(self, which: np.ndarray, position: int) -> np.ndarray:
        """int32 [m], with the bit of those that are trained."""
        parts, places = self.examples.parts, self.starts[which] + position
        if self.examples.part_ids is None:
            return parts[0].tokens[places]
        ids, out = self.examples.part_ids[self.of[which]], np.zeros(len(which), np.int32)
        for number, part in enumerate(parts):
            out[ids == number] = part.tokens[places[ids == number]]
        return out
