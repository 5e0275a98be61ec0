"""The two forms of data on its way: a `Row` as it is read, an `Example` as the model sees it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np


@dataclass(frozen=True)
class Row:
    """One row of a data set.

    Attributes:
      fields: of one of the formats in `formats.FORMATS`; after `formats.check_row`, one of the five records.
      origin: where it is, for messages: "file.jsonl:12", "tfds:name[3]" or "task:name[3]".
    """

    fields: dict
    origin: str


class Document(NamedTuple):
    """A sequence that sees nothing but itself.

    Attributes:
      tokens: int32 [n].
      trained: bool [n]; trained[i] says that token i is predicted with loss. trained[0] is False: nothing predicts it.
      labels: float32 [n], what the row says of the answer or step that token i belongs to, such as +1 for a good one;
        None for kinds of rows that say nothing (`kinds.RowKind`). It stands at every token of it, so that a cut leaves
        it there.
    """

    tokens: np.ndarray
    trained: np.ndarray
    labels: np.ndarray | None = None

    def cut(self, length: int) -> "Document":
        """Its first `length` tokens."""
        return Document(*(part if part is None else part[:length] for part in self))


@dataclass(frozen=True)
class Example:
    """What the model sees of one row: a document, or several that belong together and share a row of a batch.

    Attributes:
      tokens, trained, labels: those of its documents, one after the other (see `Document`).
      origin: the origin of its row.
      lengths: tokens of each document; () where it is only one.
    """

    tokens: np.ndarray
    trained: np.ndarray
    origin: str
    lengths: tuple[int, ...] = ()
    labels: np.ndarray | None = None

    @property
    def documents(self) -> list[Document]:
        bounds = np.cumsum(self.lengths)[:-1]
        columns = (self.tokens, self.trained) if self.labels is None else (self.tokens, self.trained, self.labels)
        return [Document(*parts) for parts in zip(*(np.split(column, bounds) for column in columns))]

    @classmethod
    def of(cls, documents: Sequence[Document], origin: str) -> "Example":
        columns = (None if parts[0] is None else np.concatenate(parts) for parts in zip(*documents))
        tokens, trained, labels = columns
        return cls(tokens, trained, origin, tuple(len(document.tokens) for document in documents), labels)
