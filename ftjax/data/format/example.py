"""The two forms of data on its way: a `Row` as it is read, an `Example` as the model sees it."""

from dataclasses import dataclass

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


@dataclass(frozen=True)
class Example:
    """One document as tokens.

    Attributes:
      tokens: int32 [n].
      trained: bool [n]; whether token i is predicted with loss. trained[0] is False: nothing predicts the first token.
      origin: the origin of its row.
    """

    tokens: np.ndarray
    trained: np.ndarray
    origin: str
