"""The two records that data passes through: a `Row` as it was read, an `Example` as the model sees it."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Row:
    """One row of a data set, with the fields of its format and the place that messages about it name.

    Attributes:
      fields: those of one of the formats in `formats.FORMATS`; after `formats.check_row`, one of its five
        records.
      origin: "file.jsonl:12", "tfds:name[3]" or "task:name[3]".
    """

    fields: dict
    origin: str


@dataclass(frozen=True)
class Example:
    """One document as tokens.

    Attributes:
      tokens: int32 [n].
      trained: bool [n]; trained[i] says that token i is predicted with loss. trained[0] is False: nothing predicts it.
      origin: the origin of its row.
    """

    tokens: np.ndarray
    trained: np.ndarray
    origin: str
